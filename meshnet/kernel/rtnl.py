"""rtnetlink messages of fixed layout, packed and parsed with ``struct``: the bulk path.

One request an object through a general library costs half a millisecond of Python; here hundreds
of messages go in one ``send`` and only the last asks for an acknowledgement (the kernel reports
any failure by sequence number all the same), see docs/design/bulk-netlink.md.

Host byte order unless said otherwise.  linux/netlink.h, linux/rtnetlink.h, linux/neighbour.h,
linux/nexthop.h, linux/if_link.h.  Imports no third-party library.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NLMSG_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
ATTR_HEADER = struct.Struct("=HH")  # length, type
IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, change
IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst, src, tos, table, protocol, scope, type, flags
NDMSG = struct.Struct("=BxxxiHBB")  # family, ifindex, state, flags, type
NHMSG = struct.Struct("=BBBxI")  # family, scope, protocol, flags
NLMSGERR = struct.Struct("=i")
U32 = struct.Struct("=I")

NLMSG_ERROR, NLMSG_DONE, NLMSG_OVERRUN = 2, 3, 4
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLM_F_DUMP = 0x300
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWNEXTHOP, RTM_DELNEXTHOP, RTM_GETNEXTHOP = 104, 105, 106

SOL_NETLINK = 270
NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 10, 11, 12
NLMSGERR_ATTR_MSG = 1
NLM_F_ACK_TLVS, NLM_F_CAPPED = 0x200, 0x100

BATCH_MESSAGES = 500
"""Messages a ``send``: bounds what the kernel may answer before we read."""
RECEIVE_BYTES = 256 * 1024


class KernelError(NamedTuple):
    """The kernel's word on one message: errno and, where it gave one, its own text."""

    errno: int
    message: str

    def __str__(self) -> str:
        text = os.strerror(self.errno)
        return f"{text} ({self.message})" if self.message else text


