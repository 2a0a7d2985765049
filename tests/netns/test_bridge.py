"""Mode ``bridge``: every host has the network for itself, with a way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.netns.mesh import (
    BRIEFLY,
    address_of,
    attach,
    captured,
    meshnet,
    ping,
    wait_in_sync,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
SUBNETS = ("--subnet", "172.30.0.0/24", "--subnet", "fd00:30::/64")


@pytest.mark.parametrize("family", [4, 6])
def test_every_host_has_the_network_for_itself(
    make_lab: MakeLab, tmp_path: Path, family: int
) -> None:
    from scapy.layers.inet import IP
    from scapy.layers.inet6 import IPv6

    lab = make_lab(2, underlay_family=family)
    h1, h2 = lab.hosts
    network = meshnet(h1, "network", "create", "local", *SUBNETS, "--mode", "bridge")
    assert (network["mode"], network["port"], network["mtu"]) == ("bridge", None, 1500)
    for host in lab.hosts:
        wait_in_sync(host, peers=0)
    one, two, there = h1.spawn_container(), h1.spawn_container(), h2.spawn_container()
    mine = attach(one, h1, "local")
    beside = attach(two, h1, "local", "--ip", "172.30.0.77")
    same = attach(there, h2, "local")
    # Neither host knows the other's network, so both give out the same addresses.
    assert mine["address"] == same["address"] == "172.30.0.2/24"
    assert mine["gateway"] == "172.30.0.1"
    for version in (4, 6):
        assert ping(one, address_of(beside, version))
        assert ping(one, mine["gateway" if version == 4 else "gateway6"])
        assert ping(h1, address_of(beside, version))
        assert not ping(there, address_of(beside, version), *BRIEFLY)
    assert {d["id"]: d["subnets"] for d in meshnet(h1, "hosts")} == {"h1": {}, "h2": {}}

    # Out of the network: as the host, which knows where the answer belongs.
    header = IP if family == 4 else IPv6
    with captured(lab, tmp_path / "out.pcap", "icmp or icmp6") as packets:
        assert ping(one, str(lab.underlay.outside_ip))
        assert ping(one, str(h2.underlay_ip))
    outside = str(lab.underlay.outside_ip)
    sources = {p[header].src for p in packets if header in p and p[header].dst == outside}
    assert sources == {str(h1.underlay_ip)}
    inner = {address_of(mine, family), address_of(beside, family)}
    assert not inner & {p[header].src for p in packets if header in p}

    # A restart finds all of it and changes nothing.
    h1.kill_agent()
    assert ping(one, str(lab.underlay.outside_ip))
    h1.start_agent()
    assert wait_in_sync(h1, peers=0)["kernel"]["writes"] == 0
    meshnet(h1, "detach", two.pid, "--net", "local")
    assert "172.30.0.77" not in str(meshnet(h1, "endpoint", "ls"))
    assert ping(one, str(lab.underlay.outside_ip))
