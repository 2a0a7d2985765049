"""The modes of a network: one file for each, with all that concerns that mode alone.

A backend says how a mode's endpoints get their addresses, which settings it has and how to check
them, what its links are called and which UDP ports it wants.  And it adds a network's objects to a
`KernelState`, in two parts: this host's own, and those that each other host adds.  No peer's
objects depend on another peer, so one host's change can be planned alone.  A backend does no I/O
and remembers nothing.

`meshnet.backends.table` finds a network's backend.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from meshnet.errors import UsageError
from meshnet.model import VXLAN_PORT
from meshnet.state import NEXTHOP_ID_FIRST, NEXTHOP_ID_LAST, KernelState, LinkKind, Nexthop

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from meshnet.firewall import FirewallNetwork
    from meshnet.model import (
        Datapath,
        Endpoint,
        Host,
        HostId,
        IpAddress,
        IpNetwork,
        Network,
        Vni,
    )
    from meshnet.modes import Mode

_LEAST_ADDRESSES = 4
"""Of a CIDR that is not cut into host subnets: its own, a gateway, one endpoint, the broadcast."""


class UnderlayPath(NamedTuple):
    """How this host's kernel reaches an underlay address (``RTM_GETROUTE``).

    Attributes:
        on_link: whether there is no gateway in between.
        mtu_bytes: MTU of the route, or of `dev` where the route sets none.
    """

    dev: str
    on_link: bool
    mtu_bytes: int


class Occupant(NamedTuple):
    """Addresses that something outside the networks has (`meshnet.backends.occupied`).

    Attributes:
        prefix: the addresses.
        what: who has them, in words.
        dev: the link that leads there; "": by whatever route.
        vital: whether a network that contains them cannot be had on this host; else it only keeps
            off them.
        aggregate: whether a gateway leads there, so that not all of it need be in use.
    """

    prefix: IpNetwork
    what: str
    dev: str = ""
    vital: bool = False
    aggregate: bool = False


class HostLink(NamedTuple):
    """A link of this host that is not ours; endpoints of an underlay network may hang on it.

    Attributes:
        addresses: its addresses of global scope.
    """

    mtu_bytes: int
    addresses: frozenset[IpAddress] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Underlay:
    """What this host's kernel says of the underlay.

    Attributes:
        ip: the address that tunnels start from; `dev` holds it.
        links: by name, those that are not ours.
        occupied: what this host's links and routes lead to, but for default routes and ours.
        paths: by peer address; a peer that the kernel has no route to is missing.
        forwarding_links: the host's own links that are up: packets from outside, and answers to
            endpoints, may come by any of them.
        ra_links: links that listen to router advertisements, and "default" if later ones will; a
            host that forwards does so only with ``accept_ra=2``.
        ipv6: whether the kernel has IPv6 at all.
        strict_rp_filter: whether ``net.ipv4.conf.all.rp_filter`` is 1.
        kernel_vxlan: whether the kernel has VXLAN, and may use it.
        nexthop_objects: whether the kernel has them (Linux 5.3); else routes name their gateways.
    """

    ip: IpAddress
    dev: str
    mtu_bytes: int
    links: Mapping[str, HostLink] = field(default_factory=dict)
    occupied: tuple[Occupant, ...] = ()
    paths: Mapping[IpAddress, UnderlayPath] = field(default_factory=dict)
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
    """The id of each nexthop object: kept while it lives, the lowest free one if it is new."""

    _ids: dict[Nexthop, int] = field(default_factory=dict)
    _used: set[int] = field(default_factory=set)
    _next: int = NEXTHOP_ID_FIRST

    def adopt(self, actual: Mapping[int, Nexthop], foreign: Collection[int]) -> None:
        """Start over from what the kernel holds: our objects by id, and ids that others have."""
        self._ids = {nexthop: i for i, nexthop in actual.items()}
        self._used = {*actual, *foreign}
        self._next = NEXTHOP_ID_FIRST

    def id_of(self, nexthop: Nexthop) -> int:
        """The id of a nexthop; one without an id gets a new one.

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
        host_addresses: this host's own addresses from the network's pool, if it has any.
        path_mtu_bytes: MTU of the narrowest path to a peer; without peers, of the underlay link.
        fallen: peers that are reached by the fallback now, if the network has one.
        hosts_inside: whether other hosts' underlay addresses are in the network's CIDRs: no route
            may lead there but those to subnets.
    """

    network: Network
    subnets: Sequence[IpNetwork]
    endpoints: Sequence[Endpoint]
    underlay: Underlay
    path_mtu_bytes: int
    host_addresses: Sequence[IpAddress] = ()
    fallen: Collection[HostId] = ()
    hosts_inside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """What a backend made of a network.

    Attributes:
        mtu_bytes: MTU of its endpoints on this host.
        uplink: link of the host that endpoints hang on.
        endpoint_link: kind of an endpoint's link: a veth pair, whose host's end is a port of the
            bridge `uplink`, or a macvlan on the link `uplink`.
        firewall: what the firewall checks; None: nothing, as packets cross no link of ours.
        gso_max_bytes: the largest super-packet that endpoints should send; None: any.
        errors: settings that this host cannot follow, in words.
    """

    mtu_bytes: int
    uplink: str
    endpoint_link: LinkKind = LinkKind.VETH
    firewall: FirewallNetwork | None = None
    gso_max_bytes: int | None = None
    errors: tuple[str, ...] = ()


class Addressing(Enum):
    """How the hosts share a network's addresses."""

    SUBNETS = "subnets"
    """Each host reserves a subnet, by which other hosts reach its endpoints."""
    POOL = "pool"
    """Endpoints of all hosts are on the physical network, with addresses from one pool."""
    WHOLE = "whole"
    """Every host uses all of them: no packet goes to another host."""


