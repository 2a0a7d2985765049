"""Netlink messages made by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.kernel.wire import rtnl

if TYPE_CHECKING:
    from meshnet.kernel.wire.rtnl import Body, Request


def datagram(kind: int, body: bytes, *, port_id: int = 0, sequence: int = 1) -> bytes:
    """One message as the kernel would send it."""
    header = rtnl.NLMSG_HEADER.pack(16 + len(body), kind, 0, sequence, port_id)
    return header + body + bytes(-len(body) & 3)


def body_of(request: Request) -> Body:
    """A request as if it came back in a dump: most have one layout both ways."""
    return dumped(datagram(request.kind, request.body))


def dumped(message: bytes) -> Body:
    """Where the body of the only message of a datagram lies."""
    (found,) = rtnl.split_messages(message)
    return found.data, found.start, found.end


def u32(kind: int, number: int) -> bytes:
    """An attribute that is a number."""
    return rtnl.attr(kind, rtnl.U32.pack(number))
