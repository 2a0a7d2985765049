"""Documents of networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from meshnet.backends import Setting
from meshnet.backends.table import backend_of
from meshnet.modes import Mode  # noqa: TC001  (msgspec reads it)
from meshnet_agent.api.documents.endpoints import EndpointDocument, endpoint_document

if TYPE_CHECKING:
    from meshnet.model import Network
    from meshnet_agent.api.reports import NetworkReport, VtepReport
    from meshnet_agent.mesh.operations import CreatedNetwork


class NetworkDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A network.

    Attributes:
        subnets: IPv4 first.
        port: None for a mode without one.
        mtu: what its endpoints get on this host; None while it is not up here.
        host_prefix: of IPv4, or of IPv6 where there is no IPv4.
    """

    name: str
    mode: Mode
    subnets: list[str]
    vni: int
    port: int | None
    mtu: int | None
    host_prefix: int
    host_prefix6: int
    direct_routing: bool
    fallback: Literal["auto", "never"]
    parent: str | None
    ranges: list[str]
    gateways: list[str]
    internal: bool
    host_access: bool


class CreatedNetworkDocument(NetworkDocument, frozen=True, kw_only=True):
    """A network that was created just now; `error` says why it has not come up on this host."""

    error: str | msgspec.UnsetType = msgspec.UNSET


class RemovedNetworkDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A network that was removed."""

    name: str


class VtepDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What this host's userspace VTEP of a network has counted (`meshnet.vtep.control`).

    Attributes:
        peers: counters of each, with `host` and `underlay_ip`.
    """

    drops: dict[str, int]
    totals: dict[str, int | float]
    peers: list[dict[str, Any]]


class InspectedNetworkDocument(NetworkDocument, frozen=True, kw_only=True):
    """A network with what hangs on it.

    Attributes:
        hosts: each host's subnets.
        endpoints: those of this host.
        vtep: None where the kernel forwards.
    """

    hosts: dict[str, list[str]]
    endpoints: list[EndpointDocument]
    vtep: VtepDocument | None


def network_document(network: Network, mtu_bytes: int | None) -> NetworkDocument:
    """The document of a network; `mtu_bytes` is what its endpoints get here, None while unknown."""
    has_ipv4 = network.subnets[0].version == 4
    return NetworkDocument(
        name=network.name,
        mode=network.mode,
        subnets=[str(s) for s in network.subnets],
        vni=network.vni,
        port=network.port if Setting.PORT in backend_of(network).settings else None,
        mtu=network.mtu_bytes if network.mtu_bytes is not None else mtu_bytes,
        host_prefix=network.host_prefix if has_ipv4 else network.host_prefix6,
        host_prefix6=network.host_prefix6,
        direct_routing=network.direct_routing,
        fallback="auto" if network.fallback else "never",
        parent=network.parent,
        ranges=[str(r) for r in network.ranges],
        gateways=[str(g) for g in network.gateways],
        internal=network.internal,
        host_access=network.host_access,
    )


def created_document(created: CreatedNetwork) -> CreatedNetworkDocument:
    """The document of a network that was created just now."""
    fields = msgspec.structs.asdict(network_document(created.network, created.mtu_bytes))
    return CreatedNetworkDocument(
        **fields, error=created.error if created.error is not None else msgspec.UNSET
    )


def inspected_document(report: NetworkReport) -> InspectedNetworkDocument:
    """The document of a network with what hangs on it."""
    fields = msgspec.structs.asdict(network_document(report.network, report.mtu_bytes))
    return InspectedNetworkDocument(
        **fields,
        hosts={host: [str(s) for s in subnets] for host, subnets in report.hosts.items()},
        endpoints=[endpoint_document(e) for e in report.endpoints],
        vtep=_vtep_document(report.vtep) if report.vtep is not None else None,
    )


def _vtep_document(vtep: VtepReport) -> VtepDocument:
    counted = vtep.counters  # empty if the VTEP did not answer
    return VtepDocument(
        drops=counted.get("drops", {}),
        totals=counted.get("totals", {}),
        peers=[
            {"host": vtep.hosts.get(peer["underlay_ip"], ""), **peer}
            for peer in counted.get("peers", [])
        ],
    )
