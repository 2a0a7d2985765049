"""Connection tracking: making UDP flows to ports of this host look for their way anew.

The kernel translates the first packet of a flow and remembers it for the rest.  A client that never
pauses would therefore go on to where a port led before it was published, or to whom it was
published last.  TCP needs none of this: a connection is either open, and goes on, or is made anew.

ctnetlink by ``struct``: linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from meshnet.kernel import links, rtnl
from meshnet.model import Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from meshnet.model import IpAddress
    from meshnet.ports import Binding

_NETLINK_NETFILTER = 12
_NFGENMSG = struct.Struct("!BBH")  # family, version, resource
_IPCTNL_MSG_CT_NEW, _IPCTNL_MSG_CT_GET, _IPCTNL_MSG_CT_DELETE = 0x100, 0x101, 0x102
_CTA_TUPLE_ORIG, _CTA_FILTER = 1, 25
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP_DST = {4: 2, 6: 4}
_CTA_PROTO_NUM, _CTA_PROTO_DST_PORT = 1, 3
_CTA_FILTER_ORIG_FLAGS, _CTA_FILTER_REPLY_FLAGS = 1, 2
_FILTER_BY_PROTO_NUM, _FILTER_BY_DST_PORT = 1 << 3, 1 << 5
_NESTED = 0x8000
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


class _Flow(NamedTuple):
    """A flow as its first packet was, and the attribute that names it."""

    protocol: int
    address: IpAddress
    port: int
    tuple_bytes: bytes


def forget_udp_flows(bindings: Collection[Binding]) -> int:
    """Forget the flows to some ports of the calling thread's network namespace.

    Packets that are on their way are translated by the rules as they are now; none is lost.

    Returns:
        How many were forgotten.

    Raises:
        OSError: the kernel refused.
    """
    own = _own_addresses()
    forgotten = 0
    with contextlib.closing(_Conntrack()) as table:
        for binding in (b for b in bindings if b.protocol is Protocol.UDP):
            version, wanted = binding.address.version, binding.address
            for flow in table.udp_flows(version, binding.port):
                local = flow.address.is_loopback or flow.address in own
                if flow.address == wanted or (wanted.is_unspecified and local):
                    forgotten += table.forget(version, flow)
    return forgotten


def _own_addresses() -> set[IpAddress]:
    with contextlib.closing(rtnl.RtnlSocket()) as opened:
        messages = opened.dump(rtnl.RTM_GETADDR, links.address_dump())
    return {ip_address(links.decode_address(m).address) for m in messages}


class _Conntrack:
    """A netlink socket to the table."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.settimeout(30)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def udp_flows(self, version: int, port: int) -> list[_Flow]:
        """The UDP flows of an IP version whose first packet went to a port."""
        wanted = rtnl.attr(_CTA_PROTO_NUM, bytes([socket.IPPROTO_UDP]))
        wanted += rtnl.attr(_CTA_PROTO_DST_PORT, port.to_bytes(2, "big"))
        filtered = rtnl.U32.pack(_FILTER_BY_PROTO_NUM | _FILTER_BY_DST_PORT)
        body = _nested(_CTA_TUPLE_ORIG, _nested(_CTA_TUPLE_PROTO, wanted)) + _nested(
            _CTA_FILTER,
            rtnl.attr(_CTA_FILTER_ORIG_FLAGS, filtered)
            + rtnl.attr(_CTA_FILTER_REPLY_FLAGS, rtnl.U32.pack(0)),
        )
        self._send(version, _IPCTNL_MSG_CT_GET, rtnl.NLM_F_DUMP, body)
        found = [_decode(m, version) for m in self._answers() if m.kind == _IPCTNL_MSG_CT_NEW]
        # Kernels before 5.8 know no filter, and dump all there is.
        return [f for f in found if (f.protocol, f.port) == (socket.IPPROTO_UDP, port)]

    def forget(self, version: int, flow: _Flow) -> bool:
        """Forget a flow; whether it was still there."""
        body = rtnl.attr(_CTA_TUPLE_ORIG | _NESTED, flow.tuple_bytes)
        self._send(version, _IPCTNL_MSG_CT_DELETE, rtnl.NLM_F_ACK, body)
        try:
            list(self._answers())
        except FileNotFoundError:
            return False
        return True

    def _send(self, version: int, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        header = _NFGENMSG.pack(_FAMILY[version], 0, 0)
        self._socket.send(
            rtnl.pack_request(rtnl.Request(kind, flags, header + body), self._sequence)
        )

    def _answers(self) -> Iterator[rtnl.Message]:
        """All that the kernel says to the last request.

        Raises:
            OSError: it refused.
        """
        while True:
            for message in rtnl.split_messages(self._socket.recv(rtnl.RECEIVE_BYTES)):
                if message.kind == rtnl.NLMSG_ERROR:
                    code = -rtnl.NLMSGERR.unpack_from(message.data, message.start)[0]
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                if message.kind == rtnl.NLMSG_DONE:
                    return
                yield message


def _nested(kind: int, payload: bytes) -> bytes:
    return rtnl.attr(kind | _NESTED, payload)


def _decode(message: rtnl.Message, version: int) -> _Flow:
    found = rtnl.parse_attrs(message.data, message.start + _NFGENMSG.size, message.end)
    raw = found[_CTA_TUPLE_ORIG]
    parts = rtnl.parse_attrs(raw, 0, len(raw))
    ip, proto = parts[_CTA_TUPLE_IP], parts[_CTA_TUPLE_PROTO]
    transport = rtnl.parse_attrs(proto, 0, len(proto))
    return _Flow(
        transport[_CTA_PROTO_NUM][0],
        ip_address(rtnl.parse_attrs(ip, 0, len(ip))[_CTA_IP_DST[version]]),
        int.from_bytes(transport.get(_CTA_PROTO_DST_PORT, b""), "big"),
        raw,
    )
