"""The registry's rules: who owns a subnet, who holds a host id, which networks conflict.

Values in, values and errors out; `meshnet.store.registry` reads and writes.  Pure.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from meshnet.backends.conflicts import find_conflict
from meshnet.backends.occupied import Underlays, check_free
from meshnet.codec.document import BadValueError
from meshnet.codec.hosts import decode_claim, decode_reservation, subnet_from_key
from meshnet.errors import ConflictError, PolicyRefusedError
from meshnet.model import HostId, NetworkName, Reservations, Vni
from meshnet.store.mirror import SUBNETS, network_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from meshnet.model import Claim, Host, IpNetwork, MeshSnapshot, Network
    from meshnet.store import KeyValue

FIRST_VNI = 4097
"""Networks that name no VNI get the lowest free one from here on: small ones are for people."""


def address_of(subnet: IpNetwork) -> int:
    """A subnet's address as a number, to order subnets of one IP version by."""
    return int(subnet.network_address)


def owners_of(network: NetworkName, items: Sequence[KeyValue]) -> dict[IpNetwork, HostId]:
    """Whose subnets the keys of reservations are."""
    owners = {}
    for item in items:
        part = item.key.removeprefix(f"{SUBNETS}{network}/")
        with contextlib.suppress(BadValueError):
            subnet = subnet_from_key(part)
            # A value that cannot be read still reserves its subnet: nobody may overwrite it.
            owners[subnet] = HostId("")
            owners[subnet] = decode_reservation(network, part, item.value).host
    return owners


def owned_by(
    taken: Mapping[IpNetwork, HostId], network: Network, version: int, host: HostId
) -> list[IpNetwork]:
    """The subnets that a host owns already."""
    if isinstance(taken, Reservations):
        subnets: Iterable[IpNetwork] = taken.of(host)
    else:
        subnets = (subnet for subnet, owner in taken.items() if owner == host)
    return [s for s in subnets if s.version == version and network.is_host_subnet(s)]


def claim_of(held: bytes) -> Claim | None:
    """The claim that a key holds; None: it cannot be read."""
    with contextlib.suppress(BadValueError):
        return decode_claim(held)
    return None


def claim_conflict(host: Host, claim: Claim, held: bytes, ttl_s: int) -> str:
    """Why a host id that another agent holds cannot be had, and what to do."""
    other = claim_of(held)
    where = "an agent whose entry cannot be read"
    if other is not None:
        where = f"an agent at underlay address {other.underlay_ip}"
    held_by = f"host id {host.id} is held by {where}"
    if other is not None and other.instance == claim.instance:
        return (
            f"{held_by} with this state directory, or a copy of it: if this host has moved, try "
            f"again when that lease has run out (within {ttl_s} s); if it is another machine, give "
            "it a state directory and a --host-id of its own"
        )
    return (
        f"{held_by}: give this agent another --host-id, or stop that one (if it crashed, its lease "
        f"runs out within {ttl_s} s)"
    )


def free_vni(used: set[Vni]) -> int:
    """The lowest that is not used, from `FIRST_VNI`."""
    candidate = FIRST_VNI
    while candidate in used:
        candidate += 1
    return candidate


def check_conflicts(network: Network, snapshot: MeshSnapshot) -> None:
    """Refuse a network that cannot be beside the networks and hosts that there are.

    Raises:
        ConflictError: it cannot be beside a network; says which, and what to choose instead.
        PolicyRefusedError: the underlay address of a host is among its addresses.
    """
    if network_key(network.name) in snapshot.bad_values:
        raise ConflictError(
            f"network {network.name} exists with a value that cannot be read: choose another "
            "name, or meshnet network rm it first"
        )
    if network.name in snapshot.networks:
        raise ConflictError(
            f"network {network.name} exists: choose another name, or meshnet network rm it first"
        )
    for other in snapshot.networks.values():
        # Only conflicts on hosts with kernel VXLAN.  Hosts without it have more conflicts, and
        # refuse the younger network by themselves (`meshnet.plan`).
        conflict = find_conflict(network, other, kernel_vxlan=True)
        if conflict is not None:
            raise ConflictError(f"{conflict.problem}: {conflict.choose}")
    problem = check_free(network, Underlays(snapshot.hosts.values()).inside(network))
    if problem is not None:
        raise PolicyRefusedError(problem)
