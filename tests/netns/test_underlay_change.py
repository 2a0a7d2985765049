"""A host that gets another underlay address, as DHCP hands them out, while packets go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.mesh import address_of, attach, create_network, meshnet, ping, wait_in_sync

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
NETWORKS = {"prod": ("vxlan", "10.42.0.0/16"), "slow": ("udp", "10.43.0.0/16")}


@pytest.mark.parametrize("first", ["add", "del"])
def test_a_changed_underlay_address_is_published_and_followed(
    make_lab: MakeLab, first: str
) -> None:
    """Neither agent is restarted; renewals add the new address before or after the old one goes."""
    lab = make_lab(2)
    h2 = lab.host("h2")
    h2.run(["sysctl", "-qw", "net.ipv4.conf.eth0.promote_secondaries=1"])  # as systemd does
    h2.stop_agent()
    h2.start_agent(by_link=True)
    ways = []
    for name, (mode, cidr) in NETWORKS.items():
        create_network(lab, name, "--mode", mode, "--subnet", cidr)
        containers = [host.spawn_container() for host in lab.hosts]
        ends = [attach(c, h, name) for c, h in zip(containers, lab.hosts, strict=True)]
        ways.append((containers[0], address_of(ends[1])))
    assert all(ping(*way) for way in ways)
    pids = [host.agent_pid for host in lab.hosts]
    prefix = lab.underlay.network.prefixlen
    old, new = h2.underlay_ip, lab.underlay.host_ip(77)
    changes = {"add": f"{new}/{prefix}", "del": f"{old}/{prefix}"}
    for change in sorted(changes, reverse=first == "del"):
        h2.run(["ip", "address", change, changes[change], "dev", "eth0"])
    h2.run(["ip", "route", "replace", "default", "via", str(lab.underlay.gateway_ip)])

    def known_to(host_number: int) -> bool:
        hosts = {h["id"]: h for h in meshnet(lab.hosts[host_number], "hosts")}
        return bool(hosts["h2"]["underlay_ip"] == str(new) and hosts["h2"]["alive"])

    wait_until(lambda: known_to(0) and known_to(1), 10, "the new address")
    assert meshnet(h2, "status")["host"]["underlay_ip"] == str(new)
    for host in lab.hosts:
        wait_in_sync(host, peers=1)
    assert all(ping(*way) for way in ways)
    assert [host.agent_pid for host in lab.hosts] == pids
