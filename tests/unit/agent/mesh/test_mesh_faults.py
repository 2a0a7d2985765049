"""Faults of a mesh in one process: of the store, its values and the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from meshnet.errors import KernelRefusedError, PolicyRefusedError
from meshnet.firewall import UNKNOWN
from meshnet.model import HostId, NetworkName
from meshnet.state import ElementKey, FdbKey, Ruleset
from meshnet.store import CompactedError, Delete, Put
from meshnet.store.memory import MemoryStore
from meshnet.store.mirror import ALIVE, HOSTS, NETWORKS, SUBNETS
from meshnet.store.registry import endpoint_key
from meshnet.tables import Table
from meshnet_agent.daemon import make_operations
from tests.unit.mesh import GRACE_S, RESYNC_S, TTL_S, full_mesh, open_mesh, until
from tests.values import make_endpoint, make_network

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock


N = 8
PROD = NetworkName("prod")


# --- the store -----------------------------------------------------------------------------------


async def test_an_outage_of_the_store_changes_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, N)
        before = [node.state() for node in mesh.nodes]
        writes = [node.kernel.writes for node in mesh.nodes]
        for node in mesh.nodes:
            node.store.set_available(False)
        await trio.sleep(2 * GRACE_S)
        assert [node.state() for node in mesh.nodes] == before
        assert [node.kernel.writes for node in mesh.nodes] == writes
        assert not any(node.running.follower.connected for node in mesh.nodes)
        assert not (await mesh.snapshot()).alive
        # What somebody breaks meanwhile is mended without it.
        mesh.nodes[0].kernel.by_hand(Table.LINK, "mnv4097", None)
        await until(mesh.is_full, "the tunnel is made again", 5)
        for node in mesh.nodes:
            node.store.set_available(True)
        await until(
            lambda: all(len(n.running.follower.snapshot.alive) == N for n in mesh.nodes),
            "all have a lease again",
        )
        assert [node.state() for node in mesh.nodes[1:]] == before[1:]
        assert mesh.is_full()


async def test_one_that_was_cut_off_catches_up(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 3)
        lost = mesh.nodes[0]
        subnets = mesh.subnets_of(lost)
        lost.store.set_available(False)
        await trio.sleep(TTL_S + 1)
        await mesh.start(mesh.add_node())
        await mesh.create_network("late", "10.43.0.0/16")
        await trio.sleep(1)
        mesh.store.compact((await mesh.snapshot()).revision)  # its history is lost
        assert mesh.subnets_of(lost) == subnets
        lost.store.set_available(True)
        await until(lambda: mesh.is_full(3), "it has caught up")
        assert set(subnets) <= set(mesh.subnets_of(lost))


async def test_one_that_was_cut_off_while_all_history_went_catches_up(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Nothing was written since: what the host knows is older than all history that etcd has."""
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 3)
        lost = mesh.nodes[0]
        await mesh.registry.store.commit([], [Put("/elsewhere", b"")])
        lost.store.set_available(False)
        await until(lambda: not lost.running.follower.connected, "it is cut off")
        mesh.store.compact((await mesh.snapshot()).revision)
        lost.store.set_available(True)
        await until(lambda: lost.running.follower.connected, "it follows again")
        await mesh.create_network("late", "10.43.0.0/16")
        await until(lambda: mesh.is_full(3), "it has caught up")


