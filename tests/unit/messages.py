"""Netlink messages made by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.kernel import rtnl

if TYPE_CHECKING:
    from meshnet.kernel.rtnl import Message, Request


def datagram(kind: int, body: bytes, *, port_id: int = 0, sequence: int = 1) -> bytes:
    """One message as the kernel would send it."""
    header = rtnl.NLMSG_HEADER.pack(16 + len(body), kind, 0, sequence, port_id)
    return header + body + bytes(-len(body) & 3)


def message(request: Request) -> Message:
    """A request as if it came back in a dump: most have one layout both ways."""
    (found,) = rtnl.split_messages(datagram(request.kind, request.body))
    return found


def u32(kind: int, number: int) -> bytes:
    """An attribute that is a number."""
    return rtnl.attr(kind, rtnl.U32.pack(number))
