"""Asking a real link whether an address is taken, and announcing one's own."""

from __future__ import annotations

import json
import socket
import threading
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

import pytest
import trio

from meshnet.errors import KernelRefusedError
from meshnet.kernel.address_probe import WireProber
from meshnet.wire import arp, nd
from tests.contract.hosts import Inside, ip, namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meshnet.model import IpAddress

pytestmark = pytest.mark.root
ADDRESSES = [ip_address("192.0.2.7"), ip_address("2001:db8::7:8:9")]


class Wire(NamedTuple):
    """Two machines on one wire: ``here`` on the one, ``there`` on the other."""

    here: Inside[None]
    there: Inside[None]
    other: str

    def probe(self, address: IpAddress, link: str = "here") -> bytes | None:
        return self.here.call(lambda _: trio.run(WireProber().probe, link, address))

    @property
    def other_mac(self) -> bytes:
        (link,) = json.loads(ip("-n", self.other, "-j", "link", "show", "dev", "there"))
        return bytes.fromhex(link["address"].replace(":", ""))


@pytest.fixture
def wire(root: None, nothing_left: None) -> Iterator[Wire]:
    with namespace() as (name, fd), namespace() as (other, other_fd):
        ip("-n", name, "link", "add", "here", "type", "veth", "peer", "there", "netns", other)
        ip("-n", name, "link", "set", "here", "up")
        ip("-n", other, "link", "set", "there", "up")
        inside = [Inside(fd, lambda: None), Inside(other_fd, lambda: None)]
        try:
            yield Wire(inside[0], inside[1], other)
        finally:
            for thread in inside:
                thread.close(lambda _: None)


@pytest.mark.parametrize("address", ADDRESSES, ids=str)
def test_who_has_an_address(wire: Wire, address: IpAddress) -> None:
    assert wire.probe(address) is None
    # The machine's other addresses and other links do not matter.
    ip("-n", wire.other, "address", "add", f"{address + 1}/24", "dev", "there")
    assert wire.probe(address) is None
    ip("-n", wire.other, "address", "add", f"{address}/24", "dev", "there", "nodad")
    assert wire.probe(address) == wire.other_mac


@pytest.mark.parametrize("address", ADDRESSES, ids=str)
def test_somebody_who_asks_for_it_at_the_same_time(wire: Wire, address: IpAddress) -> None:
    done = threading.Event()
    mac = bytes.fromhex("0a0000000001")
    probe = arp.encode_probe if address.version == 4 else nd.encode_probe
    frame = probe(address, mac)  # type: ignore[arg-type]

    def keep_asking() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            sender.bind(("there", 0))
            while not done.wait(0.01):
                sender.send(frame)

    asking = threading.Thread(target=lambda: wire.there.call(lambda _: keep_asking()))
    asking.start()
    try:
        assert wire.probe(address) == mac
    finally:
        done.set()
        asking.join()


@pytest.mark.parametrize("address", ADDRESSES, ids=str)
def test_links_that_cannot_be_asked(wire: Wire, address: IpAddress) -> None:
    for link, message in (("nothing", "No such device"), ("lo", "down|Ethernet")):
        with pytest.raises(KernelRefusedError, match=message):
            wire.probe(address, link)
    ip("-n", wire.other, "link", "del", "there")
    with pytest.raises(KernelRefusedError, match="here"):
        wire.probe(address)