async def test_an_older_copy_that_went_on_and_was_compacted_is_refused(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The history is gone, but the listing has a network in a state that it never had by then."""
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 2)
        node = mesh.nodes[0]
        older = MemoryStore()
        older._database.keys = dict(mesh.store._database.keys)
        await mesh.registry.remove_network(NetworkName("prod"))
        await until(lambda: not node.running.membership.subnets, "it has let go of the network")
        revision = (await mesh.snapshot()).revision
        older._database.revision = revision + 5
        older.compact(revision + 4)
        node.see_another_store(older)
        await until(lambda: "older copy" in (node.running.follower.error or ""), "it is refused")
        assert not node.running.membership.subnets


async def test_a_start_without_the_store_fails(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_mesh(tmp_path) as mesh:
        node = mesh.add_node()
        node.store.set_available(False)
        with pytest.raises(Exception, match="unavailable"):
            await node.run(task_status=trio.TASK_STATUS_IGNORED)


async def test_hostile_values_do_no_harm(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 3)
        before = [node.state() for node in mesh.nodes]
        hostile = {
            NETWORKS + "prod": b"\xff\xfe",
            NETWORKS + "evil": b'{"v":1,"name":"evil","mode":"vxlan","subnets":["10.42.0.0/17"],'
            b'"vni":5000,"port":4789,"host_prefix":24,"host_prefix6":64}',
            HOSTS + "h2": b'{"v":1,"id":"h2","underlay_ip":"127.0.0.1"}',
            HOSTS + "h9": b'{"v":1,"id":"h9","underlay_ip":"10.9.0.99"}',
            ALIVE + "h3": b"[" * 50_000,
            SUBNETS + "prod/10.42.0.2-32": b'{"v":1,"host":"h9"}',
            SUBNETS + "prod/10.42.0.0-16": b'{"v":1,"host":"h9"}',
            SUBNETS + "prod/255.255.255.255-32": b'{"v":1,"host":"h1"}',
            SUBNETS + "prod/10.42.2.0-24": b"null",
            SUBNETS + "nowhere/10.42.2.0-24": b'{"v":1,"host":"h1"}',
        }
        await mesh.store.commit([], [Put(key, value) for key, value in hostile.items()])
        await trio.sleep(2 * RESYNC_S)
        for node, state in zip(mesh.nodes, before, strict=True):
            after = node.state()
            assert state.routes.items() <= after.routes.items()
            assert state.fdb.items() <= after.fdb.items()
            assert all(mesh.reaches(node, other) for other in mesh.nodes)
            assert len(node.running.follower.snapshot.bad_values) == 4


async def test_an_empty_or_another_store_is_not_believed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 3)
        before = [node.state() for node in mesh.nodes]
        other = MemoryStore()
        for node in mesh.nodes:
            node.see_another_store(other)
        await trio.sleep(2 * GRACE_S)
        assert (await other.list_prefix("")).items == ()
        assert [node.state() for node in mesh.nodes] == before
        for node in mesh.nodes:
            node.see_another_store(mesh.store)
        await until(
            lambda: all(node.running.membership.lease_ok for node in mesh.nodes),
            "all are back in their mesh",
        )
        assert [node.state() for node in mesh.nodes] == before


async def test_nothing_is_written_to_another_store(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What was asked for meanwhile is not forgotten either when the real store is back."""
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 2)
        node = mesh.nodes[0]
        operations = make_operations(node.running)

        def attach(number: int) -> str:
            endpoint = make_endpoint(identity=f"{number:012x}")
            node.running.endpoints.add(endpoint)
            node.running.endpoints.changed.set()
            return endpoint_key(endpoint)

        first = attach(1)
        await until(lambda: first in mesh.store._database.keys, "it is published")
        other = MemoryStore()
        node.see_another_store(other)
        await until(lambda: not node.running.follower.connected, "it is lost", TTL_S)
        second = attach(2)
        for refused in (
            lambda: operations.create_network(lambda vni: make_network("late", vni=vni), None),
            lambda: operations.remove_network("late"),
            lambda: operations.remove_host(HostId("h2")),
        ):
            with pytest.raises(PolicyRefusedError, match="etcd is empty"):
                await refused()
        await trio.sleep(2 * GRACE_S)
        assert (await other.list_prefix("")).items == ()
        # Somebody else took it away meanwhile, as a restored etcd may not have it.
        await mesh.store.commit([], [Delete(first)])
        node.see_another_store(mesh.store)
        keys = mesh.store._database.keys
        await until(lambda: {first, second} <= keys.keys(), "both are published", 2 * TTL_S)


# --- the kernel ----------------------------------------------------------------------------------


