"""Servers and clients in namespaces, as sockets of the tests' own process.

A socket belongs to the namespace that it was made in, so nothing need be started there.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, NamedTuple

from meshnet.kernel.netns import inside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from meshnet.lab.commands import Namespace

_ANSWER_S = 3.0
"""How long a required answer may take."""
_SILENCE_S = 0.3
"""How long to wait for an answer that must not come."""


class Answer(NamedTuple):
    """What a server said.

    Attributes:
        name: its own.
        seen: the address that it was asked from.
    """

    name: str
    seen: str


def open_socket(namespace: Namespace, kind: int, version: int) -> socket.socket:
    """A socket in a namespace."""
    fd = os.open(namespace.netns_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with inside(fd):
            return socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, kind)
    finally:
        os.close(fd)


class _Server:
    """Answers anything that it is sent, by TCP and UDP, with its name and the asker's address."""

    def __init__(self, namespace: Namespace, name: str, port: int) -> None:
        self._name = name
        self._selector = selectors.DefaultSelector()
        self._ended, self._end = socket.socketpair()
        self._selector.register(self._ended, selectors.EVENT_READ, None)
        for kind, serve in ((socket.SOCK_STREAM, self._accept), (socket.SOCK_DGRAM, self._answer)):
            opened = open_socket(namespace, kind, 6)
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(("::", port))
            if kind == socket.SOCK_STREAM:
                opened.listen(64)
            self._selector.register(opened, selectors.EVENT_READ, serve)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.close()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                key.data(key.fileobj)

    def _accept(self, listener: socket.socket) -> None:
        self._selector.register(listener.accept()[0], selectors.EVENT_READ, self._say)

    def _say(self, connection: socket.socket) -> None:
        try:
            if connection.recv(64):
                connection.sendall(self._text(connection.getpeername()[0]))
                return
        except OSError:
            pass
        self._selector.unregister(connection)
        connection.close()

    def _answer(self, opened: socket.socket) -> None:
        _, peer = opened.recvfrom(64)
        with contextlib.suppress(OSError):
            opened.sendto(self._text(peer[0]), peer)

    def _text(self, peer: str) -> bytes:
        address = ip_address(peer)
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return f"{self._name} {address}".encode()


@contextlib.contextmanager
def serving(*places: tuple[Namespace, str], port: int = 80) -> Iterator[None]:
    """Servers with names in namespaces, at a port of TCP and UDP, while the block runs."""
    servers = [_Server(namespace, name, port) for namespace, name in places]
    try:
        yield
    finally:
        for server in servers:
            server.close()


class Client:
    """One socket to a server: a connection, or a flow of UDP."""

    def __init__(self, namespace: Namespace, address: str, port: int, protocol: str) -> None:
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        self._socket = open_socket(namespace, kind, ip_address(address).version)
        self._socket.settimeout(_ANSWER_S)
        self._target = (address, port)

    def connect(self) -> None:
        self._socket.connect(self._target)

    def send(self) -> None:
        self._socket.sendall(b"?")

    def ask(self, wait_s: float = _ANSWER_S) -> Answer:
        self._socket.settimeout(wait_s)
        self.send()
        received = self._socket.recv(128).decode()
        if not received:
            raise ConnectionError("closed without an answer")
        return Answer(*received.split())

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def connected(
    namespace: Namespace, address: str, port: int, protocol: str = "tcp"
) -> Iterator[Client]:
    """A client that goes on asking by one connection while the block runs."""
    client = Client(namespace, address, port, protocol)
    try:
        client.connect()
        yield client
    finally:
        client.close()


def ask(namespace: Namespace, address: str, port: int, protocol: str = "tcp") -> Answer:
    """Ask a server that must answer."""
    with connected(namespace, address, port, protocol) as client:
        return client.ask()


def is_closed(namespace: Namespace, address: str, port: int, protocol: str = "tcp") -> bool:
    """Whether nobody answers: the port is refused, or silent for a while."""
    client = Client(namespace, address, port, protocol)
    client._socket.settimeout(_SILENCE_S)
    try:
        client.connect()
        client.ask(_SILENCE_S)
    except OSError:
        return True
    finally:
        client.close()
    return False


@contextlib.contextmanager
def none_lost(*asks: Callable[[], Answer]) -> Iterator[None]:
    """Assert that every question is answered while the block runs, one after the other."""
    lost: list[str] = []
    answered = [0]
    end = threading.Event()

    def go_on(ask_once: Callable[[], Answer]) -> None:
        while not end.is_set():
            try:
                ask_once()
                answered[0] += 1
            except OSError as error:
                lost.append(str(error))
            time.sleep(0.001)

    threads = [threading.Thread(target=go_on, args=(a,), daemon=True) for a in asks]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert answered[0] > 50
    assert not lost, f"{len(lost)} of {answered[0]} lost: {lost[:3]}"
