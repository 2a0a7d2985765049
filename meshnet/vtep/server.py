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

_MAX_CLIENTS = 16
_CHUNK_BYTES = 1 << 20


class _ControlClient:
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
        self._clients: dict[int, _ControlClient] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            before = os.umask(0o177)
            try:
                self._listener.bind(path)
            finally:
                os.umask(before)
            self._listener.listen(_MAX_CLIENTS)
        except OSError as error:
            raise KernelRefusedError(f"control socket {path}: {error.strerror or error}") from error
        poll.register(self._listener.fileno(), select.EPOLLIN)

    def handle(self, fd: int, events: int) -> None:
        """Something happened at one of our descriptors."""
        if fd == self._listener.fileno():
            self._accept()
            return
        client = self._clients.get(fd)
        if client is None:
            return
        try:
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                self._read(client)
            if client.outbox:
                self._write(client)
        except OSError:
            client.closing = True
            client.outbox.clear()
        if client.closing and not client.outbox:
            self._close(client)
        else:
            out = select.EPOLLOUT if client.outbox else 0
            self._poll.modify(fd, select.EPOLLIN * (not client.closing) | out)

    def close(self) -> None:
        """Close all, and remove the socket's file."""
        for client in list(self._clients.values()):
            with contextlib.suppress(OSError):
                self._write(client)
            self._close(client)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = self._listener.accept()
            if len(self._clients) >= _MAX_CLIENTS:
                accepted.close()
                return
            accepted.setblocking(False)
            self._clients[accepted.fileno()] = _ControlClient(accepted)
            self._poll.register(accepted.fileno(), select.EPOLLIN)

    def _read(self, client: _ControlClient) -> None:
        try:
            data = client.socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        if not data:
            client.closing = True
            return
        inbox = client.inbox
        inbox += data
        while not client.closing and (end := inbox.find(b"\n")) >= 0:
            line = bytes(inbox[:end])
            del inbox[: end + 1]
            client.outbox += self._answer(line)
        if len(inbox) > MAX_LINE_BYTES:
            error = {"v": VERSION, "ok": False, "error": f"line is longer than {MAX_LINE_BYTES}"}
            client.outbox += json.dumps(error).encode() + b"\n"
            client.closing = True

    def _write(self, client: _ControlClient) -> None:
        with contextlib.suppress(BlockingIOError):
            while client.outbox:
                sent = client.socket.send(memoryview(client.outbox)[:_CHUNK_BYTES])
                del client.outbox[:sent]

    def _close(self, client: _ControlClient) -> None:
        self._clients.pop(client.socket.fileno(), None)
        with contextlib.suppress(OSError):
            self._poll.unregister(client.socket.fileno())
        client.socket.close()
