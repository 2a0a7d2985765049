"""Notifications of the real kernel: which ones arrive, and what happens when they are too many."""

from __future__ import annotations

import contextlib
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from meshnet.diff import diff
from meshnet.firewall.elements import member
from meshnet.kernel.events import (
    EventFilter,
    neighbour_id,
    nftables_concerns_us,
    open_nftables_events,
    open_route_events,
)
from meshnet.kernel.netns import inside
from meshnet.kernel.wire import rtnl
from meshnet.lab.poll import wait_until
from meshnet.state import (
    NEXTHOP_ID_FIRST,
    FdbKey,
    NeighbourKey,
    Nexthop,
    Route,
    RouteKey,
)
from meshnet.tables import Op, Table
from meshnet_agent.dataplane.dirty import Dirty
from meshnet_agent.dataplane.monitor import NetlinkEvents
from meshnet_agent.tasks.flag import Flag
from tests.contract.changes import BRIDGE, TUNNEL
from tests.contract.hosts import RealHost, host_namespace, ip
from tests.values import make_network, make_snapshot, plan_for, underlay_ip

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root


@pytest.fixture
def host(root: None, tmp_path: Path, nothing_left: None) -> Iterator[tuple[RealHost, int]]:
    """A host with one network and no peers, and its namespace."""
    with host_namespace() as (name, fd):
        real = RealHost(name, fd, tmp_path)
        try:
            underlay = real.observe(underlay_ip(1), None)
            desired = plan_for(make_snapshot([make_network()], 1), underlay).state
            assert real.apply(diff(desired, real.dump())) == []
            yield real, fd
        finally:
            real.close()


def peers(count: int) -> list[Op]:
    """A neighbour, an FDB entry, a nexthop object and a route each."""
    ops: list[tuple[Table, object, object]] = []
    for i in range(1, count + 1):
        gateway, mac = bytes((10, 43, *divmod(i, 256))), bytes((2, 0, 0, 0, *divmod(i, 256)))
        nexthop_id = NEXTHOP_ID_FIRST + i
        ops += [
            (Table.NEIGHBOUR, NeighbourKey(TUNNEL, gateway), mac),
            (Table.FDB, FdbKey(TUNNEL, mac), bytes((10, 9, *divmod(i, 256)))),
            (Table.NEXTHOP, nexthop_id, Nexthop(TUNNEL, gateway)),
            (Table.ROUTE, RouteKey(bytes((10, 77, *divmod(i, 256))), 32), Route(nexthop_id)),
        ]
    ops.sort(key=lambda op: op[0])
    return [Op(table, key, value, False) for table, key, value in ops]


def datagrams(events: socket.socket) -> list[bytes]:
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(events.recv(1 << 18))
    return found


def drain(events: socket.socket) -> list[rtnl.Message]:
    return [message for data in datagrams(events) for message in rtnl.split_messages(data)]


def test_our_own_writes_make_no_message(host: tuple[RealHost, int]) -> None:
    real, fd = host
    with inside(fd):
        events = open_route_events([real.port_id])
    with events:
        ops = peers(3)
        assert real.apply(ops) == []
        changed = [
            op._replace(value=bytes((10, 9, 9, 9)), exists=True)
            for op in ops
            if op.table is Table.FDB
        ]
        assert real.apply(changed) == []
        assert drain(events) == []
        gone = [op._replace(value=None, exists=True) for op in reversed(ops)]
        assert real.apply(gone) == []
        # Linux does not say why a neighbour or an FDB entry ended.
        told = drain(events)
        assert {message.kind for message in told} == {rtnl.RTM_DELNEIGH}
        assert {neighbour_id(message) for message in told} == real.deleted
        # The end of what came back is reported again.
        assert real.apply(ops) == []
        assert not real.deleted


@pytest.mark.parametrize(
    "command",
    [
        f"ip neigh replace 10.43.0.1 dev {TUNNEL} lladdr 02:0:0:0:0:9",
        f"ip neigh del 10.43.0.1 dev {TUNNEL}",
        f"bridge fdb replace 02:0:0:0:0:1 dev {TUNNEL} dst 10.9.0.77 self permanent",
        f"bridge fdb del 02:0:0:0:0:1 dev {TUNNEL}",
        f"ip nexthop replace id {NEXTHOP_ID_FIRST + 1} via 10.43.7.0 dev {TUNNEL} onlink proto 109",
        f"ip nexthop del id {NEXTHOP_ID_FIRST + 1}",
        "ip route del 10.77.0.1",
        f"ip addr add 10.42.99.1/24 dev {BRIDGE}",
        f"ip link set {TUNNEL} down",
    ],
)
def test_others_writes_do(host: tuple[RealHost, int], command: str) -> None:
    real, fd = host
    assert real.apply(peers(3)) == []
    with inside(fd):
        events = open_route_events([real.port_id])
    with events:
        real.shell(command)
        assert drain(events)


