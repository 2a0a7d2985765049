"""Connection tracking: making flows be treated as the present rules say.

The kernel translates the first packet of a flow and does the same to the rest.  A client that never
pauses would therefore keep sending to where a published port led before: to the host, or to the
endpoint that it was published for last.  And what began while somebody had flushed our tables would
stay untranslated (`meshnet.firewall.flows`).  Nothing is lost with such an entry: the next packet
makes a new one.

ctnetlink by ``struct``: linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from meshnet.firewall.flows import Direction, Flow, FlowRules
from meshnet.kernel.wire import links, rtnl
from meshnet.kernel.wire.nftnl import NETLINK_NETFILTER
from meshnet.model import Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from meshnet.firewall import Firewall
    from meshnet.ports import Binding
    from meshnet.state import ElementKey, PackedIp

IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE = 0x100, 0x101, 0x102
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_ZONE, CTA_FILTER = 1, 2, 3, 18, 25
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_SRC, CTA_IP_DST = {4: 1, 6: 3}, {4: 2, 6: 4}
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS = 1, 2
CTA_FILTER_F_CTA_PROTO_NUM, CTA_FILTER_F_CTA_PROTO_DST_PORT = 1 << 3, 1 << 5
_NFGENMSG = struct.Struct(">BBH")  # family, version, resource
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


class _Entry(NamedTuple):
    """A flow, and the attribute that identifies it."""

    flow: Flow
    identity: bytes


def forget_udp_flows(bindings: Collection[Binding]) -> int:
    """Forget the flows to some ports of the calling thread's network namespace.

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
            for entry in _dump(table, version, _filter_udp(binding.port)):
                to = entry.flow.original
                address = ip_address(to.destination)
                # Kernels before 5.8 ignore the filter, and dump everything.
                if (entry.flow.protocol, to.port) != (socket.IPPROTO_UDP, binding.port):
                    continue
                local = address.is_loopback or to.destination in own
                if address == wanted or (wanted.is_unspecified and local):
                    requests.append(_encode_delete(version, entry))
        return _delete(table, requests)


def forget_wrong_flows(firewall: Firewall, elements: Mapping[ElementKey, bytes]) -> int:
    """Forget the flows that our tables, as loaded now, would treat otherwise.

    Returns:
        How many were forgotten.

    Raises:
        OSError: the kernel refused.
    """
    rules = FlowRules(firewall, elements, _own_addresses())
    with contextlib.closing(rtnl.RtnlSocket(protocol=NETLINK_NETFILTER)) as table:
        wrong = [
            _encode_delete(version, entry)
            for version in (4, 6)
            for entry in _dump(table, version)
            if rules.is_wrong(entry.flow)
        ]
        return _delete(table, wrong)


def _own_addresses() -> set[PackedIp]:
    with contextlib.closing(rtnl.RtnlSocket()) as opened:
        messages = opened.dump(rtnl.RTM_GETADDR, links.address_dump())
    return {info.address for info in links.decode_addresses(messages)}


def _filter_udp(port: int) -> bytes:
    """Has the kernel dump only UDP flows whose first packet went to a port."""
    wanted = rtnl.attr(CTA_PROTO_NUM, bytes([socket.IPPROTO_UDP]))
    wanted += rtnl.attr(CTA_PROTO_DST_PORT, port.to_bytes(2, "big"))
    flags = rtnl.U32.pack(CTA_FILTER_F_CTA_PROTO_NUM | CTA_FILTER_F_CTA_PROTO_DST_PORT)
    return rtnl.nested_attr(
        CTA_TUPLE_ORIG, rtnl.nested_attr(CTA_TUPLE_PROTO, wanted)
    ) + rtnl.nested_attr(
        CTA_FILTER,
        rtnl.attr(CTA_FILTER_ORIG_FLAGS, flags)
        + rtnl.attr(CTA_FILTER_REPLY_FLAGS, rtnl.U32.pack(0)),
    )


def _dump(table: rtnl.RtnlSocket, version: int, filtered: bytes = b"") -> Iterator[_Entry]:
    """The flows of an IP version; not those of zones, which somebody else's rules made."""
    body = _head(version) + filtered
    for message in table.dump(IPCTNL_MSG_CT_GET, body, answer=IPCTNL_MSG_CT_NEW):
        data, start, end = message
        attrs = rtnl.parse_attrs(data, start + _NFGENMSG.size, end)
        if CTA_ZONE not in attrs:
            yield _decode(attrs, version)


def _decode(attrs: Mapping[int, bytes], version: int) -> _Entry:
    protocol, original = _decode_direction(attrs[CTA_TUPLE_ORIG], version)
    _, reply = _decode_direction(attrs[CTA_TUPLE_REPLY], version)
    status = int.from_bytes(attrs.get(CTA_STATUS, b""), "big")
    return _Entry(Flow(protocol, status, original, reply), attrs[CTA_TUPLE_ORIG])


def _decode_direction(raw: bytes, version: int) -> tuple[int, Direction]:
    parts = rtnl.parse_attrs(raw, 0, len(raw))
    ip, proto = parts[CTA_TUPLE_IP], parts[CTA_TUPLE_PROTO]
    addresses = rtnl.parse_attrs(ip, 0, len(ip))
    transport = rtnl.parse_attrs(proto, 0, len(proto))
    return transport[CTA_PROTO_NUM][0], Direction(
        addresses[CTA_IP_SRC[version]],
        addresses[CTA_IP_DST[version]],
        int.from_bytes(transport.get(CTA_PROTO_SRC_PORT, b""), "big"),
        int.from_bytes(transport.get(CTA_PROTO_DST_PORT, b""), "big"),
    )


def _encode_delete(version: int, entry: _Entry) -> rtnl.Request:
    body = _head(version) + rtnl.nested_attr(CTA_TUPLE_ORIG, entry.identity)
    return rtnl.Request(IPCTNL_MSG_CT_DELETE, 0, body)


def _delete(table: rtnl.RtnlSocket, requests: list[rtnl.Request]) -> int:
    errors = table.send_batch(requests)
    for error in errors.values():
        if error.errno != errno.ENOENT:  # otherwise it ended by itself
            raise OSError(error.errno, str(error))
    return len(requests) - len(errors)


def _head(version: int) -> bytes:
    return _NFGENMSG.pack(_FAMILY[version], 0, 0)
