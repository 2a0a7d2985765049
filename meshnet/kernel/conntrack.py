"""Connection tracking: making UDP flows to ports of this host be translated again.

The kernel translates the first packet of a flow and does the same to the rest.  A client that never
pauses would therefore keep sending to where the port led before: to the host, or to the endpoint
that it was published for last.  TCP does not need this: a connection goes on, or a new one is made.

ctnetlink by ``struct``: linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from meshnet.kernel.wire import links, rtnl
from meshnet.kernel.wire.nftnl import NETLINK_NETFILTER
from meshnet.model import Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

    from meshnet.kernel.wire.rtnl import Body
    from meshnet.model import IpAddress
    from meshnet.ports import Binding

IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE = 0x100, 0x101, 0x102
CTA_TUPLE_ORIG, CTA_FILTER = 1, 25
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_DST = {4: 2, 6: 4}
CTA_PROTO_NUM, CTA_PROTO_DST_PORT = 1, 3
CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS = 1, 2
CTA_FILTER_F_CTA_PROTO_NUM, CTA_FILTER_F_CTA_PROTO_DST_PORT = 1 << 3, 1 << 5
_NFGENMSG = struct.Struct(">BBH")  # family, version, resource
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


class _Flow(NamedTuple):
    """A flow, described by its first packet, and the attribute that identifies it."""

    protocol: int
    address: IpAddress
    port: int
    tuple_bytes: bytes


def forget_udp_flows(bindings: Collection[Binding]) -> int:
    """Forget the flows to some ports of the calling thread's network namespace.

    Nothing is lost: the next packet of a flow starts a new one, which the present rules translate.

    Returns:
        How many were forgotten.

    Raises:
        OSError: the kernel refused.
    """
    # A flow that is routed to another host's port of the same number must be left alone.
    own = _own_addresses()
    requests: list[rtnl.Request] = []
    with contextlib.closing(rtnl.RtnlSocket(protocol=NETLINK_NETFILTER)) as table:
        for binding in (b for b in bindings if b.protocol is Protocol.UDP):
            version, wanted = binding.address.version, binding.address
            for flow in _dump_udp(table, version, binding.port):
                local = flow.address.is_loopback or flow.address in own
                if flow.address == wanted or (wanted.is_unspecified and local):
                    requests.append(_encode_delete(version, flow))
        errors = table.send_batch(requests)
    for error in errors.values():
        if error.errno != errno.ENOENT:  # otherwise it ended by itself
            raise OSError(error.errno, str(error))
    return len(requests) - len(errors)


def _own_addresses() -> set[IpAddress]:
    with contextlib.closing(rtnl.RtnlSocket()) as opened:
        messages = opened.dump(rtnl.RTM_GETADDR, links.address_dump())
    return {ip_address(info.address) for info in links.decode_addresses(messages)}


def _dump_udp(table: rtnl.RtnlSocket, version: int, port: int) -> list[_Flow]:
    """The UDP flows of an IP version whose first packet went to a port."""
    wanted = rtnl.attr(CTA_PROTO_NUM, bytes([socket.IPPROTO_UDP]))
    wanted += rtnl.attr(CTA_PROTO_DST_PORT, port.to_bytes(2, "big"))
    flags = rtnl.U32.pack(CTA_FILTER_F_CTA_PROTO_NUM | CTA_FILTER_F_CTA_PROTO_DST_PORT)
    body = _head(version) + rtnl.nested_attr(
        CTA_TUPLE_ORIG, rtnl.nested_attr(CTA_TUPLE_PROTO, wanted)
    )
    body += rtnl.nested_attr(
        CTA_FILTER,
        rtnl.attr(CTA_FILTER_ORIG_FLAGS, flags)
        + rtnl.attr(CTA_FILTER_REPLY_FLAGS, rtnl.U32.pack(0)),
    )
    messages = table.dump(IPCTNL_MSG_CT_GET, body, answer=IPCTNL_MSG_CT_NEW)
    found = [_decode(message, version) for message in messages]
    # Kernels before 5.8 ignore the filter, and dump everything.
    return [f for f in found if (f.protocol, f.port) == (socket.IPPROTO_UDP, port)]


def _encode_delete(version: int, flow: _Flow) -> rtnl.Request:
    body = _head(version) + rtnl.nested_attr(CTA_TUPLE_ORIG, flow.tuple_bytes)
    return rtnl.Request(IPCTNL_MSG_CT_DELETE, 0, body)


def _head(version: int) -> bytes:
    return _NFGENMSG.pack(_FAMILY[version], 0, 0)


def _decode(body: Body, version: int) -> _Flow:
    data, start, end = body
    raw = rtnl.parse_attrs(data, start + _NFGENMSG.size, end)[CTA_TUPLE_ORIG]
    parts = rtnl.parse_attrs(raw, 0, len(raw))
    ip, proto = parts[CTA_TUPLE_IP], parts[CTA_TUPLE_PROTO]
    transport = rtnl.parse_attrs(proto, 0, len(proto))
    return _Flow(
        transport[CTA_PROTO_NUM][0],
        ip_address(rtnl.parse_attrs(ip, 0, len(ip))[CTA_IP_DST[version]]),
        int.from_bytes(transport.get(CTA_PROTO_DST_PORT, b""), "big"),
        raw,
    )
