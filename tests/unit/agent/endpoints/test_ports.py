"""Published ports: their text, their conflicts, and who has which."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from meshnet.errors import ConflictError, NotFoundError, UsageError
from meshnet.model import Protocol, PublishedPort
from meshnet.ports import (
    MAX_PUBLISHED,
    Binding,
    bindings_of,
    parse_all_published,
    parse_published,
    select_published,
)
from meshnet_agent.endpoints.published_ports import KernelPorts, PublishedPorts
from tests.unit.data_plane import FakeDataPlane
from tests.unit.host_ports import FakePorts
from tests.unit.mesh import until
from tests.unit.strategies import published_ports
from tests.values import make_endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio.testing import MockClock

TCP, UDP = Protocol.TCP, Protocol.UDP
WEB = make_endpoint(["10.42.0.2/24", "fd00:42::2/64"])
OTHER = make_endpoint(["10.42.0.3/24"], identity="ba9876543210")


# --- the text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("8080:80", [PublishedPort(TCP, 8080, 80)]),
        ("8080:80/tcp", [PublishedPort(TCP, 8080, 80)]),
        ("5353:53/UDP", [PublishedPort(UDP, 5353, 53)]),
        ("127.0.0.1:8080:80", [PublishedPort(TCP, 8080, 80, ip_address("127.0.0.1"))]),
        ("[fd00::7]:8080:80", [PublishedPort(TCP, 8080, 80, ip_address("fd00::7"))]),
        ("80", [PublishedPort(TCP, 0, 80)]),
        (":80", [PublishedPort(TCP, 0, 80)]),
        ("0:80", [PublishedPort(TCP, 0, 80)]),
        ("127.0.0.1::80", [PublishedPort(TCP, 0, 80, ip_address("127.0.0.1"))]),
        ("8080-8082:80-82", [PublishedPort(TCP, 8080 + i, 80 + i) for i in range(3)]),
        ("80-81/udp", [PublishedPort(UDP, 0, 80), PublishedPort(UDP, 0, 81)]),
        ("1-1:65535", [PublishedPort(TCP, 1, 65535)]),
    ],
)
def test_what_people_write(text: str, ports: list[PublishedPort]) -> None:
    assert list(parse_published(text)) == ports


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not have the right form"),
        ("http", "does not have the right form"),
        ("8080:80/", "does not have the right form"),
        ("8080:80/sctp", "sctp ports cannot be published"),
        ("8080:0", "0 is not within 1 to 65535"),
        ("65536:80", "65536 is not within"),
        ("999999:80", "is neither a port nor"),
        ("-1:80", "is neither a port nor"),
        ("90-80:90-80", "not within"),
        ("0-9:80-89", "not within"),
        ("8080-8081:80", "2 ports of the host do not match 1"),
        ("8080:80-81", "1 ports of the host do not match 2"),
        ("::1:8080:80", "does not have the right form"),
        ("[127.0.0.1]:8080:80", "brackets are for IPv6"),
        ("[fe80::1%eth0]:8080:80", "has a scope"),
        ("[fe80::1]:8080:80", "cannot be published at"),
        ("[::ffff:10.0.0.1]:8080:80", "cannot be published at"),
        ("224.0.0.1:8080:80", "cannot be published at"),
        ("0.0.0.0:8080:80", "leave it out"),
        ("[::]:8080:80", "leave it out"),
        ("[::1]:8080:80", "does not translate packets to ::1: publish at 127.0.0.1"),
        ("localhost:8080:80", "does not appear to be"),
        ("8080:80\n", "does not have the right form"),
        ("٨٠:80", "does not have the right form"),
    ],
)
def test_what_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match="published port") as caught:
        parse_published(text)
    assert reason in str(caught.value)
    assert "such as 8080:80" in str(caught.value)


def test_ports_of_an_endpoint_are_limited() -> None:
    assert len(parse_all_published([f"1-{MAX_PUBLISHED}:1-{MAX_PUBLISHED}"])) == MAX_PUBLISHED
    assert parse_all_published(["80:80", "80:80/tcp"]) == (PublishedPort(TCP, 80, 80),)
    for texts in (["1-65535:1-65535"], ["1-200:1-200", "201-300:201-300"]):
        with pytest.raises(UsageError, match="at most 256"):
            parse_all_published(texts)


@given(published_ports())
def test_what_is_printed_is_read_back(port: PublishedPort) -> None:
    assert parse_published(str(port)) == (port,)
    assert select_published([port], str(port)) == [port]
    assert select_published([port], f"{port.host_port}/{port.protocol}") == [port]


@given(st.text(alphabet="0123456789:/-[].%abcdeftupUDP", max_size=24))
def test_any_text_is_ports_or_is_refused(text: str) -> None:
    try:
        ports = parse_published(text)
    except UsageError:
        return
    assert ports
    for port in ports:
        assert 0 <= port.host_port <= 65535
        assert 1 <= port.port <= 65535
        assert port.host_port == 0 or parse_published(str(port)) == (port,)


def test_selecting() -> None:
    local = ip_address("127.0.0.1")
    held = [
        PublishedPort(TCP, 8080, 80),
        PublishedPort(UDP, 8080, 80),
        PublishedPort(TCP, 80, 443),
        PublishedPort(TCP, 81, 443, local),
        PublishedPort(TCP, 81, 443, ip_address("10.9.0.1")),
    ]
    assert select_published(held, "8080") == held[:1]
    assert select_published(held, "8080/udp") == held[1:2]
    assert select_published(held, "80") == held[2:3]  # the host's port, not the endpoint's
    assert select_published(held, "81") == held[3:]
    assert select_published(held, "127.0.0.1:81:443") == held[3:4]
    assert select_published(held, "80-81") == held[2:]
    assert select_published(held, "8080:81") == []
    assert select_published(held, "443") == []


# --- in each other's way -------------------------------------------------------------------------


def test_overlap() -> None:
    every, one, other = (ip_address(a) for a in ("0.0.0.0", "10.9.0.1", "10.9.0.2"))
    tcp = Binding(TCP, every, 80)
    assert tcp.overlaps(tcp)
    assert tcp.overlaps(Binding(TCP, one, 80))
    assert Binding(TCP, one, 80).overlaps(tcp)
    assert not Binding(TCP, one, 80).overlaps(Binding(TCP, other, 80))
    assert not tcp.overlaps(Binding(TCP, every, 81))
    assert not tcp.overlaps(Binding(UDP, every, 80))
    assert not tcp.overlaps(Binding(TCP, ip_address("::"), 80))


def test_bindings() -> None:
    assert [str(b.address) for b in bindings_of(WEB, PublishedPort(TCP, 80, 80))] == [
        "0.0.0.0",
        "::",
    ]
    assert len(bindings_of(OTHER, PublishedPort(TCP, 80, 80))) == 1
    with pytest.raises(UsageError, match="network prod has no IPv6"):
        bindings_of(OTHER, PublishedPort(TCP, 80, 80, ip_address("fd00::7")))


# --- who has which -------------------------------------------------------------------------------


@pytest.fixture
def host() -> FakePorts:
    return FakePorts()


async def test_taken_held_and_freed(host: FakePorts) -> None:
    ports = PublishedPorts(host, FakeDataPlane())
    wanted = parse_all_published(["8080:80", "8080:80/udp"])
    assert await ports.acquire(WEB, wanted) == wanted
    assert len(host.held) == 4
    with pytest.raises(ConflictError) as caught:
        await ports.acquire(OTHER, parse_all_published(["9090:90", "127.0.0.1:8080:80"]))
    assert str(caught.value) == (
        "port 8080/tcp is published for endpoint e-0123 of network prod already: choose another, "
        "or take it away (meshnet endpoint unpublish e-0123 8080/tcp)"
    )
    assert len(host.held) == 4  # all or none
    ports.release(WEB, wanted[:1])
    assert await ports.acquire(OTHER, parse_all_published(["8080:80"]))
    ports.release(WEB, wanted)
    ports.release(OTHER, parse_all_published(["8080:80"]))
    assert not host.held


async def test_one_address_does_not_take_the_others(host: FakePorts) -> None:
    host.addresses = {ip_address("10.9.0.1"), ip_address("10.9.0.2")}
    ports = PublishedPorts(host, FakeDataPlane())
    await ports.acquire(WEB, parse_all_published(["10.9.0.1:80:80"]))
    await ports.acquire(OTHER, parse_all_published(["10.9.0.2:80:80"]))
    with pytest.raises(ConflictError, match=r"port 80/tcp at 10\.9\.0\.\d is published for"):
        await ports.acquire(OTHER, parse_all_published(["80:80"]))
    with pytest.raises(NotFoundError, match=r"address 10\.9\.0\.3 is on no link"):
        await ports.acquire(OTHER, parse_all_published(["10.9.0.3:81:80"]))
    assert len(host.held) == 2


async def test_a_process_of_the_host_has_it(host: FakePorts) -> None:
    nginx = Binding(TCP, ip_address("::"), 80)
    host.others[nginx] = "process nginx (pid 12)"
    ports = PublishedPorts(host, FakeDataPlane())
    assert await ports.acquire(OTHER, parse_all_published(["80:80"]))  # IPv4 alone
    ports.release(OTHER, parse_all_published(["80:80"]))
    with pytest.raises(ConflictError, match=r"is taken by process nginx \(pid 12\): choose"):
        await ports.acquire(WEB, parse_all_published(["80:80"]))
    assert not host.held


async def test_a_port_that_is_free_is_chosen(host: FakePorts) -> None:
    # Free in IPv4, but not in IPv6: another is tried.
    host.others[Binding(TCP, ip_address("::"), 40000)] = "process nginx (pid 12)"
    ports = PublishedPorts(host, FakeDataPlane())
    with pytest.raises(ConflictError):
        await ports.acquire(WEB, parse_all_published(["40000:80"]))
    host.others[Binding(TCP, ip_address("0.0.0.0"), 40000)] = "process nginx (pid 12)"
    first, second = await ports.acquire(WEB, parse_all_published(["80-81"]))
    assert {first.host_port, second.host_port} == {40001, 40002}
    assert (first.port, second.port) == (80, 81)


async def test_no_more_than_an_endpoint_may_have(host: FakePorts) -> None:
    full = replace(WEB, published=parse_all_published(["1-256:1-256"]))
    with pytest.raises(UsageError, match="at most 256"):
        await PublishedPorts(host, FakeDataPlane()).acquire(full, parse_all_published(["300:80"]))


async def test_held_again_after_a_restart(host: FakePorts, autojump_clock: MockClock) -> None:
    host.others[Binding(TCP, ip_address("0.0.0.0"), 80)] = "process nginx (pid 12)"
    ports = PublishedPorts(host, FakeDataPlane())
    await ports.take_over(replace(WEB, published=parse_all_published(["80-81:80-81"])))
    assert len(host.held) == 3
    assert ports.report() == [
        "port 80/tcp is published for endpoint e-0123 of network prod, which gets its packets, but "
        "was taken by process nginx (pid 12) while no agent ran: stop that, or unpublish the port"
    ]
    with pytest.raises(ConflictError, match="is published for endpoint e-0123"):
        await ports.acquire(OTHER, parse_all_published(["80:80"]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ports.run)
        await trio.sleep(60)
        assert len(ports.report()) == 1
        host.others.clear()
        # Asking for the status changes nothing: anybody may ask at any time.
        assert len(ports.report()) == 1
        assert len(host.held) == 3
        await until(lambda: ports.report() == [], "the port is held")
        assert len(host.held) == 4
        nursery.cancel_scope.cancel()


# --- the kernel's --------------------------------------------------------------------------------


@pytest.fixture(params=[("127.0.0.1", TCP), ("::1", TCP), ("127.0.0.1", UDP), ("0.0.0.0", TCP)])
def binding(request: pytest.FixtureRequest) -> Binding:
    address, protocol = request.param
    return Binding(protocol, ip_address(address), 0)


def open_socket(binding: Binding) -> socket.socket:
    family = socket.AF_INET if binding.address.version == 4 else socket.AF_INET6
    kind = socket.SOCK_STREAM if binding.protocol is TCP else socket.SOCK_DGRAM
    return socket.socket(family, kind)


@pytest.fixture
def server(binding: Binding) -> Iterator[socket.socket]:
    """A socket of this process."""
    with open_socket(binding) as opened:
        opened.bind((str(binding.address), 0))
        if binding.protocol is TCP:
            opened.listen()
        yield opened


def test_held_ports_are_refused_to_others(binding: Binding) -> None:
    held = KernelPorts().hold(binding)
    port = held.port
    with open_socket(binding) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind((str(binding.address), port))
        held.close()
        other.bind((str(binding.address), port))


def test_ports_of_others_are_refused(
    binding: Binding, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = binding._replace(port=server.getsockname()[1])
    with pytest.raises(OSError, match="in use"):
        KernelPorts().hold(taken)
    assert KernelPorts().find_user(taken) is None  # its own ports do not count as others'
    pid = os.getpid()
    monkeypatch.setattr("meshnet_agent.endpoints.published_ports.os.getpid", lambda: 0)
    assert (KernelPorts().find_user(taken) or "").endswith(f"(pid {pid})")


def test_past_connections_are_not_in_the_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first keeps the port for a minute
        client.close()
    KernelPorts().hold(Binding(TCP, ip_address("127.0.0.1"), port)).close()
