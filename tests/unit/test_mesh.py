"""Eight agents in one process: they find each other, and nothing that happens stops the packets."""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest
import structlog
import trio

from meshnet.diff import Table, diff
from meshnet.errors import ConflictError
from meshnet.model import HostId, NetworkName
from meshnet.state import FdbKey, KernelState
from meshnet.store import Delete, DeletePrefix, Put
from meshnet.store.mirror import ALIVE, HOSTS, NETWORKS, SUBNETS, host_key
from tests.unit.mesh import GRACE_S, RESYNC_S, TTL_S, Mesh, kinds, open_mesh, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trio.testing import MockClock

    from meshnet.state import RouteKey

N = 8


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    with structlog.testing.capture_logs():
        yield


async def full_mesh(mesh: Mesh, count: int = N) -> None:
    await mesh.create_network()
    await mesh.start_many(count)
    await until(mesh.is_full, "every host reaches every other")


def routes_to(mesh: Mesh, number: int, source: int = 1) -> set[RouteKey]:
    """Routes of one host to another's subnets."""
    subnets = mesh.subnets_of(mesh.nodes[number - 1])
    wanted = {(s.network_address.packed, s.prefixlen) for s in subnets}
    return {key for key in mesh.nodes[source - 1].state().routes if tuple(key) in wanted}


# --- coming and going ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_all_reach_all_and_then_there_is_nothing_to_do(
    tmp_path: Path, autojump_clock: MockClock, seed: int
) -> None:
    async with open_mesh(tmp_path, seed) as mesh:
        await full_mesh(mesh)
        state = mesh.nodes[0].state()
        assert len(state.nexthops) == len(state.neighbours) == 2 * (N - 1)
        assert len(state.fdb) == N - 1
        writes = [node.kernel.writes for node in mesh.nodes]
        passes = [node.running.reconciler.passes for node in mesh.nodes]
        await trio.sleep(3 * RESYNC_S)
        assert [node.kernel.writes for node in mesh.nodes] == writes
        for node, before in zip(mesh.nodes, passes, strict=True):
            assert before < node.running.reconciler.passes < before + 10
            assert node.running.reconciler.in_sync
            assert node.running.membership.lease_ok


