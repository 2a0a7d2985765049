"""Which networks exclude each other on a host."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from meshnet.backends.table import backend_of

if TYPE_CHECKING:
    from meshnet.model import Network

_REMOVE = "remove this network"


class Conflict(NamedTuple):
    """Why a host cannot have two networks at once.

    Attributes:
        problem: what both of them want.
        choose: the remedy while the network is being created.
        mend: the remedy once the network exists.
    """

    problem: str
    choose: str
    mend: str = _REMOVE


def find_conflict(network: Network, other: Network, *, kernel_vxlan: bool) -> Conflict | None:
    """Why a host cannot have a network beside an older one; None: it can.

    Args:
        kernel_vxlan: whether the host's kernel has VXLAN.
    """
    if other.vni == network.vni:
        return Conflict(
            f"VNI {network.vni} belongs to network {other.name}",
            "leave --vni out to get a free one",
        )
    taken = _find_taken_port(network, other, kernel_vxlan=kernel_vxlan)
    if taken is not None:
        option = backend_of(network).option_of_port(network, taken)
        return Conflict(
            f"UDP port {taken} is network {other.name}'s, and a userspace VTEP cannot share its "
            "port",
            f"choose another {option}",
            f"create this network again with another {option}",
        )
    if _want_one_link(network, other):
        return Conflict(
            f"link {network.parent} is network {other.name}'s", "choose another --parent"
        )
    for mine in network.subnets:
        for theirs in other.subnets:
            if mine.version == theirs.version and mine.overlaps(theirs):
                return Conflict(
                    f"subnet {mine} overlaps {theirs} of network {other.name}",
                    "choose another CIDR",
                )
    return None


def _find_taken_port(one: Network, other: Network, *, kernel_vxlan: bool) -> int | None:
    """A UDP port that both networks want on a host, at least one of them exclusively."""
    mine = backend_of(one).ports(one, kernel_vxlan=kernel_vxlan)
    theirs = backend_of(other).ports(other, kernel_vxlan=kernel_vxlan)
    taken = mine.exclusive & (theirs.exclusive | theirs.shared) | mine.shared & theirs.exclusive
    return min(taken, default=None)


def _want_one_link(one: Network, other: Network) -> bool:
    """Whether both want the same link of the hosts, and one of them all of it."""
    if one.parent is None or one.parent != other.parent:
        return False
    # Macvlans share a parent; a link that became a port of a bridge cannot also carry macvlans.
    return any(backend_of(n).takeover_bridge(n) is not None for n in (one, other))
