"""What a machine on the same LAN sends, and what leaves the host towards it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pytest

from tests.netns.mesh import address_of, attach, create_network, meshnet, wait_in_sync
from tests.netns.talk import ask, serving
from tests.netns.wire import Case, Wire, endpoints, mac_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from scapy.packet import Packet

    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
LOCAL = ("--subnet", "172.30.0.0/24", "--subnet", "fd00:30::/64", "--mode", "bridge")


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("direct", [False, True])
def test_nothing_leaves_with_an_address_of_its_own(
    make_lab: MakeLab, family: Literal[4, 6], direct: bool
) -> None:
    """What connection tracking cannot place is not masqueraded; within the mesh it may go on."""
    from scapy.layers.inet import IP, TCP, UDP
    from scapy.layers.inet6 import ICMPv6ND_NS, IPv6
    from scapy.layers.l2 import Ether

    lab = make_lab(2, underlay_family=family)
    h1, h2 = lab.hosts
    options = ("--direct-routing",) if direct else ()
    create_network(lab, "prod", "--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48", *options)
    places = (h1, "prod"), (h2, "prod")
    with endpoints(*places) as (sender, remote), Wire(lab.switch, "br0") as wire:
        case = Case(h1, sender.wire)
        layer = IP if family == 4 else IPv6
        own, there = (e.ip if family == 4 else e.ip6 for e in (sender, remote))
        frame = Ether(src=sender.mac, dst=sender.gateway_mac())
        out = frame / layer(src=own, dst=lab.outside_ip)
        strays: list[Packet] = [TCP(sport=7, dport=80, flags=flags) for flags in ("R", "FA", "SR")]
        if family == 6:
            strays.append(ICMPv6ND_NS(tgt=lab.outside_ip))
        for stray in strays:
            within = frame / layer(src=own, dst=there) / stray
            case.refuses("untranslatable", out / stray, out / UDP(sport=7, dport=9), wire)
            case.refuses("untranslatable", out / stray, within, remote.wire)


def test_loopback_addresses_are_for_the_host_alone(make_lab: MakeLab) -> None:
    """Not for a neighbour or an endpoint that puts them into a frame to the host's MAC."""
    from scapy.layers.inet import IP, TCP, UDP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether

    lab = make_lab(1)
    (host,) = lab.hosts
    neighbour = lab.add_host("neighbour", agent=False)
    bridge = f"mnb{meshnet(host, 'network', 'create', 'local', *LOCAL)['vni']}"
    wait_in_sync(host)
    web, beside = host.spawn_container(), host.spawn_container()
    published = [f"{at}:{p}" for at in ("8080", "127.0.0.1:8082") for p in ("80", "80/udp")]
    attach(web, host, "local", *(word for text in published for word in ("--publish", text)))
    from_beside = attach(beside, host, "local")
    address = str(host.underlay_ip)
    outside = Ether(src=mac_of(neighbour), dst=mac_of(host))
    inside = Ether(src=from_beside["mac"], dst=mac_of(host, bridge))

    def transport(protocol: str, port: int) -> Packet:
        return UDP(sport=9, dport=port) if protocol == "udp" else TCP(dport=port, flags="S")

    with serving((web, "web")), Wire(neighbour) as lan, Wire(beside) as own, Wire(web) as server:
        for sender, frame, source, source6 in (
            (lan, outside, str(neighbour.underlay_ip), "fd00:99::1"),
            (own, inside, address_of(from_beside), address_of(from_beside, 6)),
        ):
            case = Case(host, sender)
            for protocol in ("tcp", "udp"):
                good = frame / IP(src=source, dst=address) / transport(protocol, 8080)
                for target, port in (("127.0.0.1", 8082), ("127.0.0.1", 8080), ("127.7.7.7", 8080)):
                    bad = frame / IP(src=source, dst=target) / transport(protocol, port)
                    case.refuses("loopback", bad, good, server)
                # The kernel itself drops these, and does not tell (ip6_rcv_core).
                bad = frame / IPv6(src=source6, dst="::1") / transport(protocol, 8080)
                case.refuses(None, bad, good, server)
        for protocol in ("tcp", "udp"):
            assert ask(host, "127.0.0.1", 8082, protocol).name == "web"
            assert ask(host, "127.7.7.7", 8080, protocol).name == "web"