async def test_each_kernel_operation_fails_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 2)
        count = mesh.nodes[0].kernel.writes
        assert count > 12
        for nth in range(1, count + 1):
            node = mesh.add_node()
            node.kernel.fail_next(nth=nth)
            await mesh.start(node)
            await until(mesh.is_full, f"all is well after operation {nth} failed", 5)
            assert node.kernel.faults_left == 0
            await until(lambda n=node: n.running.reconciler.in_sync, "it says so", 5)  # type: ignore[misc]
            await node.stop()
            await mesh.registry.remove_host(HostId(node.id))


@pytest.mark.parametrize("table", [t for t in Table if t not in (Table.ELEMENT, Table.MEMBER)])
async def test_a_failure_that_lasts_holds_nothing_else_up(
    tmp_path: Path, autojump_clock: MockClock, table: Table
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 2)
        node = mesh.add_node()
        for _ in range(12):
            node.kernel.fail_next(table)
        await mesh.start(node)
        reconciler = node.running.reconciler
        assert reconciler.result.failures
        assert not reconciler.in_sync
        assert all(f.op.table >= table or f.op.table is Table.FIREWALL
                   for f in reconciler.result.failures)  # fmt: skip
        if table > Table.LINK:
            assert len(node.state().links) == 2
        await until(lambda: reconciler.in_sync, "it works at last", 300)
        assert mesh.is_full()


@pytest.mark.parametrize("notified", [True, False])
async def test_what_is_broken_by_hand_is_mended(
    tmp_path: Path, autojump_clock: MockClock, notified: bool
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 3)
        node = mesh.nodes[0]
        before = node.essence()
        (entry, *_), (neighbour, *_) = before.fdb, before.neighbours
        element = ElementKey("members4", mesh.nodes[1].ip.packed)
        assert element in before.elements
        breakages = [
            (Table.LINK, "mnv4097", None),
            (Table.LINK, "mnb4097", None),
            (Table.LINK, "mnv4097", before.links["mnv4097"]._replace(up=False)),
            (Table.LINK, "mnv4097", before.links["mnv4097"]._replace(mac=bytes(6))),
            (Table.FDB, entry, bytes((10, 9, 0, 99))),
            (Table.FDB, FdbKey("mnv4097", bytes(6)), bytes((10, 9, 0, 99))),
            (Table.NEIGHBOUR, neighbour, None),
            (Table.NEXTHOP, min(node.state().nexthops), None),
            (Table.FIREWALL, "", Ruleset(UNKNOWN, {})),
            (Table.FIREWALL, "", None),
            (Table.ELEMENT, element, None),
            (Table.ELEMENT, ElementKey("members4", bytes((10, 9, 0, 99))), b""),
            (Table.SYSCTL, "net/ipv4/conf/eth0/forwarding", "0"),
        ]
        if not notified:
            node.kernel.on_change = None
        for breakage in breakages:
            node.kernel.by_hand(*breakage)
            assert node.essence() != before
            within = 1 if notified else 1.2 * RESYNC_S
            await until(lambda: node.essence() == before, f"{breakage} is mended", within)
        assert mesh.is_full()


async def test_what_the_kernel_drops_when_it_is_mended_is_mended_at_once(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 3)
        node = mesh.nodes[0]
        before = node.essence()
        node.kernel.on_change = None
        wrong = before.links["mnv4097"]._replace(mac=bytes(6))
        node.kernel.by_hand(Table.LINK, "mnv4097", wrong)
        for key, mac in before.neighbours.items():
            node.kernel.by_hand(Table.NEIGHBOUR, key, mac)
        # Correcting the MAC flushes the neighbours, and the kernel does not notify us of that.
        await until(lambda: node.essence() == before, "all is as before", 1.2 * RESYNC_S)


async def test_the_underlay_address_goes_and_comes_back(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 3)
        node = mesh.nodes[0]
        before = node.essence()
        address = node.kernel.underlay_ips.pop()
        node.kernel.by_hand(Table.FIREWALL, "", Ruleset(UNKNOWN, {}))
        await trio.sleep(2 * RESYNC_S)
        assert not node.running.reconciler.in_sync
        assert node.essence().routes == before.routes
        node.kernel.underlay_ips.append(address)
        await until(lambda: node.essence() == before, "it goes on", RESYNC_S)
        await until(lambda: node.running.reconciler.in_sync, "and says so", 5)


