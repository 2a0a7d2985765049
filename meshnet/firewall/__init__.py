"""The firewall: what our nftables tables hold, as values and as text (docs/firewall.md).

Here is what the tables are to do, as values: they are planned, compared and remembered.  `rules`
renders them as the skeleton: chains, rules, counters and named sets, which changes with the
networks.  `elements` is what is in the sets: one element or a few for each endpoint, publication
and member, which come and go one by one and are compared like every other object of the kernel.

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
        links: names of its links on this host that packets are routed by: bridge, tunnel devices.
        ports: UDP ports of its tunnels.
        cidrs: the whole network.
        subnets: this host's part of it.
        vni: of its tunnels.
        internal: nothing goes in or out.
        direct: peers' packets may arrive without a tunnel.
    """

    links: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    cidrs: tuple[IpNetwork, ...] = ()
    subnets: tuple[IpNetwork, ...] = ()
    vni: int = 0
    internal: bool = False
    direct: bool = False


class Firewall(NamedTuple):
    """What our tables do, but for the elements of their sets.

    Attributes:
        networks: those that have links.
        underlay_ip: where this host's tunnels start from.
    """

    networks: tuple[FirewallNetwork, ...]
    underlay_ip: IpAddress


def firewall_for(networks: Iterable[FirewallNetwork], underlay_ip: IpAddress) -> Firewall:
    """What the tables are to do for a host's networks.

    One without links is left out: its endpoints are checked by rules that are always there.
    """
    return Firewall(tuple(network for network in networks if network.links), underlay_ip)


@dataclass(frozen=True, slots=True)
class Unknown:
    """Tables that are ours by name, and do what we do not know.  Never desired."""


UNKNOWN = Unknown()
