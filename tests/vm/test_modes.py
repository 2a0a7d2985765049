"""Every mode between real machines: pings, TCP, and packets at the edge of the MTU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.vm.mesh import address_of, attach, inside, meshnet, wait_active

if TYPE_CHECKING:
    from tests.vm.mesh import Mesh


@pytest.mark.parametrize("mode", ["vxlan", "udp"])
def test_overlay(mesh: Mesh, mode: str) -> None:
    mesh.start_agents()
    mesh.create("prod", "--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48", "--mode", mode)
    one, two, _ = mesh.machines
    here, there, third = (attach(machine, "prod") for machine in mesh.machines)
    for other in (there, third):
        inside(one, here, f"ping -c 3 -W 5 {address_of(other)}")
        inside(one, here, f"ping -c 3 -W 5 {address_of(other, 6)}")
    mtu = here["mtu"]
    inside(one, here, f"ping -c 1 -W 5 -M do -s {mtu - 28} {address_of(there)}")
    inside(one, here, f"ping -c 1 -W 5 -M do -s {mtu - 48} {address_of(there, 6)}")
    too_long = f"ping -c 1 -W 2 -M do -s {mtu - 27} {address_of(there)}"
    assert "message too long" in inside(one, here, f"{too_long} 2>&1", check=False)
    server = f"nsenter --net=/proc/{there['pid']}/ns/net iperf3 -s -D -1"
    for version in (4, 6):
        two.run(server)
        text = inside(one, here, f"iperf3 -J -t 3 -c {address_of(there, version)}", timeout_s=60)
        assert '"error"' not in text


def test_direct_routing(mesh: Mesh) -> None:
    mesh.start_agents()
    mesh.create("prod", "--subnet", "10.42.0.0/16", "--direct-routing")
    one, two, _ = mesh.machines
    here, there = attach(one, "prod"), attach(two, "prod")
    inside(one, here, f"ping -c 3 -W 5 {address_of(there)}")
    assert "dev eth0" in one.run(f"ip route get {address_of(there)}").stdout


def test_macvlan(mesh: Mesh) -> None:
    mesh.start_agents()
    mesh.create(
        *("phys", "--mode", "macvlan", "--parent", "eth0", "--subnet", "192.0.2.0/24"),
        *("--range", "192.0.2.128-192.0.2.191", "--gateway", "192.0.2.254"),
    )
    one, two, _ = mesh.machines
    here, there = attach(one, "phys"), attach(two, "phys")
    inside(one, here, f"ping -c 3 -W 5 {address_of(there)}")
    inside(one, here, "ping -c 3 -W 5 192.0.2.254")


def test_a_bridge_in_the_place_of_eth0(mesh: Mesh) -> None:
    """Its addresses and routes move to the bridge and back; ssh, which uses them, goes on."""
    mesh.start_agents()
    one, two, _ = mesh.machines
    routes = one.run("ip route show default").stdout
    mesh.create(
        *("phys", "--mode", "underlay-bridge", "--parent", "eth0", "--subnet", "192.0.2.0/24"),
        *("--range", "192.0.2.128-192.0.2.191", "--gateway", "192.0.2.254"),
    )
    assert "mnp" in one.run("ip route show default").stdout
    here, there = attach(one, "phys"), attach(two, "phys")
    inside(one, here, f"ping -c 3 -W 5 {address_of(there)}")
    inside(one, here, "ping -c 3 -W 5 192.0.2.254")
    one.reboot()
    wait_active(one)
    mesh.wait_in_sync()
    inside(two, there, f"ping -c 3 -W 5 {address_of(attach(one, 'phys'))}")
    for machine in mesh.machines:
        for endpoint in meshnet(machine, "endpoint", "ls"):
            if endpoint["host"] == machine.name:
                meshnet(machine, "detach", endpoint["pid"], "--net", "phys")
    wait_until(lambda: not meshnet(one, "endpoint", "ls"), 20, "no endpoint is left")
    meshnet(one, "network", "rm", "phys")
    wait_until(
        lambda: one.run("ip route show default").stdout == routes, 30, "eth0 has its routes again"
    )


def test_a_network_of_each_host(mesh: Mesh) -> None:
    """Mode bridge: NAT to the outside, and a published port."""
    mesh.start_agents()
    mesh.create("local", "--mode", "bridge", "--subnet", "172.30.0.0/24")
    one, two, _ = mesh.machines
    serve = "busybox httpd -f -p 80 -h /etc/meshnet"
    pid = one.spawn(f"ip link set lo up; exec {serve}")
    web = meshnet(one, "attach", pid, "--net", "local", "--publish", "8080:80")
    inside(one, web, "ping -c 3 -W 5 192.0.2.254")
    got = two.run(f"curl -sS --max-time 10 http://{one.address}:8080/agent.toml").stdout
    assert got.startswith("etcd = ")