async def test_settling_waits_for_a_pass_that_began_later(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 2)
        node = mesh.nodes[0]
        reconciler = node.running.reconciler
        key, route = next(iter(node.state().routes.items()))

        def somebody_breaks_it() -> None:
            # Without a notification, which `by_hand` would send: it would trigger a pass.
            del node.kernel._state.routes[key]

        passes = reconciler.full_passes
        async with trio.open_nursery() as nursery:
            node.running.dirty.mark_all()
            await trio.lowlevel.checkpoint()  # a pass is under way
            somebody_breaks_it()
            for _ in range(3):
                nursery.start_soon(reconciler.settle)
        assert node.state().routes[key] == route
        assert reconciler.full_passes <= passes + 3  # one serves all who wait
        address = node.kernel.underlay_ips.pop()
        with pytest.raises(KernelRefusedError, match="no pass can run on this host"):
            await reconciler.settle()
        node.kernel.underlay_ips.append(address)
        await reconciler.settle()
        node.kernel.by_hand(Table.FIREWALL, "", None)
        node.kernel.fail_next(Table.FIREWALL)
        with pytest.raises(KernelRefusedError, match="the firewall cannot be changed"):
            await reconciler.settle()
        await reconciler.settle()


async def test_nobody_waits_for_a_pass_of_an_agent_that_has_stopped(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Not even shielded clean-up: an agent that stopped while a container ended once hung."""
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 1)
        node, reconciler = mesh.nodes[0], mesh.nodes[0].running.reconciler
        await node.stop()
        with pytest.raises(KernelRefusedError, match="stopping"), trio.fail_after(60):
            await reconciler.settle()


async def test_a_link_that_is_refused_for_ever_is_tried_ever_more_rarely(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await mesh.create_network()
        node = mesh.add_node()
        node.kernel.foreign.links.add("mnv4097")  # somebody else's
        await mesh.start(node)
        reconciler = node.running.reconciler
        await trio.sleep(5)
        before = reconciler.full_passes
        assert reconciler.result.failures
        await trio.sleep(RESYNC_S)
        assert 0 < reconciler.full_passes - before < 10
        node.kernel.foreign.links.clear()
        await until(lambda: reconciler.in_sync, "it goes on", 60)


async def test_a_grace_period_that_ends_over_a_hole_deletes_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 3)
        node, _, gone = mesh.nodes
        await gone.crash()
        await trio.sleep(GRACE_S - 30)
        hole = SUBNETS + "prod/10.42.77.0-24"
        await mesh.store.commit([], [Put(hole, b'{"v": 99}')])
        await until(lambda: bool(node.running.follower.snapshot.holes), "a hole", 5)
        before = node.essence()
        await trio.sleep(2 * GRACE_S)
        assert node.essence() == before
        # Nor does loading the firewall again.
        node.kernel.by_hand(Table.FIREWALL, "", Ruleset(UNKNOWN, before.elements))
        await until(lambda: node.essence() == before, "the firewall is mended", 5)
        await mesh.store.commit([], [Delete(hole)])
        await until(lambda: len(node.state().fdb) == 1, "then it does", RESYNC_S)


async def test_while_all_agents_list_again_nobody_is_taken_for_dead(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnet_agent.mesh.follower._LISTINGS_A_SECOND", 0.01)
    async with open_mesh(tmp_path, seed=3) as mesh:
        await full_mesh(mesh, 3)
        node, _, away = mesh.nodes
        before = node.essence()
        await away.crash()
        follower = node.running.follower
        await until(
            lambda: "h3" in node.running.liveness.dead_for_s(), "its lease ran out", 2 * TTL_S
        )
        await trio.sleep(GRACE_S - 5)
        for watch in node.store._watches:
            watch.break_off(CompactedError("compacted"))
        await until(lambda: not follower.connected, "it says that it knows nothing", 5)
        await mesh.start(away)
        for _ in range(40):
            await trio.sleep(1)
            assert node.essence() == before
        await until(lambda: follower.connected, "listed again", 400)
        assert node.essence() == before
