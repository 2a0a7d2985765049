"""Beside what else manages networks and firewalls on a host: packets go on, or come back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.vm.mesh import address_of, attach, inside

if TYPE_CHECKING:
    from tests.vm.mesh import Mesh

_HARDENING = """
net.ipv4.conf.all.rp_filter = 1
net.ipv4.conf.default.rp_filter = 1
net.ipv4.conf.all.accept_redirects = 0
net.ipv4.conf.all.send_redirects = 0
net.ipv4.conf.all.accept_source_route = 0
net.ipv4.conf.all.log_martians = 0
net.ipv4.icmp_echo_ignore_broadcasts = 1
net.ipv6.conf.all.accept_ra = 0
net.ipv6.conf.default.accept_ra = 0
"""


@pytest.mark.parametrize(
    "event",
    [
        "networkctl reload && networkctl reconfigure eth0",
        "systemctl restart systemd-networkd",
        "systemctl start NetworkManager",
        "systemctl start nftables && systemctl restart nftables",
        "nft flush ruleset",
        "sysctl --system",
        "ip link set eth0 down && sleep 2 && ip link set eth0 up",
        "systemctl start firewalld && firewall-cmd --reload",
        "systemctl start docker",
        "ufw allow 22/tcp && ufw --force enable && ufw reload",
        "systemctl restart meshnet-agent",
        "kill -9 $(systemctl show -P MainPID meshnet-agent)",
    ],
)
def test_the_mesh_outlives(mesh: Mesh, event: str) -> None:
    one, two, _ = mesh.machines
    one.write("/etc/sysctl.d/90-hardening.conf", _HARDENING)
    mesh.start_agents()
    mesh.create("prod", "--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48")
    here, there = attach(one, "prod"), attach(two, "prod")
    for version in (4, 6):
        inside(one, here, f"ping -c 2 -W 5 {address_of(there, version)}")
    # By the console's side: ssh may go down with eth0.
    one.run(f"setsid sh -c '{event}' >/root/event 2>&1 </dev/null")

    def reaches() -> bool:
        return all(
            one.run(
                f"nsenter --net=/proc/{here['pid']}/ns/net ping -c 1 -W 2 "
                f"{address_of(there, version)}",
                check=False,
            ).returncode
            == 0
            for version in (4, 6)
        )

    said = one.run("cat /root/event").stdout
    wait_until(reaches, 40, f"packets pass again after {event}: {said}")
    mesh.allowed += ["store", "lease", "is gone", "made again", "underlay"]
    mesh.wait_in_sync()
