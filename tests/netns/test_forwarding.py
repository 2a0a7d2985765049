"""All links of a host bring packets: a third NIC, one that comes later, one that hears routers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.mesh import attach, meshnet, ping, wait_in_sync
from tests.netns.talk import ask, is_closed, serving
from tests.netns.wire import Wire, mac_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
LOCAL = ("--subnet", "172.30.0.0/24", "--mode", "bridge")
DUAL = ("--subnet", "172.31.0.0/24", "--subnet", "fd00:31::/64", "--mode", "bridge")


def connect(host: LabHost, machine: LabHost, link: str, number: int) -> None:
    """Another LAN, between a host and a machine: 198.51.100.1 and .2 of its own /30."""
    host.run(["ip", "link", "add", link, "type", "veth", "peer", "name", link,
              "netns", str(machine.netns_path)])  # fmt: skip
    for end, last in ((host, 4 * number + 1), (machine, 4 * number + 2)):
        end.run(["ip", "address", "add", f"198.51.100.{last}/30", "dev", link])
        end.run(["ip", "link", "set", link, "up"])
    # What the host has behind that machine, as over a VPN.
    machine.run(["ip", "address", "add", f"10.250.{number}.1/32", "dev", "lo"])
    host.run(["ip", "route", "add", f"10.250.{number}.0/24", "via", f"198.51.100.{4 * number + 2}"])


def test_every_link_leads_in_and_out(make_lab: MakeLab) -> None:
    """A published port answers there, and endpoints reach what is there and behind it."""
    lab = make_lab(1)
    (host,) = lab.hosts
    machine = lab.add_host("machine", agent=False)
    machine.run(["ip", "link", "set", "eth0", "down"])
    connect(host, machine, "lan1", 1)
    meshnet(host, "network", "create", "local", *LOCAL)
    wait_in_sync(host)
    web = host.spawn_container()
    attach(web, host, "local", "--publish", "8080:80", "--publish", "8080:80/udp")
    with serving((web, "web")):
        for number, link in ((1, "lan1"), (2, "lan2")):
            if number == 2:
                connect(host, machine, link, number)  # while the agent runs
                wait_until(lambda: forwards(host, "lan2"), 5, "the new link forwards")
            for protocol in ("tcp", "udp"):
                assert ask(machine, f"198.51.100.{4 * number + 1}", 8080, protocol).name == "web"
            assert ping(web, f"198.51.100.{4 * number + 2}")
            assert ping(web, f"10.250.{number}.1")
        # Somebody hardens the host.
        host.run(["sysctl", "-w", "net.ipv4.ip_forward=1"])
        host.run(["sysctl", "-w", "net.ipv4.ip_forward=0"])
        wait_until(lambda: forwards(host, "lan1") and forwards(host, "lan2"), 5, "it is healed")
        assert ask(machine, "198.51.100.5", 8080).name == "web"
        host.run(["ip", "link", "del", "lan1"])
        assert is_closed(machine, "198.51.100.5", 8080)
    wait_in_sync(host)


def forwards(host: LabHost, link: str) -> bool:
    """Whether packets that come by a link are forwarded."""
    return host.run(["sysctl", "-n", f"net.ipv4.conf.{link}.forwarding"]).stdout.strip() == "1"


def test_links_that_hear_routers_go_on_hearing_them(make_lab: MakeLab) -> None:
    """IPv6 forwarding, which a network needs, deafens links that are not told otherwise."""
    from scapy.layers.inet6 import (
        ICMPv6ND_RA,
        ICMPv6NDOptPrefixInfo,
        ICMPv6NDOptSrcLLAddr,
        IPv6,
    )
    from scapy.layers.l2 import Ether

    lab = make_lab(1)
    (host,) = lab.hosts
    router = lab.add_host("router", agent=False)
    for link, number in (("lan1", 1), ("deaf", 3)):
        connect(host, router, link, number)
    host.run(["sysctl", "-w", "net.ipv6.conf.deaf.accept_ra=0"])

    def advertise(link: str, prefix: str) -> None:
        mac = mac_of(router, link)
        source = json.loads(router.run(["ip", "-j", "-6", "address", "show", link]).stdout)
        local = next(a["local"] for a in source[0]["addr_info"] if a["scope"] == "link")
        option = ICMPv6NDOptPrefixInfo(
            prefix=prefix, prefixlen=64, validlifetime=600, preferredlifetime=300
        )
        with Wire(router, link) as wire:
            wire.send(
                Ether(src=mac, dst="33:33:00:00:00:01")
                / IPv6(src=local, dst="ff02::1", hlim=255)
                / ICMPv6ND_RA(routerlifetime=600)
                / option
                / ICMPv6NDOptSrcLLAddr(lladdr=mac)
            )

    def heard(link: str, prefix: str) -> bool:
        address = host.run(["ip", "-6", "address", "show", "dev", link]).stdout
        route = host.run(["ip", "-6", "route", "show", "default", "dev", link]).stdout
        return prefix.removesuffix("::") in address and "default" in route

    def hears(link: str, prefix: str) -> bool:
        advertise(link, prefix)
        return heard(link, prefix)

    wait_until(lambda: hears("lan1", "2001:db8:1::"), 10, "it hears the router")
    meshnet(host, "network", "create", "dual", *DUAL)
    wait_in_sync(host)
    assert host.run(["sysctl", "-n", "net.ipv6.conf.all.forwarding"]).stdout.strip() == "1"
    # What it heard before, what it hears then, and what comes later.
    assert heard("lan1", "2001:db8:1::")
    wait_until(lambda: hears("lan1", "2001:db8:11::"), 10, "it still hears the router")
    connect(host, router, "lan2", 2)
    wait_until(lambda: hears("lan2", "2001:db8:2::"), 10, "a new link hears the router")
    assert not hears("deaf", "2001:db8:3::")
    # Somebody reads settings from their files again; the next pass is that of a new link.
    setting = "net.ipv6.conf.lan1.accept_ra"
    host.run(["sysctl", "-w", f"{setting}=1"])
    connect(host, router, "lan4", 4)
    healed = lambda: host.run(["sysctl", "-n", setting]).stdout.strip() == "2"  # noqa: E731
    wait_until(healed, 10, "the setting is healed")
    meshnet(host, "network", "rm", "dual")
    assert heard("lan2", "2001:db8:2::")
