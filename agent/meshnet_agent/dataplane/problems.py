"""What stands between a network and its packets on this host, by the last pass.

Pure: reads nothing but results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.backends.table import backend_of
from meshnet.plan import NetworkOutcome
from meshnet.state import RouteKey
from meshnet.tables import Table

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from meshnet.model import Network, NetworkName
    from meshnet.tables import Failure
    from meshnet_agent.dataplane.pass_values import PassResult


def sort_failures(
    failures: Iterable[Failure], networks: Collection[Network]
) -> tuple[dict[NetworkName, list[Failure]], list[Failure]]:
    """Failures by the network they belong to, and the rest."""
    by_network: dict[NetworkName, list[Failure]] = {n.name: [] for n in networks}
    rest: list[Failure] = []
    for failure in failures:
        owner = next((n.name for n in networks if _belongs(failure, n)), None)
        (by_network[owner] if owner is not None else rest).append(failure)
    return by_network, rest


def find_problems(result: PassResult, network: Network) -> list[str]:
    """Why packets of a network do not get everywhere that they should; empty: they do."""
    outcome = result.networks.get(network.name) or NetworkOutcome()
    refused = [str(f) for f in result.failures if _belongs(f, network)]
    return [*outcome.errors, *outcome.peer_errors.values(), *refused]


def find_dead_link(result: PassResult, network: Network) -> Failure | None:
    """The operation without which a network has no data path at all; None: it has one.

    That is one on its bridge or its tunnel device, or on their addresses.  A refused route is not:
    all other ways work.
    """
    return next(
        (
            failure
            for failure in result.failures
            if failure.op.table in (Table.LINK, Table.ADDRESS) and _belongs(failure, network)
        ),
        None,
    )


def _belongs(failure: Failure, network: Network) -> bool:
    op = failure.op
    links = backend_of(network).link_names(network).ours
    if op.table is Table.LINK:
        return op.key in links
    if op.table is Table.NEXTHOP and op.value is not None:
        return op.value.dev in links
    if isinstance(op.key, RouteKey):
        return any(
            s.version == (4 if len(op.key.prefix) == 4 else 6)
            and int(s.network_address)
            <= int.from_bytes(op.key.prefix, "big")
            <= int(s.broadcast_address)
            for s in network.subnets
        )
    return getattr(op.key, "dev", None) in links
