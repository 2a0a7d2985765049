"""Packets between containers of several hosts, and what they look like on the underlay."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.mesh import (
    BRIEFLY,
    Document,
    address_of,
    attach,
    captured,
    create_network,
    meshnet,
    ping,
    wait_in_sync,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.host import LabContainer
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
IPV4, IPV6 = "10.42.0.0/16", "fd00:42::/48"


class _Mesh:
    """A lab with network ``prod`` and one attached container a host."""

    def __init__(self, lab: Lab, *options: str) -> None:
        self.lab = lab
        self.network = create_network(lab, "prod", *options)
        self.containers = [host.spawn_container() for host in lab.hosts]
        self.endpoints = [
            attach(c, h, "prod") for c, h in zip(self.containers, lab.hosts, strict=True)
        ]

    def pairs(self) -> list[tuple[LabContainer, Document]]:
        """Every container with every other's endpoint."""
        return [
            (self.containers[a], self.endpoints[b])
            for a, b in itertools.permutations(range(len(self.containers)), 2)
        ]


@pytest.mark.parametrize("underlay_family", [4, 6])
def test_every_pair_over_three_hosts(make_lab: MakeLab, underlay_family: int) -> None:
    lab = make_lab(3, underlay_family=underlay_family)
    mesh = _Mesh(lab, "--subnet", IPV4, "--subnet", IPV6)
    assert mesh.network["mtu"] == 1500 - (50 if underlay_family == 4 else 70)
    for container, target in mesh.pairs():
        assert ping(container, address_of(target, 4))
        assert ping(container, address_of(target, 6))
    # Two containers of one host, and the host's own processes.
    second = lab.host("h1").spawn_container()
    attach(second, lab.host("h1"), "prod")
    assert ping(second, address_of(mesh.endpoints[0], 4))
    assert ping(second, address_of(mesh.endpoints[1], 6))
    for host in lab.hosts:
        for endpoint in mesh.endpoints:
            assert ping(host, address_of(endpoint, 4))
            assert ping(host, address_of(endpoint, 6))


def test_ipv6_only_network(make_lab: MakeLab) -> None:
    mesh = _Mesh(make_lab(2), "--subnet", IPV6)
    assert mesh.network["host_prefix"] == 64
    for container, target in mesh.pairs():
        assert ping(container, address_of(target, 6))


def test_vxlan_on_the_wire(make_lab: MakeLab, tmp_path: Path) -> None:
    """RFC 7348: outer addresses, UDP port, VNI; inner MACs are the VTEPs'."""
    from scapy.layers.inet import ICMP, IP, UDP
    from scapy.layers.vxlan import VXLAN

    lab = make_lab(2)
    mesh = _Mesh(lab, "--subnet", IPV4, "--vni", "77", "--port", "4790")
    source, target = (address_of(e) for e in mesh.endpoints)
    with captured(lab, tmp_path / "wire.pcap", "udp port 4790") as packets:
        assert ping(mesh.containers[0], target)
    decoded = [VXLAN(bytes(p[UDP].payload)) for p in packets]
    requests = [
        (outer, inner)
        for outer, inner in zip(packets, decoded, strict=True)
        if ICMP in inner and inner[ICMP].type == 8
    ]
    assert requests
    outer, inner = requests[0]
    h1, h2 = lab.hosts
    assert (outer[IP].src, outer[IP].dst) == (str(h1.underlay_ip), str(h2.underlay_ip))
    assert outer[UDP].dport == 4790
    assert (inner.vni, int(inner.flags)) == (77, 0x08)
    assert (inner[IP].src, inner[IP].dst) == (source, target)
    networks = [meshnet(h, "network", "inspect", "prod") for h in lab.hosts]
    subnets = [networks[0]["hosts"][h.name][0] for h in lab.hosts]
    assert [inner.src, inner.dst] == [_vtep_mac(s) for s in subnets]
    # A captured packet of the other direction has them the other way round.
    reply = next(i for i in decoded if ICMP in i and i[ICMP].type == 0)
    assert [reply.src, reply.dst] == [_vtep_mac(s) for s in reversed(subnets)]


