"""rtnetlink messages of fixed layout, packed and parsed with ``struct``: the bulk path.

With one request for each object, a general library takes half a millisecond of Python each.  Here
hundreds of messages go in one ``send``, and only an empty one at the end asks for an
acknowledgement: the kernel reports failures anyway (docs/design/bulk-netlink.md).

Host byte order unless stated otherwise.  linux/netlink.h, linux/rtnetlink.h, linux/neighbour.h,
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
    from collections.abc import Iterator, Mapping, Sequence

NLMSG_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
ATTR_HEADER = struct.Struct("=HH")  # length, type
NLA_F_NESTED = 0x8000
IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, change
IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst, src, tos, table, protocol, scope, type, flags
NDMSG = struct.Struct("=BxxxiHBB")  # family, ifindex, state, flags, type
NHMSG = struct.Struct("=BBBxI")  # family, scope, protocol, flags
NLMSGERR = struct.Struct("=i")
U32 = struct.Struct("=I")
_TIMEVAL = struct.Struct("@ll")

NLMSG_NOOP, NLMSG_ERROR, NLMSG_DONE = 1, 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLM_F_DUMP = 0x300
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWNETCONF = 80
AF_BRIDGE, RT_SCOPE_UNIVERSE = 7, 0
RTM_NEWNEXTHOP, RTM_DELNEXTHOP, RTM_GETNEXTHOP = 104, 105, 106

SOL_NETLINK = 270
_SO_RCVBUFFORCE = 33
NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 10, 11, 12
NLMSGERR_ATTR_MSG = 1
NLM_F_ACK_TLVS, NLM_F_CAPPED = 0x200, 0x100

_LEAST_BODY_BYTES = {
    RTM_NEWLINK: IFINFO.size,
    RTM_NEWADDR: IFADDR.size,
    RTM_NEWROUTE: RTMSG.size,
    RTM_NEWNEIGH: NDMSG.size,
    RTM_NEWNEXTHOP: NHMSG.size,
}
_MAX_ERRNO = 4095
"""MAX_ERRNO of linux/err.h."""
BATCH_MESSAGES = 500
"""Messages in one ``send``: bounds what the kernel may answer before we read, and so what the
receive buffer must hold."""
RECEIVE_BYTES = 256 * 1024
"""Larger than any datagram of a dump: a buffer that is too small would cut one short."""


Body = tuple[bytes, int, int]
"""Where in a datagram the body of a message lies: the datagram, start, end."""


class KernelError(NamedTuple):
    """The kernel's refusal of one message: errno and, if it gave one, an explanation."""

    errno: int
    message: str

    def __str__(self) -> str:
        text = os.strerror(self.errno)
        return f"{text} ({self.message})" if self.message else text


