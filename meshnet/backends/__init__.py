"""The modes of a network: one file a mode, what it wants from the kernel.

A backend adds a network's objects to a `KernelState`, in two parts: what this host has of its own,
and what each other host adds.  No peer's objects depend on another peer, so that one host's change
is planned alone.  A backend does no I/O and remembers nothing.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from meshnet.state import NEXTHOP_ID_FIRST, NEXTHOP_ID_LAST, KernelState, LinkKind, Nexthop

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from meshnet.firewall import FirewallNetwork
    from meshnet.model import Endpoint, Host, HostId, IpAddress, IpNetwork, Network


class Path(NamedTuple):
    """How this host's kernel reaches an underlay address (``RTM_GETROUTE``).

    Attributes:
        on_link: without a gateway in between.
        mtu_bytes: MTU of the route, or of `dev` where the route has none of its own.
    """

    dev: str
    on_link: bool
    mtu_bytes: int


class HostLink(NamedTuple):
    """A link of this host that is not ours, as endpoints of an underlay network hang on.

    Attributes:
        addresses: of global scope.
    """

    mtu_bytes: int
    addresses: frozenset[IpAddress] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Underlay:
    """What this host's kernel says of the underlay.

    Attributes:
        ip: the address tunnels start from; `dev` holds it.
        links: by name, those that are not ours.
        paths: by peer address; a peer the kernel has no route to is missing.
        forwarding_links: links that packets to and from outside the network cross.
        ra_links: links whose default route may come from router advertisements, which a router
            only listens to when told so (``accept_ra=2``).
        ipv6: whether the kernel has IPv6 at all.
        strict_rp_filter: whether ``net.ipv4.conf.all.rp_filter`` is 1.
        kernel_vxlan: whether the kernel has VXLAN, and may use it.
        nexthop_objects: whether the kernel has them (Linux 5.3); else routes name their gateways.
    """

    ip: IpAddress
    dev: str
    mtu_bytes: int
    links: Mapping[str, HostLink] = field(default_factory=dict)
    paths: Mapping[IpAddress, Path] = field(default_factory=dict)
    forwarding_links: tuple[str, ...] = ()
    ra_links: tuple[str, ...] = ()
    ipv6: bool = True
    strict_rp_filter: bool = False
    nexthop_objects: bool = True
    kernel_vxlan: bool = True


class Peer(NamedTuple):
    """Another host, and its subnets of the network, IPv4 first."""

    host: Host
    subnets: tuple[IpNetwork, ...]


@dataclass(slots=True)
class NexthopIds:
    """Which id each nexthop object has: kept while it lives, lowest free for a new one."""

    _ids: dict[Nexthop, int] = field(default_factory=dict)
    _used: set[int] = field(default_factory=set)
    _next: int = NEXTHOP_ID_FIRST

    def adopt(self, actual: Mapping[int, Nexthop], foreign: Collection[int]) -> None:
        """Start over from what the kernel holds: ours by id, and ids of others to keep off."""
        self._ids = {nexthop: i for i, nexthop in actual.items()}
        self._used = {*actual, *foreign}
        self._next = NEXTHOP_ID_FIRST

    def id_of(self, nexthop: Nexthop) -> int:
        """The id of a nexthop, a new one if it has none.

        Raises:
            OverflowError: all 2^24 ids are in use.
        """
        known = self._ids.get(nexthop)
        if known is not None:
            return known
        while self._next in self._used:
            self._next += 1
        if self._next > NEXTHOP_ID_LAST:
            raise OverflowError("no nexthop id is free")
        self._used.add(self._next)
        self._ids[nexthop] = self._next
        return self._next


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkInput:
    """A network, and all that a backend may look at on this host.

    Attributes:
        subnets: this host's own subnets of the network.
        endpoints: this host's endpoints on the network.
        host_addresses: this host's own addresses of the network's pool, if it has any.
        path_mtu_bytes: of the narrowest path to a peer, or of the underlay link without peers.
        fallen: peers that are sent to by the fallback, if the network has one.
    """

    network: Network
    subnets: Sequence[IpNetwork]
    endpoints: Sequence[Endpoint]
    underlay: Underlay
    path_mtu_bytes: int
    host_addresses: Sequence[IpAddress] = ()
    fallen: Collection[HostId] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """What a backend made of a network.

    Attributes:
        mtu_bytes: MTU of its endpoints on this host.
        uplink: link of the host that endpoints hang on.
        endpoint_link: what hangs there: the host's end of a veth pair, a port of the bridge
            `uplink`, or a macvlan on the link `uplink`.
        gso_max_bytes: the largest super-packet that endpoints should send; None: any.
        errors: settings that cannot be had on this host, in words.
    """

    mtu_bytes: int
    uplink: str
    endpoint_link: LinkKind = LinkKind.VETH
    firewall: FirewallNetwork
    gso_max_bytes: int | None = None
    errors: tuple[str, ...] = ()


class Backend(Protocol):
    """A mode."""

    def plan_host(self, wanted: NetworkInput, state: KernelState) -> NetworkPlan:
        """Add what this host has of the network, whatever peers there are, to `state`."""
        ...

    def plan_peers(
        self, wanted: NetworkInput, peers: Iterable[Peer], state: KernelState, ids: NexthopIds
    ) -> dict[HostId, str]:
        """Add what leads to some peers to `state`; `ids` names nexthop objects.

        Returns:
            Peers that cannot be had on this host, and why.
        """
        ...
