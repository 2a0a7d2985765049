"""Forgetting flows to a port of the host, and no others."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from meshnet.kernel.conntrack import forget_udp_flows
from meshnet.model import Protocol
from meshnet.ports import Binding
from tests.contract.hosts import UNDERLAY_IPS, Inside, host_namespace, ip

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("root")
_TRACKED = """
table inet t {
    chain c {
        type filter hook output priority filter
        ct state new accept
    }
}
"""
OUTSIDE = {4: "10.9.0.200", 6: "fd09::200"}


class _Flows:
    """A host that tracks connections, in a thread of its own."""

    def __init__(self, name: str, fd: int) -> None:
        ip("netns", "exec", name, "nft", "-f", "-", script=_TRACKED)
        self._name = name
        self._thread = Inside(fd, lambda: None)

    def close(self) -> None:
        self._thread.close(lambda _: None)

    def send(self, address: str, port: int, kind: int = socket.SOCK_DGRAM) -> None:
        """The first packet of a flow; whether it arrives does not matter."""

        def go(_: None) -> None:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.socket(family, kind) as opened:
                opened.setblocking(False)
                opened.connect_ex((address, port))
                if kind == socket.SOCK_DGRAM:
                    opened.send(b"x")

        self._thread.call(go)

    def forget(self, *bindings: Binding) -> int:
        return self._thread.call(lambda _: forget_udp_flows(bindings))


@pytest.fixture
def flows() -> Iterator[_Flows]:
    with host_namespace() as (name, fd):
        made = _Flows(name, fd)
        try:
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("version", [4, 6])
def test_flows_to_the_host_are_forgotten(flows: _Flows, version: int) -> None:
    own = next(a for a in UNDERLAY_IPS if a.version == version)
    loopback, every = ("127.0.0.1", "0.0.0.0") if version == 4 else ("::1", "::")
    udp = Binding(Protocol.UDP, ip_address(every), 53)
    assert flows.forget(udp) == 0
    flows.send(str(own), 53)
    flows.send(loopback, 53)
    flows.send(loopback, 54)
    flows.send(OUTSIDE[version], 53)  # through this host, to a port of somebody else's
    flows.send(loopback, 53, socket.SOCK_STREAM)
    assert flows.forget(udp._replace(protocol=Protocol.TCP)) == 0
    assert flows.forget(udp._replace(address=own)) == 1
    assert flows.forget(udp) == 1
    assert flows.forget(udp) == 0
    assert flows.forget(udp._replace(port=54), udp) == 1
