"""Kernels without nexthop objects keep the same contract, with routes that name their gateways."""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING

import pytest

from meshnet.diff import diff
from meshnet.state import NEXTHOP_ID_FIRST, KernelState, Nexthop, Route, RouteKey, format_ip
from meshnet.tables import Op, Table
from tests.contract.changes import CIDR4, NEIGHBOUR4, NEIGHBOUR6, ROUTE4, ROUTE6, TUNNEL
from tests.contract.hosts import UNDERLAY_DEV, MemoryHost, RealHost, host_namespace, ip, real_host
from tests.contract.meshes import DUAL, MESHES, converge, desired_for
from tests.values import make_network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.contract.hosts import HostUnderTest


@pytest.fixture(params=["memory", pytest.param("linux", marks=pytest.mark.root)])
def host(
    request: pytest.FixtureRequest, tmp_path: Path, nothing_left: None
) -> Iterator[HostUnderTest]:
    if request.param == "memory":
        yield MemoryHost(nexthop_objects=False)
        return
    request.getfixturevalue("root")
    with real_host(tmp_path, nexthop_objects=False) as real:
        yield real


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_comes_and_goes(host: HostUnderTest, mesh: str) -> None:
    networks, version = MESHES[mesh]
    desired = desired_for(host, networks, underlay_version=version)
    assert not desired.nexthops
    assert host.kernel.apply(diff(desired, host.kernel.dump())) == []
    state = host.kernel.dump()
    assert diff(desired, state) == []
    assert state.nexthops == {}
    assert state.routes == desired.routes
    assert host.kernel.apply(diff(KernelState(), state)) == []
    left = host.kernel.dump()
    assert left == KernelState(sysctls=left.sysctls)


def test_hosts_that_come_and_go(host: HostUnderTest) -> None:
    for hosts in (2, 6, 3):
        assert converge(host, desired_for(host, [DUAL], hosts=hosts)) == (1, [])
        state = host.kernel.dump()
        assert len(state.neighbours) == 2 * (hosts - 1)
        assert len(state.routes) == 2 * (hosts - 1) + 2


def test_where_routes_lead(host: HostUnderTest) -> None:
    routes = desired_for(host, [DUAL]).routes
    assert routes[ROUTE4].via == Nexthop(TUNNEL, NEIGHBOUR4.address)
    assert routes[ROUTE6].via == Nexthop(TUNNEL, NEIGHBOUR6.address)
    assert routes[CIDR4] == Route(0)


