"""What an attach asks for, what it needs of a network, and what is refused at once.

Values and checks only: `meshnet_agent.endpoints.attach` attaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshnet.backends import Addressing
from meshnet.backends.table import addressing_of
from meshnet.errors import PolicyRefusedError, UsageError
from meshnet.ipam import gateway_of
from meshnet.state import LinkKind
from meshnet.text import IFNAME_PATTERN, check_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.model import IpAddress, IpInterface, IpNetwork, Network, PublishedPort


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRequest:
    """What a sandbox is to be attached to, and as what."""

    network: str
    ifname: str = "eth0"
    ip: IpAddress | None = None
    name: str | None = None
    default_route: bool = True
    publish: tuple[PublishedPort, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyNetwork:
    """A network that is up on this host."""

    network: Network
    subnets: Sequence[IpNetwork]
    uplink: str
    mtu_bytes: int
    endpoint_link: LinkKind = LinkKind.VETH
    gso_max_bytes: int | None = None


def inner_routes(ready: ReadyNetwork) -> list[IpNetwork]:
    """The network's CIDRs, except one that is this host's subnet: that is on-link."""
    return [cidr for cidr in ready.network.subnets if cidr not in ready.subnets]


def gateways_of(network: Network, addresses: Sequence[IpInterface]) -> tuple[IpAddress, ...]:
    """The gateways by which the namespace leaves the network."""
    if addressing_of(network) is not Addressing.POOL:
        return tuple(gateway_of(a.network) for a in addresses)
    routers = {} if network.internal else {g.version: g for g in network.gateways}
    return tuple(routers[a.version] for a in addresses if a.version in routers)


def check_names(request: AttachRequest) -> None:
    """Refuse names that no link or endpoint can have.

    Raises:
        UsageError: the message says which, and what would do.
    """
    # Linux refuses "." and ".." (dev_valid_name), and each namespace already has lo.
    if not IFNAME_PATTERN.fullmatch(request.ifname) or request.ifname in (".", "..", "lo"):
        raise UsageError(
            f"interface name {request.ifname!r} is not usable: take 1 to 15 letters, digits, '_', "
            "'.' or '-', such as eth0"
        )
    if request.name is not None:
        check_name("endpoint", request.name)


def check_publishable(network: Network) -> None:
    """Refuse to publish ports of a network that nobody enters by its hosts.

    Raises:
        UsageError: its endpoints are on the physical network.
        PolicyRefusedError: it is internal.
    """
    if addressing_of(network) is Addressing.POOL:
        raise UsageError(
            f"network {network.name} has mode {network.mode}, so its endpoints are reached by "
            "their own addresses on the physical network: leave --publish out"
        )
    if network.internal:
        raise PolicyRefusedError(
            f"network {network.name} is internal, so nothing may enter it from outside: publish on "
            "another network of the process"
        )
