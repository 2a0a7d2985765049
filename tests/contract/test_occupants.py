"""What the real kernel says that a host's links and routes lead to."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from meshnet.backends.occupied import spans_of
from meshnet.diff import diff
from meshnet.kernel.events import EventFilter, open_route_events
from meshnet.kernel.netns import inside
from tests.contract.hosts import RealHost, host_namespace
from tests.values import make_network, make_snapshot, plan_for, underlay_ip

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root
NETWORK = make_network()


@pytest.fixture
def host(root: None, tmp_path: Path, nothing_left: None) -> Iterator[tuple[RealHost, int]]:
    with host_namespace() as (name, fd):
        real = RealHost(name, fd, tmp_path)
        try:
            yield real, fd
        finally:
            real.close()


def occupied(real: RealHost) -> dict[str, tuple[str, bool, bool]]:
    """What is occupied, by prefix: the link, whether it is vital, and whether an aggregate."""
    found = real.observe(underlay_ip(1), None).occupied
    assert len(found) == len(set(found))
    return {str(o.prefix): (o.dev, o.vital, o.aggregate) for o in found}


def test_links_gateways_and_routes(host: tuple[RealHost, int]) -> None:
    real, _ = host
    before = {
        "10.9.0.1/32": ("und0", True, False),
        "10.9.0.0/24": ("und0", True, False),
        "fd09::1/128": ("und0", True, False),
        "fd09::/64": ("und0", True, False),
        "10.99.0.0/16": ("und0", True, True),
    }
    assert occupied(real) == before
    for command in (
        "ip link add br7 type bridge; ip link set br7 up; ip address add 172.17.0.1/16 dev br7",
        "ip address add 192.168.9.1 peer 192.168.9.2/32 dev br7",
        "ip route add default via 10.9.0.77",
        "ip route add default metric 9 nexthop via 10.9.0.78 nexthop via 172.17.0.9",
        "ip route add default via inet6 fd09::99 dev und0 metric 10",
        "ip route add 128.0.0.0/1 dev br7",
        "ip route add 10.77.0.0/16 dev br7 metric 50; ip route add blackhole 10.78.0.0/16",
        "ip -6 route add fd77::/48 dev br7 proto dhcp",
        # Neither a routing daemon's, nor those of other tables.
        "ip route add 10.79.0.0/16 dev br7 proto bird",
        "ip route add 10.80.0.0/16 dev br7 table 100",
    ):
        real.shell(command)
    assert {key: value for key, value in occupied(real).items() if key not in before} == {
        "172.17.0.1/32": ("br7", False, False),
        "172.17.0.0/16": ("br7", False, False),
        "192.168.9.1/32": ("br7", False, False),
        "192.168.9.2/32": ("br7", False, False),
        "10.9.0.77/32": ("und0", True, False),
        "10.9.0.78/32": ("und0", True, False),
        "172.17.0.9/32": ("und0", True, False),
        "fd09::99/128": ("und0", True, False),
        "10.77.0.0/16": ("br7", True, False),
        "10.78.0.0/16": ("", True, True),
        "fd77::/48": ("br7", True, False),
    }


def test_our_own_networks_are_not_in_our_way(host: tuple[RealHost, int]) -> None:
    real, _ = host
    before = occupied(real)
    underlay = real.observe(underlay_ip(1), None)
    desired = plan_for(make_snapshot([NETWORK], 2), underlay).state
    assert real.apply(diff(desired, real.dump())) == []
    real.shell("ip route add 10.42.200.0/24 dev mnb4097")
    assert occupied(real) == before
    # Nor is a way through a network one to another host: its MTU once came back as the underlay's.
    real.shell("ip route add 192.0.2.9/32 dev mnv4097")
    assert real.find_paths([ip_address("10.42.1.9"), ip_address("192.0.2.9")]) == {}


def test_only_addresses_of_networks_are_news(host: tuple[RealHost, int]) -> None:
    """A routing daemon's thousands of routes are not, nor is what Docker does."""
    real, fd = host
    real.shell("ip link add br7 type bridge; ip link set br7 up")
    concerned = EventFilter()
    with inside(fd):
        events = open_route_events([real.port_id])
        # The last pass saw them; a link that comes later matters, for it has to forward.
        known = [index for index, _ in socket.if_nameindex()]
    concerned.look_at((), (), (), known, (), spans_of([NETWORK]))

    def is_news(command: str) -> bool:
        real.shell(command)
        told = []
        while True:
            try:
                told.append(concerned.concerns_us(events.recv(1 << 18)))
            except BlockingIOError:
                assert told, f"no word of {command}"
                return any(told)

    with events:
        assert not is_news("ip address add 172.17.0.1/16 dev br7")
        assert not is_news("ip route add 10.41.0.0/16 dev br7 proto bird")
        assert not is_news("ip route add 10.43.0.0/24 dev br7")
        for prefix in ("10.42.7.1/24", "10.42.255.255/32", "10.0.0.1/8"):
            for change in ("add", "del"):
                assert is_news(f"ip address {change} {prefix} dev br7")
        assert is_news("ip route add 10.42.7.0/24 dev br7")
        assert is_news("ip route del 10.42.7.0/24 dev br7")
        assert is_news("ip route add default dev br7")