ANOTHER_GATEWAY = {ROUTE4: bytes((10, 42, 2, 0)), ROUTE6: b"\xfe\x80" + bytes(13) + b"\x77"}
CHANGES: dict[str, tuple[str, Callable[[RouteKey], Route | None]]] = {
    "deleted": ("del {prefix}", lambda _: None),
    "unreachable": ("replace unreachable {prefix} proto 109", lambda _: Route(0)),
    "another gateway": (
        f"replace {{prefix}} via {{gateway}} dev {TUNNEL} onlink proto 109",
        lambda key: Route(0, b"", Nexthop(TUNNEL, ANOTHER_GATEWAY[key])),
    ),
    "another link": (
        f"replace {{prefix}} dev {UNDERLAY_DEV} proto 109",
        lambda key: Route(0, b"", Nexthop(UNDERLAY_DEV, ANOTHER_GATEWAY[key])),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("key", [ROUTE4, ROUTE6], ids=["IPv4", "IPv6"])
def test_a_changed_route_is_found_and_mended(
    host: HostUnderTest, key: RouteKey, change: str
) -> None:
    desired = desired_for(host, [DUAL])
    converge(host, desired)
    command, in_memory = CHANGES[change]
    names = {"prefix": f"{format_ip(key.prefix)}/{key.prefix_length}"}
    names["gateway"] = format_ip(ANOTHER_GATEWAY[key])
    host.by_hand(
        f"ip {'-4' if key is ROUTE4 else '-6'} route {command.format(**names)}",
        in_memory=lambda kernel: kernel.by_hand(Table.ROUTE, key, in_memory(key)),
    )
    found = diff(desired, host.kernel.dump())
    assert [(op.table, op.key, op.value) for op in found] == [
        (Table.ROUTE, key, desired.routes[key])
    ]
    assert converge(host, desired) == (1, [])


def test_a_tunnel_that_goes_takes_its_routes_along(host: HostUnderTest) -> None:
    desired = desired_for(host, [DUAL])
    converge(host, desired)
    host.by_hand(f"ip link del {TUNNEL}", in_memory=lambda k: k.by_hand(Table.LINK, TUNNEL, None))
    assert {op.table for op in diff(desired, host.kernel.dump())} == {
        Table.LINK, Table.NEIGHBOUR, Table.FDB, Table.ROUTE,
    }  # fmt: skip
    assert converge(host, desired) == (1, [])


def test_a_tunnel_that_is_made_anew(host: HostUnderTest) -> None:
    converge(host, desired_for(host, [DUAL]))
    changed = make_network(subnets=[str(s) for s in DUAL.subnets], vni=DUAL.vni, port=4790)
    assert converge(host, desired_for(host, [changed]))[1] == []


def test_refusals_of_the_kernel(host: HostUnderTest) -> None:
    desired = desired_for(host, [make_network()])
    converge(host, desired)
    via = desired.routes[ROUTE4].via
    other = RouteKey(bytes((10, 77, 0, 0)), 24)
    refused = [
        Op(Table.ROUTE, other, Route(0, bytes((9, 9, 9, 9)), via), False),
        Op(Table.ROUTE, other, Route(0, b"", Nexthop("none0", bytes((10, 42, 9, 0)))), False),
        Op(Table.ROUTE, ROUTE4, Route(0, b"", via), False),
    ]
    failures = host.kernel.apply(refused)
    assert {f.op for f in failures} == set(refused)
    codes = {f.op: f.errno for f in failures}
    assert codes[refused[0]] == errno.EINVAL
    assert codes[refused[2]] == errno.EEXIST


def test_a_route_is_not_tried_without_its_neighbour(host: HostUnderTest) -> None:
    converge(host, desired_for(host, [DUAL], hosts=1))
    ops = diff(desired_for(host, [DUAL], hosts=2), host.kernel.dump())
    refused = Op(Table.NEIGHBOUR, NEIGHBOUR4._replace(dev="none0"), bytes(6), False)
    needs = ((Table.NEIGHBOUR, NEIGHBOUR4), (Table.NEIGHBOUR, refused.key))
    (route,) = [op for op in ops if op.key == ROUTE4]
    assert needs[0] in route.needs
    failures = host.kernel.apply([refused, route._replace(needs=needs)])
    assert [f.op.key for f in failures] == [refused.key, ROUTE4]
    assert failures[1].errno == 0


@pytest.mark.root
def test_packets_go_that_way(root: None, tmp_path: Path, nothing_left: None) -> None:
    with real_host(tmp_path, nexthop_objects=False) as real:
        converge(real, desired_for(real, [DUAL]))

        def sent() -> int:
            (link,) = json.loads(ip("-n", real.name, "-s", "-j", "link", "show", "dev", TUNNEL))
            packets: int = link["stats64"]["tx"]["packets"]
            return packets

        for family, target in (("-4", "10.42.1.5"), ("-6", "fd00:42:0:1::5")):
            before = sent()
            real.shell(f"ping {family} -c1 -W0.1 {target} >/dev/null || true")
            assert sent() > before


@pytest.mark.root
def test_a_kernel_that_has_nexthop_objects_after_all(
    root: None, tmp_path: Path, nothing_left: None
) -> None:
    """Routes of either kind are turned into the other."""
    with host_namespace() as (name, fd):
        for nexthop_objects in (False, None, False):
            real = RealHost(name, fd, tmp_path, nexthop_objects=nexthop_objects)
            try:
                desired = desired_for(real, [DUAL])
                assert (NEXTHOP_ID_FIRST in desired.nexthops) == (nexthop_objects is None)
                assert converge(real, desired)[1] == []
                assert real.dump().routes == desired.routes
            finally:
                real.close()
