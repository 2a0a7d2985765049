"""Documents of hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from meshnet.backends import Peer
from meshnet.backends.table import backend_of
from meshnet.model import Datapath, NetworkName  # noqa: TC001  (msgspec reads them)
from meshnet_agent.api.documents.endpoints import EndpointDocument, endpoint_document

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from meshnet.model import Endpoint, Host, HostId, MeshSnapshot
    from meshnet_agent.api.reports import PathsReport


class HostDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A host; all fields but the first three are by network.

    Attributes:
        alive: its lease has not run out, as far as this agent has heard.
        dead_s: seconds for which this agent has seen it without a lease; None: it has one, or the
            store is not followed.
        subnets: the IPv4 ones, or the IPv6 ones of networks without IPv4.
        subnets6: the IPv6 ones of networks with both.
        datapath: what carries its tunnels.
        path: how packets to it leave this host; empty for this host itself.
        path_why: the reason, where that is the fallback.
    """

    id: str
    underlay_ip: str
    alive: bool
    dead_s: int | None
    subnets: dict[NetworkName, str]
    subnets6: dict[NetworkName, str]
    datapath: dict[NetworkName, Datapath]
    path: dict[NetworkName, str]
    path_why: dict[NetworkName, str]


class RemovedHostDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A host that was forgotten, and the endpoints that it had published."""

    id: str
    endpoints: list[EndpointDocument]


def host_document(
    host: Host,
    snapshot: MeshSnapshot,
    path: Mapping[NetworkName, str],
    path_why: Mapping[NetworkName, str],
    *,
    dead_s: float | None = None,
) -> HostDocument:
    """The document of a host.

    Args:
        path: by network, how packets to it leave this host.
        path_why: the reason, by network, where that is not the network's own mode.
    """
    subnets: dict[NetworkName, str] = {}
    subnets6: dict[NetworkName, str] = {}
    datapath: dict[NetworkName, Datapath] = {}
    for name, network in snapshot.networks.items():
        owned = snapshot.subnets_of(host.id, name)
        if owned:
            subnets[name] = str(owned[0])
            forwards = backend_of(network).datapath_of(host)
            if forwards is not None:
                datapath[name] = forwards
        if len(owned) > 1:
            subnets6[name] = str(owned[1])
    return HostDocument(
        id=host.id,
        underlay_ip=str(host.underlay_ip),
        alive=host.id in snapshot.alive,
        dead_s=round(dead_s) if dead_s is not None else None,
        subnets=subnets,
        subnets6=subnets6,
        datapath=datapath,
        path=dict(path),
        path_why=dict(path_why),
    )


def paths_to(
    host: Host, paths: PathsReport
) -> tuple[dict[NetworkName, str], dict[NetworkName, str]]:
    """How packets to a host leave this one, by network, and the reason for each fallback."""
    path: dict[NetworkName, str] = {}
    if host.id == paths.here or paths.underlay is None:
        return path, {}
    for name, outcome in paths.networks.items():
        network = paths.snapshot.networks.get(name)
        subnets = paths.snapshot.subnets_of(host.id, name)
        if network is not None and subnets and outcome.plan is not None:
            backend = backend_of(network).on(paths.underlay)
            fallen = (name, host.id) in paths.falls
            peer = Peer(host, subnets)
            path[name] = backend.path_to(network, peer, paths.underlay, fallen=fallen)
    return path, {n: paths.falls[n, host.id].why for n in path if (n, host.id) in paths.falls}


def removed_host_document(host: HostId, endpoints: Iterable[Endpoint]) -> RemovedHostDocument:
    """The document of a host that was forgotten."""
    return RemovedHostDocument(id=host, endpoints=[endpoint_document(e) for e in endpoints])
