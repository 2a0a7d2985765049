"""Every mode between real machines: pings, TCP, and packets at the edge of the MTU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.vm.mesh import address_of, attach, inside

if TYPE_CHECKING:
    from tests.vm.mesh import Mesh


@pytest.mark.parametrize("mode", ["vxlan", "udp"])
def test_overlay(mesh: Mesh, mode: str) -> None:
    mesh.start_agents()
    mesh.create("prod", "--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48", "--mode", mode)
    one, two, three = mesh.machines
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