def _vtep_mac(subnet: str) -> str:
    octets = subnet.partition("/")[0].split(".")
    return "02:6d:" + ":".join(f"{int(o):02x}" for o in octets)


@pytest.mark.parametrize(("version", "header"), [(4, 28), (6, 48)])
def test_mtu_edge(make_lab: MakeLab, tmp_path: Path, version: int, header: int) -> None:
    """The largest packet passes with DF; one byte more is refused by ICMP, never dropped silently.

    The container's own interface is given a larger MTU, so that it is the host that refuses.
    """
    lab = make_lab(2)
    mesh = _Mesh(lab, "--subnet", IPV4, "--subnet", IPV6)
    mtu = mesh.network["mtu"]
    source, target = mesh.containers[0], address_of(mesh.endpoints[1], version)
    fits = ["-M", "do", "-s", str(mtu - header)]
    with captured(lab, tmp_path / "mtu.pcap", "udp port 4789") as packets:
        assert ping(source, target, *fits)
    assert max(len(p) for p in packets) == 1514  # the underlay's MTU, and the Ethernet header
    source.run(["ip", "link", "set", "eth0", "mtu", str(mtu + 1)])
    assert ping(source, target, *fits)
    too_big = ["ping", "-n", "-c1", "-W2", "-M", "do", "-s", str(mtu - header + 1), target]
    refused = source.run(too_big, check=False)
    assert refused.returncode == 1
    gateway = mesh.endpoints[0]["gateway" if version == 4 else "gateway6"]
    assert f"From {gateway}" in refused.stdout
    assert f"mtu = {mtu}" in refused.stdout or f"mtu={mtu}" in refused.stdout


def test_jumbo_underlay_and_fixed_mtu(make_lab: MakeLab) -> None:
    lab = make_lab(2, mtu=9000)
    assert create_network(lab, "auto", "--subnet", IPV4)["mtu"] == 8950
    assert create_network(lab, "fixed", "--subnet", "10.50.0.0/16", "--mtu", "1400")["mtu"] == 1400
    container = lab.host("h1").spawn_container()
    endpoint = attach(container, lab.host("h1"), "fixed")
    assert endpoint["mtu"] == 1400
    assert "mtu 1400" in container.run(["ip", "link", "show", "eth0"]).stdout


