"""What the modes with endpoints on the physical network share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.backends import Addressing, Backend, Blocked, Setting
from meshnet.errors import UsageError
from meshnet.text import IFNAME_PATTERN

if TYPE_CHECKING:
    from meshnet.backends import NetworkInput, Underlay
    from meshnet.model import IpNetwork, Network


class PhysicalBackend(Backend):
    """A mode with endpoints on the physical network, which reaches other hosts' by itself."""

    addressing = Addressing.POOL
    settings = frozenset({Setting.PARENT, Setting.RANGE, Setting.GATEWAY})

    def check(self, network: Network) -> None:
        """Refuse a missing parent, and gateways and ranges outside the network's CIDRs."""
        _check_parent(network)
        for setting, versions in (
            (Setting.RANGE, [r.version for r in network.ranges]),
            (Setting.GATEWAY, [g.version for g in network.gateways]),
        ):
            if len(versions) > len(set(versions)):
                raise UsageError(
                    f"network {network.name} has more than one {setting} for an IP version: give "
                    "at most one for each"
                )
        _check_gateways(network)
        _check_ranges(network)

    def blocked(self, network: Network, underlay: Underlay, takeover: str | None) -> Blocked | None:
        """Refused where the host is not on the physical network."""
        reason = missing_parent(network, underlay)
        return Blocked(reason, refused=True) if reason is not None else None


def missing_parent(network: Network, underlay: Underlay) -> str | None:
    """Why this host cannot take part in a network: it is not on the physical network."""
    if network.parent in underlay.links:
        return None
    return (
        f"link {network.parent}, its --parent, does not exist on this host: create it, or give "
        "that name to the host's link on the physical network"
    )


def endpoint_mtu(wanted: NetworkInput, uplink: str) -> tuple[int, tuple[str, ...]]:
    """MTU of endpoints on a link of the host, and any problem with it, in words."""
    wanted_bytes, link_bytes = wanted.network.mtu_bytes, wanted.underlay.links[uplink].mtu_bytes
    if wanted_bytes is None or wanted_bytes <= link_bytes:
        return wanted_bytes or link_bytes, ()
    problem = (
        f"MTU {wanted_bytes} is larger than the {link_bytes} of link {uplink}: raise the link's, "
        "or create the network with a smaller --mtu"
    )
    return link_bytes, (problem,)


def _check_parent(network: Network) -> None:
    if network.parent is None or not IFNAME_PATTERN.fullmatch(network.parent):
        reason = f"{network.parent!r} is not a link name" if network.parent else "none is given"
        raise UsageError(
            f"mode {network.mode} needs --parent, the hosts' link on the physical network, such as "
            f"eth0: {reason}"
        )


def _check_gateways(network: Network) -> None:
    for gateway in network.gateways:
        if not any(gateway in cidr for cidr in network.subnets):
            raise UsageError(
                f"gateway {gateway} is not within {', '.join(map(str, network.subnets))}: give the "
                "router of the physical network"
            )


def _check_ranges(network: Network) -> None:
    cidrs: dict[int, IpNetwork] = {c.version: c for c in network.subnets}
    for addresses in network.ranges:
        cidr = cidrs.get(addresses.version)
        within = cidr is not None and addresses.first in cidr and addresses.last in cidr
        if not within or int(addresses.first) > int(addresses.last):
            what = f"is not within {', '.join(map(str, network.subnets))}"
            raise UsageError(
                f"range {addresses} {'ends before it begins' if within else what}: give the first "
                "and the last address for endpoints, such as 192.0.2.100-192.0.2.199"
            )
