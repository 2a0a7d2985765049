"""Connections of the control socket, without blocking the data path for a slow client."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError
from meshnet.vtep.control import MAX_LINE_BYTES, VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_CONNECTIONS = 16
_CHUNK_BYTES = 1 << 20


class _Connection:
    """A client: what it sent and did not end with a newline, what it has not yet read."""

    __slots__ = ("closing", "inbox", "outbox", "socket")

    def __init__(self, accepted: socket.socket) -> None:
        self.socket = accepted
        self.inbox, self.outbox = bytearray(), bytearray()
        self.closing = False


class Server:
    """Serves a Unix socket from the process's one event loop."""

    def __init__(self, path: str, poll: select.epoll, answer: Callable[[bytes], bytes]) -> None:
        """Listen.

        A socket file that is there already is a dead process's: the caller holds the lock.

        Raises:
            KernelRefusedError: it cannot be made.
        """
        self._poll, self._answer, self._path = poll, answer, path
        self._connections: dict[int, _Connection] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            before = os.umask(0o177)
            try:
                self._listener.bind(path)
            finally:
                os.umask(before)
            self._listener.listen(_MAX_CONNECTIONS)
        except OSError as error:
            raise KernelRefusedError(f"control socket {path}: {error.strerror or error}") from error
        poll.register(self._listener.fileno(), select.EPOLLIN)

    def handle(self, fd: int, events: int) -> None:
        """Something happened at one of our descriptors."""
        if fd == self._listener.fileno():
            self._accept()
            return
        connection = self._connections.get(fd)
        if connection is None:
            return
        try:
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                self._read(connection)
            if connection.outbox:
                self._write(connection)
        except OSError:
            connection.closing = True
            connection.outbox.clear()
        if connection.closing and not connection.outbox:
            self._close(connection)
        else:
            out = select.EPOLLOUT if connection.outbox else 0
            self._poll.modify(fd, select.EPOLLIN * (not connection.closing) | out)

    def close(self) -> None:
        """Close all, and remove the socket's file."""
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):
                self._write(connection)
            self._close(connection)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = self._listener.accept()
            if len(self._connections) >= _MAX_CONNECTIONS:
                accepted.close()
                return
            accepted.setblocking(False)
            self._connections[accepted.fileno()] = _Connection(accepted)
            self._poll.register(accepted.fileno(), select.EPOLLIN)

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        if not data:
            connection.closing = True
            return
        inbox = connection.inbox
        inbox += data
        while not connection.closing and (end := inbox.find(b"\n")) >= 0:
            line = bytes(inbox[:end])
            del inbox[: end + 1]
            connection.outbox += self._answer(line)
        if len(inbox) > MAX_LINE_BYTES:
            error = {"v": VERSION, "ok": False, "error": f"line is longer than {MAX_LINE_BYTES}"}
            connection.outbox += json.dumps(error).encode() + b"\n"
            connection.closing = True

    def _write(self, connection: _Connection) -> None:
        with contextlib.suppress(BlockingIOError):
            while connection.outbox:
                sent = connection.socket.send(memoryview(connection.outbox)[:_CHUNK_BYTES])
                del connection.outbox[:sent]

    def _close(self, connection: _Connection) -> None:
        self._connections.pop(connection.socket.fileno(), None)
        with contextlib.suppress(OSError):
            self._poll.unregister(connection.socket.fileno())
        connection.socket.close()