def test_underlay_mtu_change_is_followed(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    create_network(lab, "prod", "--subnet", IPV4)
    for host in lab.hosts:
        host.run(["ip", "link", "set", "eth0", "mtu", "1400"])
        wait_in_sync(host)
    for host in lab.hosts:
        wait_until(lambda: meshnet(host, "network", "ls")[0]["mtu"] == 1350, 5, "the new MTU")  # noqa: B023


def test_networks_are_isolated(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    prod = _Mesh(lab, "--subnet", IPV4, "--subnet", IPV6)
    create_network(lab, "dev", "--subnet", "10.43.0.0/16", "--subnet", "fd00:43::/48")
    for host in lab.hosts:
        stranger = host.spawn_container()
        endpoint = attach(stranger, host, "dev")
        for target in prod.endpoints:
            assert not ping(stranger, address_of(target, 4), *BRIEFLY)
            assert not ping(stranger, address_of(target, 6), *BRIEFLY)
            # The other network's gateway on the same host is not reachable either.
            assert not ping(stranger, target["gateway"], *BRIEFLY)
        assert not ping(prod.containers[0], address_of(endpoint, 4), *BRIEFLY)
        assert ping(stranger, endpoint["gateway"])
    for container, target in prod.pairs():
        assert ping(container, address_of(target, 4))


def test_direct_routing_shows_no_vxlan(make_lab: MakeLab, tmp_path: Path) -> None:
    from scapy.layers.inet import ICMP, IP, UDP

    lab = make_lab(3)
    mesh = _Mesh(lab, "--subnet", IPV4, "--direct-routing")
    with captured(lab, tmp_path / "direct.pcap", "icmp or udp") as packets:
        for container, target in mesh.pairs():
            assert ping(container, address_of(target))
    assert not [p for p in packets if UDP in p and p[UDP].dport == 4789]
    inner = {address_of(e) for e in mesh.endpoints}
    assert {p[IP].src for p in packets if ICMP in p} == inner  # and nobody masqueraded


def test_direct_routing_tunnels_to_peers_behind_a_router(make_lab: MakeLab, tmp_path: Path) -> None:
    """Peers that are on-link are reached directly, the one behind a gateway by VXLAN."""
    from scapy.layers.inet import UDP

    lab = make_lab(3)
    h1, h3 = lab.host("h1"), lab.host("h3")
    router = str(lab.underlay.gateway_ip)
    settings = "/proc/sys/net/ipv4/conf/all"
    lab.switch.run(
        ["sh", "-c", f"echo 1 >{settings}/forwarding; echo 0 >{settings}/send_redirects"]
    )
    for here, there in ((h1, h3), (h3, h1)):
        here.run(["ip", "route", "add", f"{there.underlay_ip}/32", "via", router])
    mesh = _Mesh(lab, "--subnet", IPV4, "--direct-routing")
    with captured(lab, tmp_path / "far.pcap", "udp port 4789") as packets:
        assert ping(mesh.containers[0], address_of(mesh.endpoints[1]))
    assert not packets
    with captured(lab, tmp_path / "near.pcap", "udp port 4789") as packets:
        assert ping(mesh.containers[0], address_of(mesh.endpoints[2]))
    assert [p for p in packets if UDP in p]


def test_tcp_with_offloads(make_lab: MakeLab) -> None:
    """A megabyte each way arrives intact, with the default segmentation offloads."""
    lab = make_lab(2)
    mesh = _Mesh(lab, "--subnet", IPV4, "--subnet", IPV6)
    features = mesh.containers[0].run(["ethtool", "-k", "eth0"]).stdout
    assert "tcp-segmentation-offload: on" in features
    for version in (4, 6):
        target = address_of(mesh.endpoints[1], version)
        server = mesh.containers[1].popen(["iperf3", "-s", "-1", "-B", target])
        _wait_for_server(mesh.containers[1])
        done = mesh.containers[0].run(
            ["iperf3", "-c", target, "-n", "50M", "--bidir", "-J"], check=False
        )
        server.communicate(timeout=10)
        assert done.returncode == 0, done.stdout[-500:]
        assert '"error"' not in done.stdout


def _wait_for_server(container: LabContainer) -> None:
    listening = ["ss", "-Hltn", "sport", "=", ":5201"]
    wait_until(lambda: container.run(listening).stdout, 10, "the iperf3 server")


def test_traffic_out_of_the_network_is_masqueraded(make_lab: MakeLab, tmp_path: Path) -> None:
    from scapy.layers.inet import ICMP, IP

    lab = make_lab(2)
    mesh = _Mesh(lab, "--subnet", IPV4)
    with captured(lab, tmp_path / "out.pcap", "icmp") as packets:
        assert ping(mesh.containers[0], str(lab.outside_ip))
    sources = {p[IP].src for p in packets if ICMP in p and p[ICMP].type == 8}
    assert sources == {str(lab.host("h1").underlay_ip)}


def test_subnet_nobody_owns_is_unreachable(make_lab: MakeLab, tmp_path: Path) -> None:
    """Its packets must not leave by the host's default route."""
    lab = make_lab(2)
    mesh = _Mesh(lab, "--subnet", IPV4)
    with captured(lab, tmp_path / "nobody.pcap", "icmp") as packets:
        done = mesh.containers[0].run(["ping", "-n", "-c1", "-W1", "10.42.200.9"], check=False)
    assert "Unreachable" in done.stdout
    assert not packets
