"""An attacker outside and a hostile container: what they send is dropped and counted.

Each case has a neighbour that differs only in what the rule is about, and passes.  The bad frame
is sent first: when the good one has arrived, the bad one would have.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.mesh import (
    BRIEFLY,
    address_of,
    attach,
    create_network,
    lossless,
    meshnet,
    ping,
    wait_in_sync,
)
from tests.netns.wire import Case, Wire, drops, endpoints, marker

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
IPV4, IPV6 = "10.42.0.0/16", "fd00:42::/48"
OTHER_MAC = "02:65:0a:2a:00:63"


@pytest.fixture
def lab(make_lab: MakeLab) -> Lab:
    """Two hosts with networks ``prod`` and ``dev``, and ``h9``, which is not of the mesh."""
    lab = make_lab(2)
    create_network(lab, "prod", "--subnet", IPV4, "--subnet", IPV6, "--vni", "77")
    create_network(lab, "dev", "--subnet", "10.43.0.0/16")
    lab.add_host("h9", agent=False)
    return lab


def test_a_hostile_container(lab: Lab) -> None:
    from scapy.layers.inet import IP, TCP, UDP
    from scapy.layers.inet6 import (
        ICMPv6ND_NA,
        ICMPv6ND_NS,
        ICMPv6ND_RA,
        ICMPv6ND_RS,
        ICMPv6NDOptDstLLAddr,
        IPv6,
    )
    from scapy.layers.l2 import ARP, Dot1Q, Ether
    from scapy.layers.vxlan import VXLAN

    h1, h2, _ = lab.hosts
    places = (h1, "prod"), (h1, "prod"), (h2, "prod"), (h1, "dev")
    with endpoints(*places) as (evil, victim, remote, stranger), Wire(lab.switch, "br0") as wire:
        case = Case(h1, evil.wire)
        for target in (victim.ip, victim.ip6, remote.ip, remote.ip6, lab.outside_ip):
            assert ping(evil.container, target)
        assert not any(drops(h1).values())  # nothing that honest endpoints do by themselves
        to_victim = Ether(src=evil.mac, dst=victim.mac)
        own, own6 = IP(src=evil.ip, dst=victim.ip), IPv6(src=evil.ip6, dst=victim.ip6)
        udp = UDP(sport=1, dport=9)

        # Spoofed sources: another's address, nobody's, and its own with another's MAC.
        for source in (stranger.ip, remote.ip, "10.42.0.99", "192.0.2.66", "0.0.0.0"):
            spoofed = to_victim / IP(src=source, dst=victim.ip) / udp
            case.refuses("spoofed_ipv4", spoofed, to_victim / own / udp, victim.wire)
        mac = Ether(src=OTHER_MAC, dst=victim.mac) / own / udp
        case.refuses("spoofed_ipv4", mac, to_victim / own / udp, victim.wire)
        for source in (remote.ip6, "fd00:42::99", victim.link_local, "::"):
            spoofed = to_victim / IPv6(src=source, dst=victim.ip6) / udp
            case.refuses("spoofed_ipv6", spoofed, to_victim / own6 / udp, victim.wire)
        local = IPv6(src=evil.link_local, dst=victim.link_local)
        mac = Ether(src=OTHER_MAC, dst=victim.mac) / local / udp
        case.refuses("spoofed_ipv6", mac, to_victim / local / udp, victim.wire)

        # ARP and neighbour discovery: neither the gateway's nor a neighbour's name.
        everyone = Ether(src=evil.mac, dst="ff:ff:ff:ff:ff:ff")
        honest = everyone / ARP(op=2, hwsrc=evil.mac, psrc=evil.ip, pdst=victim.ip)
        for arp in (
            ARP(op=2, hwsrc=evil.mac, psrc=evil.gateway, pdst=victim.ip),
            ARP(op=1, hwsrc=evil.mac, psrc=remote.ip, pdst=victim.ip),
            ARP(op=2, hwsrc=OTHER_MAC, psrc=evil.ip, pdst=victim.ip),
        ):
            case.refuses("spoofed_arp", everyone / arp, honest, victim.wire)
        lladdr = ICMPv6NDOptDstLLAddr(lladdr=evil.mac)
        claimed = to_victim / own6 / ICMPv6ND_NA(tgt="fd00:42::1", O=1) / lladdr
        honest = to_victim / own6 / ICMPv6ND_NA(tgt=evil.ip6, O=1) / lladdr
        case.refuses("spoofed_neighbour", claimed, honest, victim.wire)
        detects = IPv6(src="::", dst="ff02::1:ff00:1")
        claimed = everyone / detects / ICMPv6ND_NS(tgt=victim.ip6)
        case.refuses(
            "spoofed_ipv6", claimed, everyone / detects / ICMPv6ND_NS(tgt=evil.ip6), victim.wire
        )

        # It is neither a router (CVE-2020-10749) nor a bridge.
        all_nodes = IPv6(src=evil.link_local, dst="ff02::1")
        case.refuses(
            "router_advertisement",
            everyone / all_nodes / ICMPv6ND_RA(),
            everyone / all_nodes / ICMPv6ND_RS(),
            victim.wire,
        )
        tagged = everyone / Dot1Q(vlan=5) / own / udp
        case.refuses("ethertype", tagged, to_victim / own / udp, victim.wire)

        # Out of its network.
        out = Ether(src=evil.mac, dst=evil.gateway_mac())
        to_remote = out / IP(src=evil.ip, dst=remote.ip)
        for target in (stranger.ip, stranger.gateway):
            other = out / IP(src=evil.ip, dst=target) / TCP(dport=80)
            case.refuses("other_network", other, to_remote / udp, remote.wire)
        loopback = out / IP(src=evil.ip, dst="127.0.0.1") / udp
        case.refuses("loopback", loopback, to_remote / udp, remote.wire)

        # A tunnel packet would leave with the address of a member.
        tunnelled = UDP(dport=4789) / VXLAN(vni=77, flags=8) / Ether()
        for host in (h2, h1):
            vxlan = out / IP(src=evil.ip, dst=str(host.underlay_ip)) / tunnelled
            nested = to_remote / tunnelled
            case.refuses("tunnel_from_endpoint", vxlan, nested, remote.wire)
        elsewhere = marker()
        evil.wire.send(out / IP(src=evil.ip, dst=lab.outside_ip) / UDP(dport=4790) / elsewhere)
        wait_until(lambda: wire.has_seen(elsewhere), 5, "UDP to the outside")
        status = meshnet(h1, "status")
        assert status["drops"] == drops(h1)


def test_an_attacker_outside(lab: Lab) -> None:
    from scapy.layers.inet import IP, TCP, UDP
    from scapy.layers.l2 import Ether
    from scapy.layers.vxlan import VXLAN

    h1, h2, h9 = lab.hosts
    macs = {h: json.loads(h.run(["ip", "-j", "link", "show", "eth0"]).stdout)[0]["address"]
            for h in (h1, h2, h9)}  # fmt: skip
    with endpoints((h1, "prod"), (h2, "prod")) as (victim, remote), Wire(h9) as outside:
        out = Ether(src=macs[h9], dst=macs[h1])
        case = Case(h1, outside)

        # A stranger's tunnel packet; a member's; and a stranger's of another VNI, who may.
        bridge = json.loads(h1.run(["ip", "-j", "link", "show", "mnv77"]).stdout)[0]["address"]
        inner = (
            UDP(sport=9, dport=4789)
            / VXLAN(vni=77, flags=8)
            / Ether(src=OTHER_MAC, dst=bridge)
            / IP(src=remote.ip, dst=victim.ip)
            / UDP(sport=1, dport=9)
        )
        strangers = IP(src=str(h9.underlay_ip), dst=str(h1.underlay_ip))
        members = IP(src=str(h2.underlay_ip), dst=str(h1.underlay_ip))
        case.refuses("tunnel_not_a_member", out / strangers / inner, out / members / inner,
                     victim.wire)  # fmt: skip
        before = drops(h1)
        foreign = UDP(sport=9, dport=4789) / VXLAN(vni=78, flags=8) / Ether()
        outside.send(out / strangers / foreign)

        # A port that is not published; and an answer to what the container asked for itself.
        h9.run(["ip", "route", "add", IPV4, "via", str(h1.underlay_ip)])
        question = Ether(src=victim.mac, dst=victim.gateway_mac()) / IP(
            src=victim.ip, dst=str(h9.underlay_ip)
        )
        asked = marker()
        victim.wire.send(question / UDP(sport=4000, dport=4001) / asked)
        wait_until(lambda: outside.has_seen(asked), 5, "the question")
        port = Ether(outside.seen(asked)[0])[UDP].sport  # masqueraded
        answer = out / strangers / UDP(sport=4001, dport=port)
        for target in (victim.ip, remote.ip):
            for packet in (TCP(dport=80, flags="S"), UDP(sport=4001, dport=4000)):
                bad = out / IP(src=str(h9.underlay_ip), dst=target) / packet
                case.refuses("unpublished", bad, answer, victim.wire)
        assert drops(h1)["tunnel_not_a_member"] == before["tunnel_not_a_member"]


def test_an_internal_network(lab: Lab) -> None:
    create_network_with_stranger(lab, "inner", "--subnet", "10.44.0.0/16", "--internal")
    h1, h2, h9 = lab.hosts
    containers = [host.spawn_container() for host in (h1, h2)]
    inner = [attach(c, h, "inner") for c, h in zip(containers, (h1, h2), strict=True)]
    assert not containers[0].run(["ip", "route", "show", "default"]).stdout
    assert ping(containers[0], address_of(inner[1]))
    assert ping(h1, address_of(inner[0]))
    # Even with a route that somebody adds.
    containers[0].run(["ip", "route", "add", "default", "via", inner[0]["gateway"]])
    h9.run(["ip", "route", "add", "10.44.0.0/16", "via", str(h1.underlay_ip)])
    for source, target in (
        (containers[0], lab.outside_ip),
        (containers[0], str(h9.underlay_ip)),
        (h9, address_of(inner[0])),
    ):
        before = drops(h1)["internal"]
        assert not ping(source, target, *BRIEFLY)
        assert drops(h1)["internal"] > before
    open_to_all = h1.spawn_container()
    attach(open_to_all, h1, "prod")
    assert ping(open_to_all, str(h9.underlay_ip))


def create_network_with_stranger(lab: Lab, name: str, *options: str) -> None:
    """As `create_network`, in a lab with a machine that is not of the mesh."""
    h1, h2, _ = lab.hosts
    meshnet(h1, "network", "create", name, *options)
    for host in (h1, h2):
        wait_in_sync(host, peers=1)


ELEMENT = "bridge meshnet sources4"


def test_damage_is_healed_and_foreign_tables_are_left_alone(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    create_network(lab, "prod", "--subnet", IPV4)
    h1, h2 = lab.hosts
    containers = [host.spawn_container() for host in (h1, h2)]
    found = [attach(c, h, "prod") for c, h in zip(containers, (h1, h2), strict=True)]
    assert ping(containers[0], address_of(found[1]))
    h1.run(["nft", "add table inet foreign; add chain inet foreign x; add table ip meshnet"])

    def whole() -> str:
        listing = h1.run(["nft", "--stateless", "list", "ruleset"]).stdout
        # Elements are in no order, neither those of named sets nor those of rules.
        lines = (" ".join(sorted(re.split(r"[ ,]+", line))) for line in listing.splitlines())
        return "\n".join(sorted(lines))

    before = whole()
    link = f'"mne{found[0]["id"]}" . {found[0]["mac"]} . {address_of(found[0])}'
    stranger = f'"mne{found[0]["id"]}" . {OTHER_MAC} . 10.42.0.77'
    damage = (
        f"delete element {ELEMENT} {{ {link} }}",
        f"add element {ELEMENT} {{ {stranger} }}",
        "flush set inet meshnet members4",
        "insert rule inet meshnet forward counter drop",
        "flush chain bridge meshnet from_arp",
        "delete table bridge meshnet",
        "delete table inet meshnet",
    )
    for command in damage:
        h1.run(["nft", command])
        wait_until(lambda: whole() == before, 20, f"healed: {command}")
    h1.run(["nft", "delete table inet foreign; delete table ip meshnet"])
    ours = whole()
    h1.run(["nft", "flush", "ruleset"])
    wait_until(lambda: whole() == ours, 20, "healed: flush ruleset")
    assert ping(containers[0], address_of(found[1]))
    wait_in_sync(h1)


def test_what_comes_and_goes_neither_loads_rules_nor_asks_for_passes(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    create_network(lab, "prod", "--subnet", IPV4)
    h1, h2 = lab.hosts
    containers = [host.spawn_container() for host in (h1, h2, h1)]
    found = [attach(c, h, "prod") for c, h in zip(containers, (h1, h2), strict=False)]
    wait_in_sync(h1)

    def handles() -> list[int]:
        """A chain that is made anew has another handle."""
        listing = json.loads(h1.run(["nft", "-j", "list", "chains"]).stdout)["nftables"]
        return [item["chain"]["handle"] for item in listing if "chain" in item]

    def full_passes() -> int:
        return int(meshnet(h1, "status")["kernel"]["full_passes"])

    loaded, passes = handles(), full_passes()
    with lossless(containers[0], address_of(found[1])):
        attach(containers[2], h1, "prod")
        meshnet(h1, "detach", containers[2].pid, "--net", "prod")
        assert full_passes() == passes
        lab.add_host("h3")
        wait_in_sync(h1, peers=2)
        assert handles() == loaded
        h1.stop_agent()
        h1.start_agent()
        assert handles() == loaded
        # A network more is another skeleton; nothing is lost while it is loaded, by an agent that
        # did not itself connect the endpoint.
        create_network(lab, "dev", "--subnet", "10.43.0.0/16")
        assert handles() != loaded
    assert ping(containers[0], address_of(found[1]))