class Setting(StrEnum):
    """A setting of a network that not every mode has, as messages name it."""

    FALLBACK = "fallback"
    DIRECT_ROUTING = "direct routing"
    HOST_ACCESS = "--host-access"
    PARENT = "--parent"
    RANGE = "--range"
    GATEWAY = "--gateway"
    PORT = "--port"
    HOST_PREFIX = "--host-prefix"
    HOST_PREFIX6 = "--host-prefix6"


class LinkNames(NamedTuple):
    """Names of the links that a network may have on a host, whether or not they exist.

    Attributes:
        local: links by which the host and its endpoints reach each other.
        tunnels: links by which packets go to other hosts.
        parents: the host's own links that endpoints hang on; they may come and go.
    """

    local: tuple[str, ...] = ()
    tunnels: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()

    @property
    def ours(self) -> tuple[str, ...]:
        """Names of the links that we make."""
        return self.local + self.tunnels


class TunnelPorts(NamedTuple):
    """UDP ports that a network wants on a host.

    Attributes:
        exclusive: ports that no other network may have, such as a userspace VTEP's.
        shared: ports of the kernel's VXLAN, which tells its networks apart by VNI.
    """

    exclusive: frozenset[int] = frozenset()
    shared: frozenset[int] = frozenset()


class Blocked(NamedTuple):
    """Why a network is not up on a host.

    Attributes:
        refused: whether that takes a change to mend; False: it is under way.
    """

    reason: str
    refused: bool


class Backend(ABC):
    """A mode.

    The defaults here are those of a mode without the feature, so a mode's file tells only what it
    has.

    Attributes:
        mode: the mode that it implements.
        addressing: how the hosts share a network's addresses.
        settings: settings that its networks may have, besides those that every mode has.
    """

    mode: ClassVar[Mode]
    addressing: ClassVar[Addressing]
    settings: ClassVar[frozenset[Setting]] = frozenset()

    def check_cidr(self, cidr: IpNetwork, host_prefix: int) -> None:
        """Refuse a CIDR that is too small.

        Args:
            host_prefix: prefix length of one host's subnet, where hosts have one.

        Raises:
            UsageError: it has no room for endpoints, or for host subnets.
        """
        if cidr.num_addresses < _LEAST_ADDRESSES:
            raise UsageError(f"{cidr} has no room for endpoints: choose a shorter prefix")

    def check(self, network: Network) -> None:
        """Refuse a network that cannot work in this mode; settings of other modes were refused.

        Raises:
            UsageError: a setting does not fit the others, or one is missing.
        """
        return

    @abstractmethod
    def link_names(self, network: Network) -> LinkNames:
        """What the network's links are called."""

    @abstractmethod
    def plan_host(self, wanted: NetworkInput, state: KernelState) -> NetworkPlan:
        """Add to `state` what this host has of the network, whoever its peers are."""

    def plan_peers(
        self, wanted: NetworkInput, peers: Sequence[Peer], state: KernelState, ids: NexthopIds
    ) -> dict[HostId, str]:
        """Add to `state` what leads to some peers; `ids` names nexthop objects.

        Returns:
            Peers that this host cannot reach, and why.
        """
        return {}

    def on(self, underlay: Underlay) -> Backend:
        """The backend that carries this mode's networks on a host with such an underlay."""
        return self

    def blocked(self, network: Network, underlay: Underlay, takeover: str | None) -> Blocked | None:
        """Why the network is not up on this host; None: nothing prevents it.

        Args:
            takeover: why the network's parent is not taken over; "": it is; None: under way.
        """
        return None

    def takeover_bridge(self, network: Network) -> str | None:
        """Name of the bridge that takes the place of the network's parent; None: none does."""
        return None

    def default_port(self, vni: Vni) -> int:
        """UDP port of a network whose creator chooses none."""
        return VXLAN_PORT

    def ports(self, network: Network, *, kernel_vxlan: bool) -> TunnelPorts:
        """The UDP ports that the network wants on a host.

        Args:
            kernel_vxlan: whether the host's kernel has VXLAN.
        """
        return TunnelPorts()

    def option_of_port(self, network: Network, port: int) -> str:
        """The option of ``network create`` that decides about one of the network's ports."""
        return Setting.PORT

    def userspace_vtep(self, network: Network) -> str | None:
        """The link that the network's userspace VTEP serves; None: it has none."""
        return None

    def datapath_of(self, host: Host) -> Datapath | None:
        """What forwards a host's packets to others; None: no tunnel leads to them."""
        return None

    def path_to(self, network: Network, peer: Peer, underlay: Underlay, *, fallen: bool) -> str:
        """The name of the path by which packets to a peer leave this host.

        Args:
            fallen: whether the peer is reached by the fallback now.
        """
        return self.mode

    def may_fall(self, network: Network, peer: Peer, underlay: Underlay) -> bool:
        """Whether a peer may need the network's fallback, and so is probed."""
        return False