def attr(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    length = 4 + len(payload)
    return ATTR_HEADER.pack(length, kind) + payload + bytes(-length & 3)


def parse_attrs(data: bytes, start: int, end: int) -> dict[int, bytes]:
    """Attributes between two offsets by type, flag bits (nested, byte order) removed.

    A truncated attribute ends the parse; of a repeated one the last counts.
    """
    found: dict[int, bytes] = {}
    unpack = ATTR_HEADER.unpack_from
    while start + 4 <= end:
        length, kind = unpack(data, start)
        if length < 4 or start + length > end:
            break
        found[kind & 0x3FFF] = data[start + 4 : start + length]
        start += (length + 3) & ~3
    return found


class Message(NamedTuple):
    """One message: its type, flags, sender, and where its body lies in `data`."""

    kind: int
    flags: int
    sequence: int
    port_id: int
    data: bytes
    start: int
    end: int


def split_messages(data: bytes) -> Iterator[Message]:
    """The messages of one datagram; a truncated one ends it."""
    start, size = 0, len(data)
    unpack = NLMSG_HEADER.unpack_from
    while start + 16 <= size:
        length, kind, flags, sequence, port_id = unpack(data, start)
        if length < 16 or start + length > size:
            return
        yield Message(kind, flags, sequence, port_id, data, start + 16, start + length)
        start += (length + 3) & ~3


class Request(NamedTuple):
    """A message to send: everything behind the netlink header, and its type and flags."""

    kind: int
    flags: int
    body: bytes


class RtnlSocket:
    """A blocking NETLINK_ROUTE socket of the calling thread's network namespace.

    Every answer is waited for at most `timeout_s` seconds (the kernel answers at once; this is
    for bugs, not for load).
    """

    def __init__(self, timeout_s: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.bind((0, 0))
            for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
                self._socket.setsockopt(SOL_NETLINK, option, 1)
            # Kernels before 4.20 do not filter dumps; the decoders check everything again.
            with contextlib.suppress(OSError):
                self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
            # Room for a batch in which every message fails.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    @property
    def port_id(self) -> int:
        """The socket's netlink address: the sender of the notifications that it causes."""
        return int(self._socket.getsockname()[0])

    def dump(self, kind: int, body: bytes) -> Iterator[Message]:
        """All messages of a dump; repeated from the start when the tables changed under it.

        Raises:
            OSError: the kernel refused the dump (errno says why).
            InterruptedError: ten dumps in a row were interrupted by changes.
        """
        for _ in range(10):
            messages, interrupted = self._dump_once(kind, body)
            if not interrupted:
                return iter(messages)
        raise InterruptedError(errno.EINTR, f"dump of type {kind} was interrupted ten times")

    def _dump_once(self, kind: int, body: bytes) -> tuple[list[Message], bool]:
        self._sequence += 1
        sequence = self._sequence
        header = NLMSG_HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, sequence, 0)
        self._socket.send(header + body)
        messages: list[Message] = []
        interrupted = False
        while True:
            for message in split_messages(self._socket.recv(RECEIVE_BYTES)):
                if message.sequence != sequence:
                    continue  # the tail of a dump that was given up
                interrupted = interrupted or bool(message.flags & NLM_F_DUMP_INTR)
                if message.kind == NLMSG_DONE:
                    return messages, interrupted
                if message.kind == NLMSG_ERROR:
                    error = _parse_error(message)
                    if error.errno == errno.EINTR:
                        return [], True
                    raise OSError(error.errno, str(error))
                messages.append(message)

    def send_batch(self, requests: Sequence[Request]) -> dict[int, KernelError]:
        """Send requests in batches; returns the errors by index.  Answers are waited for."""
        errors: dict[int, KernelError] = {}
        for first in range(0, len(requests), BATCH_MESSAGES):
            for i, error in self._send(requests[first : first + BATCH_MESSAGES]).items():
                errors[first + i] = error
        return errors

    def _send(self, requests: Sequence[Request]) -> dict[int, KernelError]:
        base = self._sequence + 1
        self._sequence += len(requests)
        last = self._sequence
        parts: list[bytes] = []
        for sequence, (kind, flags, body) in enumerate(requests, base):
            ack = NLM_F_ACK if sequence == last else 0
            length = 16 + len(body)
            parts.append(NLMSG_HEADER.pack(length, kind, NLM_F_REQUEST | flags | ack, sequence, 0))
            parts.append(body + bytes(-length & 3))
        self._socket.send(b"".join(parts))
        errors: dict[int, KernelError] = {}
        while True:
            for message in split_messages(self._socket.recv(RECEIVE_BYTES)):
                if message.kind != NLMSG_ERROR or not base <= message.sequence <= last:
                    continue
                error = _parse_error(message)
                if error.errno:
                    errors[message.sequence - base] = error
                if message.sequence == last:
                    return errors

    def ask(self, requests: Sequence[Request]) -> list[Message | KernelError]:
        """Send requests that each have one message for an answer, or an error."""
        answers: list[Message | KernelError] = []
        for first in range(0, len(requests), BATCH_MESSAGES):
            answers += self._ask(requests[first : first + BATCH_MESSAGES])
        return answers

    def _ask(self, requests: Sequence[Request]) -> list[Message | KernelError]:
        base = self._sequence + 1
        self._sequence += len(requests)
        data = b"".join(
            NLMSG_HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | flags, sequence, 0) + body
            for sequence, (kind, flags, body) in enumerate(requests, base)
        )
        self._socket.send(data)
        answers: dict[int, Message | KernelError] = {}
        while len(answers) < len(requests):
            for message in split_messages(self._socket.recv(RECEIVE_BYTES)):
                if base <= message.sequence < base + len(requests):
                    failed = message.kind == NLMSG_ERROR
                    answers[message.sequence] = _parse_error(message) if failed else message
        return [answers[base + i] for i in range(len(requests))]


def _parse_error(message: Message) -> KernelError:
    """NLMSG_ERROR: negative errno (0: acknowledgement), the request's header, attributes."""
    code = -NLMSGERR.unpack_from(message.data, message.start)[0]
    text = ""
    if code and message.flags & NLM_F_ACK_TLVS:
        skip = 4 + 16
        if not message.flags & NLM_F_CAPPED:
            skip += NLMSG_HEADER.unpack_from(message.data, message.start + 4)[0] - 16
        raw = parse_attrs(message.data, message.start + skip, message.end).get(NLMSGERR_ATTR_MSG)
        text = raw.rstrip(b"\0").decode(errors="replace") if raw else ""
    return KernelError(code, text)