async def test_networks_come_and_go(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_mesh(tmp_path) as mesh:
        await mesh.start_many(N)
        assert all(not node.state().links for node in mesh.nodes)
        await mesh.create_network("one")
        await mesh.create_network("two", "10.43.0.0/16")
        await until(lambda: mesh.is_full(3), "two networks are up everywhere")
        await mesh.registry.remove_network(NetworkName("one"))
        await until(lambda: mesh.is_full(1), "one is left")
        await mesh.registry.remove_network(NetworkName("two"))
        empty = KernelState()
        await until(
            lambda: all(diff(empty, node.state()) == [] for node in mesh.nodes), "nothing is left"
        )


async def test_a_network_is_made_anew_with_other_addresses(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 3)
        mesh.store.set_available(True)
        for node in mesh.nodes:
            node.store.set_available(False)
        await mesh.registry.remove_network(NetworkName("prod"))
        await mesh.create_network("prod", "10.77.0.0/16")
        for node in mesh.nodes:
            node.store.set_available(True)
        await until(lambda: mesh.is_full(1), "the new one is up")
        subnets = {s for node in mesh.nodes for s in mesh.subnets_of(node)}
        assert all(s.subnet_of(ip_network("10.77.0.0/16")) for s in subnets)  # type: ignore[arg-type]


async def test_a_host_joins(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh)
        began = trio.current_time()
        await mesh.start(mesh.add_node())
        await until(mesh.is_full, "the ninth is in")
        assert trio.current_time() - began < 1


async def test_a_host_that_stops_is_shown_dead_and_its_packets_still_flow(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh)
        gone, other = mesh.nodes[1], mesh.nodes[0]
        before = gone.state()
        await gone.stop()
        assert gone.state() == before
        snapshot = await mesh.snapshot()
        assert gone.id not in snapshot.alive
        assert gone.id in snapshot.hosts
        await trio.sleep(GRACE_S - 5)
        assert mesh.reaches(other, gone)
        await until(lambda: not routes_to(mesh, 2), "its routes go after the grace period", 10)
        assert all(not mesh.reaches(node, gone) for node in mesh.nodes if node is not gone)
        # And when it comes back, it has what it had.
        writes = gone.kernel.writes
        await mesh.start(gone)
        await until(mesh.is_full, "it is back")
        assert gone.state() == before
        assert gone.kernel.writes == writes


async def test_a_host_that_crashes_is_alive_until_its_lease_runs_out(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh)
        gone = mesh.nodes[1]
        await gone.crash()
        assert gone.id in (await mesh.snapshot()).alive
        view = mesh.nodes[0].running.follower
        await until(lambda: gone.id not in view.snapshot.alive, "its lease ran out", TTL_S + 1)
        assert mesh.reaches(mesh.nodes[0], gone)
        await trio.sleep(GRACE_S - 1)
        assert mesh.reaches(mesh.nodes[0], gone)
        await until(lambda: not routes_to(mesh, 2), "its routes go after the grace period", 5)


async def test_a_host_is_removed_for_good(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh)
        gone = mesh.nodes[1]
        with pytest.raises(ConflictError):
            await mesh.registry.remove_host(HostId(gone.id))
        await gone.stop()
        await mesh.registry.remove_host(HostId(gone.id))
        await until(lambda: not routes_to(mesh, 2), "its routes go at once", 2)
        free = set(mesh.subnets_of(gone))
        newcomer = mesh.add_node()
        await mesh.start(newcomer)
        await until(mesh.is_full, "another is in")
        assert set(mesh.subnets_of(newcomer)) == free
        # The removed one comes back to other subnets; packets go to the new owner.
        await mesh.start(gone)
        await until(mesh.is_full, "all reach all")
        assert not set(mesh.subnets_of(gone)) & free


async def test_a_host_that_is_removed_while_it_lives_comes_again(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 3)
        host = HostId("h2")
        await mesh.store.commit(
            [], [Delete(host_key(host)), Delete(ALIVE + host), DeletePrefix(SUBNETS)]
        )
        await until(mesh.is_full, "all reach all again")
        await trio.sleep(2 * TTL_S)
        snapshot = await mesh.snapshot()
        assert snapshot.alive.keys() == snapshot.hosts.keys() == {"h1", "h2", "h3"}
        assert mesh.is_full()


async def test_two_agents_with_one_host_id(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 2)
        twin = mesh.add_node()
        twin.id = "h1"
        with pytest.raises(
            ConflictError, match=r"host id h1 is held by an agent at .* 10\.9\.0\.1"
        ):
            await twin.run(instance="another", task_status=trio.TASK_STATUS_IGNORED)
        mesh.nodes.remove(twin)
        assert not twin.state().links
        await trio.sleep(2 * TTL_S)
        assert mesh.is_full()
        assert (await mesh.snapshot()).hosts[HostId("h1")].underlay_ip == mesh.nodes[0].ip


async def test_an_agent_whose_id_was_taken_while_it_was_cut_off_ends(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    with pytest.raises(BaseExceptionGroup) as ended:
        async with open_mesh(tmp_path) as mesh:
            await full_mesh(mesh, 2)
            lost = mesh.nodes[0]
            lost.store.set_available(False)
            await trio.sleep(TTL_S + 1)
            twin = mesh.add_node()
            twin.id = "h1"
            await mesh.start(twin)
            before = lost.state()
            lost.store.set_available(True)
            await lost.stopped.wait()
            assert lost.state() == before
    assert kinds(ended.value) == {ConflictError}


# --- the store -----------------------------------------------------------------------------------


async def test_an_outage_of_the_store_changes_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh)
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
        assert [node.state() for node in mesh.nodes] == before
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


@pytest.mark.parametrize("table", Table)
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
        before = node.state()
        (entry, *_), (neighbour, *_) = before.fdb, before.neighbours
        breakages = [
            (Table.LINK, "mnv4097", None),
            (Table.LINK, "mnb4097", None),
            (Table.LINK, "mnv4097", before.links["mnv4097"]._replace(up=False)),
            (Table.LINK, "mnv4097", before.links["mnv4097"]._replace(mac=bytes(6))),
            (Table.FDB, entry, bytes((10, 9, 0, 99))),
            (Table.FDB, FdbKey("mnv4097", bytes(6)), bytes((10, 9, 0, 99))),
            (Table.NEIGHBOUR, neighbour, None),
            (Table.NEXTHOP, min(before.nexthops), None),
            (Table.FIREWALL, "", ""),
            (Table.SYSCTL, "net/ipv4/conf/eth0/forwarding", "0"),
        ]
        if not notified:
            node.kernel.on_change = None
        for breakage in breakages:
            node.kernel.by_hand(*breakage)
            assert node.state() != before
            within = 1 if notified else 1.2 * RESYNC_S
            await until(lambda: node.state() == before, f"{breakage} is mended", within)
        assert mesh.is_full()


async def test_the_underlay_address_goes_and_comes_back(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 3)
        node = mesh.nodes[0]
        before = node.state()
        address = node.kernel.underlay_ips.pop()
        node.kernel.by_hand(Table.FIREWALL, "", "")
        await trio.sleep(2 * RESYNC_S)
        assert not node.running.reconciler.in_sync
        assert node.state().routes == before.routes
        node.kernel.underlay_ips.append(address)
        await until(lambda: node.state() == before, "it goes on", RESYNC_S)
        await until(lambda: node.running.reconciler.in_sync, "and says so", 5)
