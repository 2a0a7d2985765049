"""Endpoints as neighbours: each has a MAC of its own, and is found at once."""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest

from tests.netns.mesh import address_of, attach, create_network, meshnet, ping

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root


def test_ipv6_addresses_that_end_alike(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    h1 = lab.host("h1")
    create_network(lab, "six", "--subnet", "fd00:42::/48")
    subnet = ip_network(meshnet(h1, "hosts")[0]["subnets"]["six"])
    containers = [h1.spawn_container() for _ in range(3)]
    ends = [
        attach(container, h1, "six", "--ip", str(subnet[(number << 32) + 2]))
        for number, container in enumerate(containers)
    ]
    assert len({end["mac"] for end in ends}) == 3
    for container, own in zip(containers, ends, strict=True):
        for end in ends:
            assert own is end or ping(container, address_of(end, 6))


def test_networks_of_one_parent(make_lab: MakeLab) -> None:
    """The kernel refused the second endpoint: their addresses end alike, so did their MACs."""
    lab = make_lab(2)
    h1, h2 = lab.hosts
    for number in (1, 2):
        options = ("--mode", "macvlan", "--parent", "eth0", "--subnet", f"fd00:{number}::/64")
        meshnet(h1, "network", "create", f"phys{number}", *options)
    ways = {}
    macs = set()
    for network in ("phys1", "phys2"):
        for host in (h1, h2):
            container = host.spawn_container()
            end = attach(container, host, network)
            ways[network, host.name] = container, address_of(end, 6)
            macs.add(end["mac"])
    assert len(macs) == 4
    for network in ("phys1", "phys2"):
        assert ping(ways[network, "h1"][0], ways[network, "h2"][1])


@pytest.mark.parametrize("mode", ["vxlan", "bridge"])
def test_an_address_with_another_mac_is_found_at_once(make_lab: MakeLab, mode: str) -> None:
    """Its neighbours sent to the MAC of its last holder, for half a minute and more."""
    lab = make_lab(2)
    h1, h2 = lab.hosts
    create = ("network", "create", "prod", "--mode", mode, "--subnet", "10.42.0.0/16")
    meshnet(h1, *create, "--subnet", "fd00:42::/48")
    neighbour, before, after, remote = (h1.spawn_container() for _ in range(4))
    attach(neighbour, h1, "prod")
    first = attach(before, h1, "prod")
    askers = [neighbour, h1]
    if mode == "vxlan":
        remote = h2.spawn_container()
        attach(remote, h2, "prod")
        askers.append(remote)
    once = ("-c1", "-W2")
    for asker in askers:
        assert ping(asker, address_of(first, 6))
    meshnet(h1, "detach", before.pid, "--net", "prod")
    second = attach(after, h1, "prod", "--ip", address_of(first, 6))
    assert address_of(second, 6) == address_of(first, 6)
    assert second["mac"] != first["mac"]
    for asker in askers:
        assert ping(asker, address_of(second, 6), *once)


def test_an_announcement_does_not_come_back(make_lab: MakeLab) -> None:
    """The kernel took it for another machine's, and warned that two have the address."""
    lab = make_lab(1)
    h1 = lab.host("h1")
    create_network(lab, "prod", "--subnet", "fd00:42::/48")
    container = h1.spawn_container()
    attach(container, h1, "prod")
    counted = container.run(["cat", "/proc/net/snmp6"]).stdout.split()
    assert counted[counted.index("Icmp6InNeighborAdvertisements") + 1] == "0"
