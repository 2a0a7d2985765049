"""An agent among thousands of hosts: its kernel holds exactly what the store says, come what may.

The other hosts exist in etcd alone (`tests.bench.simulated`); the kernel is compared object by
object with what they ask for, by code that is not the agent's (`tests.bench.exact`).  The same at
full length, and timed: ``make bench-scale``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.bench.churn import churn, kill_half_way
from tests.bench.site import site_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root


@pytest.mark.parametrize("kind", ["neighbour", "route"])
def test_agent_killed_while_it_programs_10_000_hosts(make_lab: MakeLab, kind: str) -> None:
    with site_in(make_lab(1, start_agents=False)) as place:
        place.mesh.add(place.mesh.new_hosts(10_000))
        killed = kill_half_way(place, kind)
        assert 4_000 <= killed.left < killed.wanted  # it was killed while it worked
        assert killed.writes >= killed.wanted - killed.left
        assert killed.differences == []


@pytest.mark.parametrize("dual_stack", [False, True], ids=["ipv4", "dual-stack"])
def test_hosts_that_change_all_the_time(make_lab: MakeLab, dual_stack: bool) -> None:
    with site_in(make_lab(1, start_agents=False), dual_stack=dual_stack) as place:
        place.mesh.add(place.mesh.new_hosts(2_000))
        place.start_agent()
        churned = churn(place, seconds=5, rate=200)
        assert churned.delays_s
        assert churned.differences == []


def test_the_check_sees_what_is_wrong(make_lab: MakeLab) -> None:
    """`differences` finds each kind of damage: the tests above can fail."""
    with site_in(make_lab(1, start_agents=False), dual_stack=True) as place:
        place.mesh.add(place.mesh.new_hosts(20))
        place.start_agent()
        assert place.differences() == []
        place.host.kill_agent()  # or the agent would repair it
        one, other = (place.mesh.addressing(place.mesh.hosts[n]) for n in (1, 2))
        mac, gateway = one[0].mac.hex(":"), one[0].subnet.network_address
        nhid = place.host.run(["ip", "-o", "route", "show", str(other[0].subnet)]).stdout.split()[2]
        before: set[str] = set()
        for damage, complaint in {
            f"ip -6 route del {one[1].subnet}": f"route {one[1].subnet} via",
            f"ip route replace {one[0].subnet} nhid {nhid} proto 109": f"via {gateway} is missing",
            f"ip route add {other[0].subnet} nhid {nhid} proto 109 metric 5": "is there 2 times",
            f"ip neigh del {gateway} dev mnv4097": f"neighbour {gateway} {mac} is missing",
            f"bridge fdb replace {mac} dev mnv4097 dst 10.255.0.9 self": f"fdb {mac} 10.255.0.9 is",
            "bridge fdb add 02:00:00:00:00:01 dev mnv4097 dst 10.255.0.9 self": "fdb 02:00:",
            "ip nexthop add id 1828717000 via 10.0.9.9 dev mnv4097 onlink proto 109": "10.0.9.9",
        }.items():
            place.host.run(damage.split())
            after = set(place.differences())
            assert any(complaint in line for line in after - before), damage
            before = after