def test_a_load_of_our_rules_is_still_told(host: tuple[RealHost, int]) -> None:
    real, fd = host
    with inside(fd):
        events = open_nftables_events([real.nft_port_id])
    with events:
        real.shell("nft add rule inet meshnet postrouting counter")
        assert any(nftables_concerns_us(m.data) for m in drain(events))


def test_our_own_elements_make_no_message_and_others_do(host: tuple[RealHost, int]) -> None:
    real, fd = host
    with inside(fd):
        events = open_nftables_events([real.nft_port_id])
    with events:
        key = member(ip_address("10.9.0.7"))
        for op in (Op(Table.ELEMENT, key, b"", False), Op(Table.ELEMENT, key, None, True)):
            assert real.apply([op]) == []
            assert drain(events) == []
        real.shell("nft add element inet meshnet members4 { 10.9.0.77 }")
        assert any(nftables_concerns_us(m.data) for m in drain(events))
        real.shell("nft delete table bridge meshnet")
        assert any(nftables_concerns_us(m.data) for m in drain(events))


async def test_lost_notifications_are_made_up_for(
    host: tuple[RealHost, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fd = host
    monkeypatch.setattr("meshnet.kernel.events._RECEIVE_BUFFER_BYTES", 4096)
    dirty = Dirty()
    dirty.clear_all()
    heard: list[bytes] = []

    class Deaf(EventFilter):
        def concerns_us(self, data: bytes) -> bool:
            heard.append(data)
            return data.find(b"mnb9999") >= 0

    async with trio.open_nursery() as nursery:
        with inside(fd):
            # Runs until its sockets are open without letting another task run in between.
            await nursery.start(NetlinkEvents((), ()).listen, Deaf(), dirty, Flag())
        ops = peers(300)
        assert real.apply(ops) == []  # the loop stands still meanwhile
        with trio.fail_after(10):
            await dirty.wait()
        dirty.clear_all()
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < len(heard) < len(ops)  # and the others did not concern us
        state = real.dump()
        assert len(state.neighbours) == len(state.fdb) == len(state.nexthops) == 300
        assert not dirty.everything
        real.shell("ip link add mnb9999 type bridge")
        with trio.fail_after(10):
            await dirty.wait()
        nursery.cancel_scope.cancel()


def test_a_bridge_keeps_its_mtu_when_ports_come_and_go(host: tuple[RealHost, int]) -> None:
    real, _ = host
    before = real.dump().links[BRIDGE].mtu_bytes
    for command in (
        f"ip link add mnx1 mtu 1300 type veth peer mnx2; ip link set mnx1 master {BRIDGE}",
        "ip link del mnx1",
    ):
        real.shell(command)
        assert real.dump().links[BRIDGE].mtu_bytes == before != 1500


def test_an_underlay_that_loses_its_carrier_concerns_us(host: tuple[RealHost, int]) -> None:
    real, fd = host
    real.shell("ip link add under1 type veth peer under2; ip link set under1 up; "
               "ip link set under2 up; ip addr add 10.8.0.1/24 dev under1")  # fmt: skip
    index = int(ip("-n", real.name, "-o", "link", "show", "under1").split(":")[0])
    concerned = EventFilter()
    concerned.look_at((), (), {index})
    with inside(fd):
        events = open_route_events([real.port_id])

    def is_news() -> bool:
        told = [concerned.concerns_us(data) for data in datagrams(events)]
        return any(told)

    with events:
        real.shell("ip link set under1 txqueuelen 999")
        is_news()
        real.shell("ip link set under1 txqueuelen 998")
        assert not is_news()
        real.shell(f"ip nexthop add id {NEXTHOP_ID_FIRST} via 10.8.0.2 dev under1 proto 109")
        is_news()
        # Linux removes the nexthop and does not say so.
        real.shell("ip link set under2 down")
        wait_until(is_news, 5, "word that the carrier is gone")
        assert not real.dump().nexthops
        real.shell("ip link set under2 up")
        wait_until(is_news, 5, "word that it is back")
