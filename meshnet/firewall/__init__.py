"""The firewall: what our nftables tables hold, as values and as text (docs/firewall.md).

The values here say what the tables should do; they are planned, compared and remembered.  `rules`
renders them as the skeleton (chains, rules, counters and empty named sets), which changes only with
the networks.  `elements` fills the sets: a few elements for each endpoint, published port and
member, which come and go one by one and are compared like every other object of the kernel.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.model import IpAddress, IpNetwork


class FirewallNetwork(NamedTuple):
    """What the rules need to know of one network.

    Attributes:
        links: names of its links on this host that packets are routed through: bridge, tunnel
            devices.
        ports: UDP ports of its tunnels.
        cidrs: the whole network.
        subnets: this host's part of it.
        vni: VNI of its tunnels.
        internal: whether no packet may enter or leave the network.
        direct: whether peers' packets may arrive without a tunnel.
    """

    links: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    cidrs: tuple[IpNetwork, ...] = ()
    subnets: tuple[IpNetwork, ...] = ()
    vni: int = 0
    internal: bool = False
    direct: bool = False


class Firewall(NamedTuple):
    """What our tables do, without the elements of their sets.

    Attributes:
        networks: the networks that have links.
        underlay_ip: the address that this host's tunnels start from.
    """

    networks: tuple[FirewallNetwork, ...]
    underlay_ip: IpAddress


def firewall_for(networks: Iterable[FirewallNetwork], underlay_ip: IpAddress) -> Firewall:
    """What the tables should do for a host's networks.

    Networks without links are left out: rules that are always there check their endpoints.
    """
    return Firewall(tuple(network for network in networks if network.links), underlay_ip)


@dataclass(frozen=True, slots=True)
class Unknown:
    """Tables with our name, and rules that we do not know.  Never desired."""


UNKNOWN = Unknown()
