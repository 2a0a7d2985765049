"""Which route the kernel would take to an underlay address (``RTM_GETROUTE`` with one address).

The answer is the route as it is configured (``RTM_F_FIB_MATCH``), so that the many peers behind one
route share one answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.kernel.wire import bulk, rtnl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.state import PackedIp

RTM_F_FIB_MATCH = 0x2000
RTAX_MTU = 2
_SHAPES = bulk.shapes("8BI HH{n}s")


def encode_route_lookups(addresses: Iterable[PackedIp], first: int) -> list[bytes]:
    """Ask which routes the kernel would take; the answers are the routes as configured."""
    messages = []
    for sequence, address in enumerate(addresses, first):
        size = len(address)
        shape = _SHAPES[size]
        messages.append(shape.pack(
            shape.size, rtnl.RTM_GETROUTE, rtnl.NLM_F_REQUEST, sequence, 0,
            bulk.family_of(address), size * 8, 0, 0, 0, 0, 0, 0, RTM_F_FIB_MATCH,
            4 + size, bulk.RTA_DST, address,
        ))  # fmt: skip
    return messages


def decode_route_lookup(data: bytes) -> tuple[int, bool, int] | None:
    """Output ifindex, whether it is on-link, MTU metric (0: none); None: there is no route."""
    if len(data) < rtnl.RTMSG.size:
        return None
    kind = rtnl.RTMSG.unpack_from(data)[7]
    attrs = rtnl.parse_attrs(data, 12, len(data))
    if kind != bulk.RTN_UNICAST or bulk.RTA_OIF not in attrs:
        return None
    metrics = attrs.get(bulk.RTA_METRICS, b"")
    mtu_bytes = rtnl.number_in(rtnl.parse_attrs(metrics, 0, len(metrics)), RTAX_MTU)
    return rtnl.number_in(attrs, bulk.RTA_OIF), bulk.RTA_GATEWAY not in attrs, mtu_bytes
