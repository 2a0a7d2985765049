"""A wire that loses, delays, reorders, doubles and damages packets, and a narrow one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.vm.mesh import address_of, attach, inside

if TYPE_CHECKING:
    from tests.vm.mesh import Mesh


@pytest.mark.parametrize(
    "trouble",
    ["loss 2%", "delay 30ms 10ms", "delay 10ms reorder 25% 50%", "duplicate 5%", "corrupt 1%"],
)
@pytest.mark.parametrize("mode", ["vxlan", "udp"])
def test_tcp_gets_through(mesh: Mesh, mode: str, trouble: str) -> None:
    mesh.start_agents()
    mesh.create("prod", "--subnet", "10.42.0.0/16", "--mode", mode)
    one, two, _ = mesh.machines
    here, there = attach(one, "prod"), attach(two, "prod")
    one.run("modprobe sch_netem")
    one.run(f"tc qdisc add dev eth0 root netem {trouble}")
    two.run("head -c 3000000 /dev/urandom > /root/sent; cp /root/sent /tmp/sent")
    server = f"nsenter --net=/proc/{there['pid']}/ns/net nc -l -p 9 -N < /root/sent"
    two.run(f"setsid sh -c '{server}' >/dev/null 2>&1 &")
    got = inside(*(one, here, f"nc -d {address_of(there)} 9 | sha256sum"), timeout_s=100).split()[0]
    assert got == two.run("sha256sum < /root/sent").stdout.split()[0]
