"""Frames as an attacker sends them: made by scapy and written to a link unchanged."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from meshnet.kernel.netns import inside
from meshnet.lab.poll import wait_until
from tests.netns.mesh import Document, address_of, attach

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from scapy.packet import Packet

    from meshnet.lab.commands import Namespace
    from meshnet.lab.host import LabContainer, LabHost

_ETH_P_ALL = 3


class Wire:
    """A link in a namespace, to send frames from and to see what arrives."""

    def __init__(self, namespace: Namespace, ifname: str = "eth0") -> None:
        self._socket = _in_namespace(namespace, ifname)
        self._seen: list[bytes] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, frame: Packet) -> None:
        """Send a frame, whatever is in it."""
        self._socket.send(bytes(frame))

    def has_seen(self, marker: bytes) -> bool:
        """Whether a frame with these bytes in it arrived, since the link was opened."""
        return bool(self.seen(marker))

    def seen(self, marker: bytes) -> list[bytes]:
        """The frames with these bytes in them that arrived."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, (_, _, packet_type, *_) = self._socket.recvfrom(1 << 16)
                if packet_type != socket.PACKET_OUTGOING:
                    self._seen.append(data)
        return [data for data in self._seen if marker in data]


def _in_namespace(namespace: Namespace, ifname: str) -> socket.socket:
    """A packet socket of another namespace, opened by a thread that goes there for it."""

    def open_there() -> socket.socket:
        fd = os.open(namespace.netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with inside(fd):
                opened = socket.socket(
                    socket.AF_PACKET,
                    socket.SOCK_RAW | socket.SOCK_NONBLOCK,
                    socket.htons(_ETH_P_ALL),
                )
                opened.bind((ifname, 0))
                return opened
        finally:
            os.close(fd)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(open_there).result()


def mac_of(namespace: Namespace, link: str = "eth0") -> str:
    """MAC of a link."""
    (found,) = json.loads(namespace.run(["ip", "-j", "link", "show", link]).stdout)
    return str(found["address"])


def marker() -> bytes:
    """Bytes to know a packet by."""
    return secrets.token_hex(8).encode()


def drops(host: LabHost) -> dict[str, int]:
    """What the counters of our tables say, by reason."""
    listing = json.loads(host.run(["nft", "-j", "list", "counters"]).stdout)
    counters = [item["counter"] for item in listing["nftables"] if "counter" in item]
    return {c["name"]: c["packets"] for c in counters if c["table"] == "meshnet"}


@contextlib.contextmanager
def counted(host: LabHost, reason: str) -> Iterator[None]:
    """Assert that exactly one packet is dropped while the block runs, for that reason."""
    before = drops(host)[reason]
    yield
    wait_until(lambda: drops(host)[reason] > before, 5, f"{reason} is counted")
    assert drops(host)[reason] == before + 1


class Case:
    """A sender on a host that counts."""

    def __init__(self, host: LabHost, sender: Wire) -> None:
        self._host = host
        self._sender = sender

    def refuses(self, reason: str | None, bad: Packet, good: Packet, receiver: Wire) -> None:
        """The bad frame is dropped for that reason, and the good one arrives.

        Args:
            reason: as the counter is called; None: the kernel drops it by itself.
        """
        from scapy.packet import Raw

        bad_marker, good_marker = marker(), marker()
        with counted(self._host, reason) if reason else contextlib.nullcontext():
            self._sender.send(bad / Raw(bad_marker))
        self._sender.send(good / Raw(good_marker))
        wait_until(lambda: receiver.has_seen(good_marker), 5, f"what is right beside {reason}")
        assert not receiver.has_seen(bad_marker)


class Endpoint:
    """An attached container, its addresses and its link."""

    def __init__(self, host: LabHost, network: str) -> None:
        self.container: LabContainer = host.spawn_container()
        document: Document = attach(self.container, host, network)
        self.mac: str = document["mac"]
        self.ip = address_of(document)
        self.ip6 = address_of(document, 6) if "address6" in document else ""
        self.gateway: str = document["gateway"]
        self.wire = Wire(self.container)
        link = json.loads(self.container.run(["ip", "-j", "-6", "address", "show", "eth0"]).stdout)
        self.link_local = next(a["local"] for a in link[0]["addr_info"] if a["scope"] == "link")

    def gateway_mac(self) -> str:
        """MAC of the bridge, which leads out."""
        self.container.run(["ping", "-n", "-c1", "-W2", self.gateway])
        (found,) = json.loads(
            self.container.run(["ip", "-j", "neigh", "show", self.gateway, "dev", "eth0"]).stdout
        )
        return str(found["lladdr"])


@contextlib.contextmanager
def endpoints(*places: tuple[LabHost, str]) -> Iterator[list[Endpoint]]:
    """Endpoints, by host and network."""
    with contextlib.ExitStack() as stack:
        found = [Endpoint(*place) for place in places]
        for endpoint in found:
            stack.enter_context(endpoint.wire)
        yield found
