"""Which flows the kernel does not treat as our rules say, because they are older than the rules.

Connection tracking translates the first packet of a flow and does the same to the rest.  A flow
that began while our tables were gone, or while a port led elsewhere, stays as it began for as long
as its client talks.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from meshnet.firewall.elements import find_published, pack_target
from meshnet.wire.inner import UDP

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from meshnet.firewall import Firewall
    from meshnet.model import IpNetwork
    from meshnet.state import ElementKey, PackedIp

IPS_SRC_NAT, IPS_DST_NAT = 1 << 4, 1 << 5
"""``linux/netfilter/nf_conntrack_common.h``."""


class Direction(NamedTuple):
    """How the packets of one direction of a flow look; ports are 0 where there are none."""

    source: PackedIp
    destination: PackedIp
    source_port: int = 0
    port: int = 0


class Flow(NamedTuple):
    """An entry of connection tracking.

    Attributes:
        status: bits ``IPS_…``.
        original: its first packet.
        reply: the answer to that, before it is translated back.
    """

    protocol: int
    status: int
    original: Direction
    reply: Direction


class FlowRules:
    """What our tables make of flows.

    Args:
        elements: of the tables' sets.
        own: addresses of the host.
    """

    def __init__(
        self,
        firewall: Firewall,
        elements: Mapping[ElementKey, bytes],
        own: Collection[PackedIp],
    ) -> None:
        self._own = frozenset(own)
        self._elements = elements
        networks = firewall.networks
        self._cidrs = _Ranges(c for n in networks for c in n.cidrs)
        self._subnets = _Ranges(s for n in networks for s in n.subnets)
        self._outward = _Ranges(s for n in networks if not n.internal for s in n.subnets)

    def is_wrong(self, flow: Flow) -> bool:
        """Whether the rules would have treated the flow's first packet otherwise.

        Of flows to the host only UDP's are looked at: there a TCP connection that is open may go on
        when its port is not published any more.
        """
        source, destination = flow.original.source, flow.original.destination
        if self._is_local(destination):
            return flow.protocol == UDP and self._leads_elsewhere(flow)
        if source in self._own:
            return False
        if source in self._outward and _is_outside(destination) and destination not in self._cidrs:
            return not flow.status & IPS_SRC_NAT
        # Nobody from outside may begin a flow to an endpoint, except to a published port.
        return destination in self._subnets and source not in self._cidrs

    def _leads_elsewhere(self, flow: Flow) -> bool:
        to, reply = flow.original, flow.reply
        target = find_published(self._elements, flow.protocol, to.destination, to.port)
        if target is not None:
            return pack_target(reply.source, reply.source_port) != target
        return bool(flow.status & IPS_DST_NAT) and reply.source in self._subnets

    def _is_local(self, destination: PackedIp) -> bool:
        return destination in self._own or (len(destination) == 4 and destination[0] == 127)


class _Ranges:
    """Whether a packed address is in one of some networks."""

    def __init__(self, networks: Iterable[IpNetwork]) -> None:
        self._found = {
            (n.max_prefixlen // 8, int(n.netmask), int(n.network_address)) for n in networks
        }

    def __contains__(self, address: PackedIp) -> bool:
        number = int.from_bytes(address, "big")
        return any(
            len(address) == size and number & mask == network for size, mask, network in self._found
        )


def _is_outside(destination: PackedIp) -> bool:
    """Whether an address is neither multicast nor broadcast."""
    return destination[0] < 224 if len(destination) == 4 else destination[0] != 0xFF
