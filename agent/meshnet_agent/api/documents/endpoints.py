"""Documents of endpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from meshnet.sandbox import HoldSandbox, ProcessSandbox

if TYPE_CHECKING:
    from meshnet.model import Endpoint


class EndpointDocument(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint; addresses are in CIDR form.

    Attributes:
        pid: None: it is held for `owner`.
        netns: path of the namespace of a hold, where its owner bound it.
        default_route: whether the namespace's default route leads through it, for any IP version.
        default_versions: for which ones.
        address6, gateway6: present only for an endpoint with both IP versions.
        gateway, gateway6: None if it does not have one.
    """

    id: str
    network: str
    host: str
    name: str
    pid: int | None
    owner: str | None
    netns: str | None
    ifname: str
    address: str
    gateway: str | None
    mac: str
    mtu: int
    default_route: bool
    default_versions: list[int]
    published: list[str]
    address6: str | msgspec.UnsetType = msgspec.UNSET
    gateway6: str | msgspec.UnsetType | None = msgspec.UNSET


class AttachedDocument(EndpointDocument, frozen=True, kw_only=True):
    """An endpoint that was attached just now.

    Attributes:
        agent_ms: the agent's own time for it.
        warning: what does not work of its network on this host; absent if all does.
    """

    agent_ms: float
    warning: str | msgspec.UnsetType = msgspec.UNSET


class EndpointsDocument(msgspec.Struct, frozen=True, kw_only=True):
    """Endpoints of all hosts; if there are only this host's, `warning` says why."""

    endpoints: list[EndpointDocument]
    warning: str | None


def endpoint_document(endpoint: Endpoint) -> EndpointDocument:
    """The document of an endpoint."""
    gateways = {gateway.version: str(gateway) for gateway in endpoint.gateways}
    first, *others = endpoint.addresses
    sandbox = endpoint.sandbox
    return EndpointDocument(
        id=endpoint.id,
        network=endpoint.network,
        host=endpoint.host,
        name=endpoint.name,
        pid=sandbox.pid if isinstance(sandbox, ProcessSandbox) else None,
        owner=sandbox.owner if isinstance(sandbox, HoldSandbox) else None,
        netns=sandbox.path if isinstance(sandbox, HoldSandbox) else None,
        ifname=endpoint.ifname,
        address=str(first),
        gateway=gateways.get(first.version),
        mac=endpoint.mac.hex(":"),
        mtu=endpoint.mtu_bytes,
        default_route=bool(endpoint.default_versions),
        default_versions=list(endpoint.default_versions),
        published=[str(port) for port in endpoint.published],
        address6=str(others[0]) if others else msgspec.UNSET,
        gateway6=gateways.get(6) if others else msgspec.UNSET,
    )


def attached_document(endpoint: Endpoint, agent_ms: float, warning: str | None) -> AttachedDocument:
    """The document of an endpoint that took so many milliseconds to attach."""
    fields = msgspec.structs.asdict(endpoint_document(endpoint))
    return AttachedDocument(
        **fields,
        agent_ms=round(agent_ms, 3),
        warning=warning if warning is not None else msgspec.UNSET,
    )