def attr(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    length = 4 + len(payload)
    return ATTR_HEADER.pack(length, kind) + payload + bytes(-length & 3)


def nested_attr(kind: int, payload: bytes) -> bytes:
    """One attribute that holds others (``NLA_F_NESTED``)."""
    return attr(kind | NLA_F_NESTED, payload)


def parse_attrs(data: bytes, start: int, end: int) -> dict[int, bytes]:
    """Attributes between two offsets by type, flag bits (nested, byte order) removed.

    A truncated attribute ends the parse; if one is repeated, the last counts.
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


def number_in(attrs: Mapping[int, bytes], kind: int) -> int:
    """An attribute that is a 32-bit number; 0 if it is missing or of another length."""
    raw = attrs.get(kind, b"")
    return int(U32.unpack(raw)[0]) if len(raw) == 4 else 0


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
    """The messages of one datagram, up to a truncated one."""
    start, size = 0, len(data)
    unpack = NLMSG_HEADER.unpack_from
    while start + 16 <= size:
        length, kind, flags, sequence, port_id = unpack(data, start)
        if length < 16 or start + length > size:
            return
        yield Message(kind, flags, sequence, port_id, data, start + 16, start + length)
        start += (length + 3) & ~3


class Request(NamedTuple):
    """A message to send: its type, its flags, and everything after the netlink header."""

    kind: int
    flags: int
    body: bytes


def pack_request(request: Request, sequence: int) -> bytes:
    """A whole message."""
    kind, flags, body = request
    length = 16 + len(body)
    header = NLMSG_HEADER.pack(length, kind, NLM_F_REQUEST | flags, sequence, 0)
    return header + body + bytes(-length & 3)


def set_receive_buffer(target: socket.socket, size_bytes: int) -> None:
    """Set the size of a receive buffer; without privileges ``net.core.rmem_max`` limits it."""
    try:
        target.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size_bytes)
    except PermissionError:  # root of a container that is not root of the machine
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)


class RtnlSocket:
    """A blocking netlink socket of the calling thread's network namespace.

    Args:
        timeout_s: how long to wait for each answer.  The kernel answers at once: this is for bugs,
            not for load.
        protocol: NETLINK_ROUTE, or the protocol of another part of the kernel.
    """

    def __init__(self, timeout_s: float = 30.0, *, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        try:
            # The kernel's own timeout: Python's costs a poll(2) before each recv(2).
            seconds, rest = divmod(timeout_s, 1)
            timeout = _TIMEVAL.pack(int(seconds), int(rest * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
            self._socket.bind((0, 0))
            # Errors without a copy of the request, but with the kernel's explanation.
            for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
                self._socket.setsockopt(SOL_NETLINK, option, 1)
            # Kernels before 4.20 do not filter dumps; the decoders check everything again.
            with contextlib.suppress(OSError):
                self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
            set_receive_buffer(self._socket, 4 << 20)  # for a batch in which every message fails
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    @property
    def port_id(self) -> int:
        """The socket's netlink address: the sender of the notifications that it causes."""
        return int(self._socket.getsockname()[0])

    @property
    def next_sequence(self) -> int:
        """The sequence number that the next message to send must have."""
        return self._sequence + 1

    def dump(self, kind: int, body: bytes, *, answer: int | None = None) -> list[Body]:
        """All messages of a dump, which starts over if the tables changed under it.

        Args:
            answer: type of the answering messages; None: RTM_NEW… for RTM_GET…, which is 2 less.

        Raises:
            OSError: the kernel refused the dump (errno says why), or its answer is malformed.
            InterruptedError: ten dumps in a row were interrupted by changes.
        """
        for _ in range(10):
            found = self._dump_once(kind, body, kind - 2 if answer is None else answer)
            if found is not None:
                return found
        raise InterruptedError(errno.EINTR, f"dump of type {kind} was interrupted ten times")

    def _dump_once(self, kind: int, body: bytes, answer: int) -> list[Body] | None:
        """All messages of a dump; None: it was interrupted."""
        sequence = self.next_sequence
        self._sequence = sequence
        self._socket.send(pack_request(Request(kind, NLM_F_DUMP, body), sequence))
        least = 16 + _LEAST_BODY_BYTES.get(answer, 0)
        found: list[Body] = []
        interrupted = False
        unpack = NLMSG_HEADER.unpack_from
        while True:
            data = self._receive()
            start, size = 0, len(data)
            # Written out rather than with `split_messages`: this is the inner loop of a resync.
            while start + 16 <= size:
                length, got, flags, number, _ = unpack(data, start)
                end = start + length
                if length < 16 or end > size:
                    break
                # Another number: the tail of a dump that was given up after an error.
                if number == sequence:
                    if flags & NLM_F_DUMP_INTR:
                        # Read to the end all the same: what is left would meet the next dump.
                        interrupted = True
                    if got == answer:
                        if length < least:
                            raise _malformed()
                        found.append((data, start + 16, end))
                    elif got == NLMSG_DONE:
                        code = _read_errno(data, start + 16) if end > start + 19 else 0
                        if interrupted or code == errno.EINTR:
                            return None
                        # ENOENT: a table that was never made, as good as an empty one.
                        if code > 0 and code != errno.ENOENT:
                            raise OSError(code, os.strerror(code))
                        return found
                    elif got == NLMSG_ERROR:
                        error = _parse_error(data, start + 16, end, flags)
                        if error.errno == errno.EINTR:
                            return None
                        raise OSError(error.errno, str(error))
                start += (length + 3) & ~3

    def send_batch(self, requests: Sequence[Request]) -> dict[int, KernelError]:
        """Send requests; see `send_packed`."""
        return self.send_packed(
            [pack_request(request, i) for i, request in enumerate(requests, self.next_sequence)]
        )

    def send_packed(self, messages: Sequence[bytes]) -> dict[int, KernelError]:
        """Send whole messages, numbered from `next_sequence` on; returns the errors by index."""
        base = self.next_sequence
        errors: dict[int, KernelError] = {}
        for first in range(0, len(messages), BATCH_MESSAGES):
            for sequence, error in self._send(messages[first : first + BATCH_MESSAGES]).items():
                errors[sequence - base] = error
        return errors

    def _send(self, messages: Sequence[bytes]) -> dict[int, KernelError]:
        """Send one batch; returns the errors by sequence number."""
        base = self.next_sequence
        self._sequence += len(messages)
        # The kernel works through a batch in order and reports every error, asked or not.  So the
        # acknowledgement of this last, empty message says that all the others are done.
        end = pack_request(Request(NLMSG_NOOP, NLM_F_ACK, b""), self._sequence)
        self._socket.send(b"".join(messages) + end)
        errors: dict[int, KernelError] = {}
        while True:
            for message in split_messages(self._receive()):
                if message.kind != NLMSG_ERROR or not base <= message.sequence <= self._sequence:
                    continue
                error = _parse_error(message.data, message.start, message.end, message.flags)
                if not error.errno:
                    return errors
                errors[message.sequence] = error

    def transact(
        self, begin: Request, requests: Sequence[Request], end: Request
    ) -> dict[int, KernelError]:
        """Send a transaction (nfnetlink's batch): all of it or nothing.

        Returns:
            The errors by index; -1: one of the transaction as a whole.
        """
        base = self.next_sequence
        last = base + len(requests)
        self._sequence = last + 1
        messages = [pack_request(r, n) for n, r in enumerate((begin, *requests[:-1]), base)]
        kind, flags, body = requests[-1]
        # The last request asks for the acknowledgement: the transaction's end gives one only from
        # Linux 6.10 on.
        messages.append(pack_request(Request(kind, flags | NLM_F_ACK, body), last))
        self._socket.send(b"".join(messages) + pack_request(end, last + 1))
        errors: dict[int, KernelError] = {}
        while True:
            for message in split_messages(self._receive()):
                if message.kind != NLMSG_ERROR or message.sequence < base:
                    continue
                error = _parse_error(message.data, message.start, message.end, message.flags)
                if error.errno:
                    errors[message.sequence - base - 1] = error
                if message.sequence in (base, last):
                    return errors

    def ask(self, messages: Sequence[bytes]) -> list[bytes | KernelError]:
        """Send whole messages, numbered from `next_sequence` on, each of which has one answer.

        Returns:
            The answers' bodies, or errors, in the order of the messages.
        """
        answers: list[bytes | KernelError] = []
        for first in range(0, len(messages), BATCH_MESSAGES):
            answers += self._ask(messages[first : first + BATCH_MESSAGES])
        return answers

    def _ask(self, messages: Sequence[bytes]) -> list[bytes | KernelError]:
        base = self.next_sequence
        self._sequence += len(messages)
        self._socket.send(b"".join(messages))
        answers: dict[int, bytes | KernelError] = {}
        while len(answers) < len(messages):
            data = self._receive()  # one answer: the kernel sends each in its own datagram
            if len(data) < 16:
                raise _malformed()
            length, kind, flags, sequence, _ = NLMSG_HEADER.unpack_from(data)
            if not base <= sequence <= self._sequence:
                continue
            if kind == NLMSG_ERROR:
                answers[sequence] = _parse_error(data, 16, min(length, len(data)), flags)
            else:
                answers[sequence] = data[16:length]
        return [answers[base + i] for i in range(len(messages))]

    def _receive(self) -> bytes:
        """One datagram.

        Raises:
            TimeoutError: none came.
        """
        try:
            size = self._socket.recv_into(self._buffer)
        except BlockingIOError as error:
            raise TimeoutError(errno.ETIMEDOUT, "the kernel did not answer") from error
        return bytes(self._buffer[:size])


def _malformed() -> OSError:
    """The error for an answer that Linux never gives."""
    return OSError(errno.EBADMSG, "the kernel's answer is malformed")


def _read_errno(data: bytes, at: int) -> int:
    """The errno in a message, where it is negative.

    Raises:
        OSError: it is not an errno.
    """
    code = -NLMSGERR.unpack_from(data, at)[0]
    if not 0 <= code <= _MAX_ERRNO:
        raise _malformed()
    return int(code)


def _parse_error(data: bytes, start: int, end: int, flags: int) -> KernelError:
    """NLMSG_ERROR: negative errno (0: acknowledgement), the request's header, attributes."""
    if end < start + 4 + 16:
        raise _malformed()
    code = _read_errno(data, start)
    text = ""
    if code and flags & NLM_F_ACK_TLVS:
        skip = 4 + 16
        if not flags & NLM_F_CAPPED:
            skip += max(0, NLMSG_HEADER.unpack_from(data, start + 4)[0] - 16)
        raw = parse_attrs(data, start + skip, end).get(NLMSGERR_ATTR_MSG)
        text = raw.rstrip(b"\0").decode(errors="replace") if raw else ""
    return KernelError(code, text)
