"""Eight agents in one process: they find each other, and no event stops the packets."""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest
import trio

from meshnet.backends import HostLink
from meshnet.backends.macvlan import shim_name
from meshnet.backends.routed_bridge import bridge_name
from meshnet.diff import diff
from meshnet.errors import ConflictError, PoolExhaustedError
from meshnet.model import HostId, NetworkName
from meshnet.modes import Mode
from meshnet.ports import parse_all_published
from meshnet.state import KernelState, endpoint_link_name
from meshnet.store import Delete, DeletePrefix
from meshnet.store.mirror import ALIVE, SUBNETS, host_key
from meshnet.store.registry import endpoint_key
from meshnet_agent.endpoints.request import AttachRequest
from meshnet_agent.endpoints.sandbox import open_sandbox
from tests.unit.mesh import GRACE_S, RESYNC_S, TTL_S, Mesh, full_mesh, kinds, open_mesh, until
from tests.values import make_network

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from trio.testing import MockClock

    from meshnet.model import Network, Vni
    from meshnet.state import RouteKey

N = 8
PROD = NetworkName("prod")


def routes_to(mesh: Mesh, number: int, source: int = 1) -> set[RouteKey]:
    """Routes of one host to another's subnets."""
    subnets = mesh.subnets_of(mesh.nodes[number - 1])
    wanted = {(s.network_address.packed, s.prefixlen) for s in subnets}
    return {key for key in mesh.nodes[source - 1].state().routes if key[:2] in wanted}


# --- coming and going ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_all_reach_all_and_then_there_is_nothing_to_do(
    tmp_path: Path, autojump_clock: MockClock, seed: int
) -> None:
    async with open_mesh(tmp_path, seed) as mesh:
        await full_mesh(mesh, N)
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
        await mesh.registry.remove_network(PROD)
        await mesh.create_network("prod", "10.77.0.0/16")
        for node in mesh.nodes:
            node.store.set_available(True)
        await until(lambda: mesh.is_full(1), "the new one is up")
        subnets = {s for node in mesh.nodes for s in mesh.subnets_of(node)}
        assert all(s.subnet_of(ip_network("10.77.0.0/16")) for s in subnets)  # type: ignore[arg-type]


async def test_a_host_joins(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, N)
        began = trio.current_time()
        await mesh.start(mesh.add_node())
        await until(mesh.is_full, "the ninth is in")
        assert trio.current_time() - began < 1


async def test_a_host_that_stops_is_shown_dead_and_its_packets_still_flow(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, N)
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
        # When it comes back, it has the same subnet as before.
        writes = gone.kernel.writes
        await mesh.start(gone)
        await until(mesh.is_full, "it is back")
        assert gone.state() == before
        assert gone.kernel.writes == writes


async def test_a_host_that_crashes_is_alive_until_its_lease_runs_out(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, N)
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
        await mesh.create_network("prod", "10.42.0.0/21")  # of eight subnets
        await mesh.start_many(N)
        await until(lambda: mesh.is_full(1), "every host reaches every other")
        gone = mesh.nodes[1]
        with pytest.raises(ConflictError):
            await mesh.registry.remove_host(HostId(gone.id))
        await gone.stop()
        await mesh.registry.remove_host(HostId(gone.id))
        await until(lambda: not routes_to(mesh, 2), "its routes go at once", 2)
        freed = mesh.subnets_of(gone)
        newcomer = mesh.add_node()
        await mesh.start(newcomer)
        await until(lambda: mesh.is_full(1), "another is in")
        assert mesh.subnets_of(newcomer) == freed
        # The removed host comes back: no subnet is left for it, and it gives up what it had.
        await mesh.start(gone)
        assert isinstance(gone.running.membership.errors[PROD], PoolExhaustedError)
        await until(lambda: not gone.state().links, "its old links go", 5)
        assert all(mesh.reaches(node, newcomer) for node in mesh.nodes if node is not gone)
        await mesh.nodes[2].stop()
        await mesh.registry.remove_host(HostId("h3"))
        await trio.sleep(2 * RESYNC_S)
        assert mesh.is_full(1)


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


@pytest.mark.parametrize("copied", [False, True])
async def test_two_agents_with_one_host_id(
    tmp_path: Path, autojump_clock: MockClock, copied: bool
) -> None:
    """The second one has a state directory of its own, or a copy, as a cloned machine has."""
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 2)
        twin = mesh.add_node()
        twin.id = "h1"
        if copied:
            twin.instance = mesh.nodes[0].instance
        where = r"10\.9\.0\.1" + (" with this state directory, or a copy of it:" if copied else ":")
        with pytest.raises(ConflictError, match=rf"h1 is held by an agent at .* {where}"):
            await twin.run(task_status=trio.TASK_STATUS_IGNORED)
        mesh.nodes.remove(twin)
        assert not twin.state().links
        await trio.sleep(2 * TTL_S)
        assert mesh.is_full()
        assert (await mesh.snapshot()).hosts[HostId("h1")].underlay_ip == mesh.nodes[0].ip


@pytest.mark.parametrize("copied", [False, True])
async def test_an_agent_whose_id_was_taken_while_it_was_cut_off_ends(
    tmp_path: Path, autojump_clock: MockClock, copied: bool
) -> None:
    async def lose_the_id() -> None:
        async with open_mesh(tmp_path) as mesh:
            await full_mesh(mesh, 2)
            lost = mesh.nodes[0]
            lost.store.set_available(False)
            await trio.sleep(TTL_S + 1)
            twin = mesh.add_node()
            twin.id = "h1"
            if copied:
                twin.instance = lost.instance
            await mesh.start(twin)
            before.append(lost)
            before.append(lost.state())
            lost.store.set_available(True)
            await trio.sleep_forever()

    before: list[Any] = []
    with pytest.raises(BaseExceptionGroup) as ended:
        await lose_the_id()
    assert kinds(ended.value) == {ConflictError}
    lost, state = before
    assert lost.state() == state


async def test_a_physical_network_and_its_link(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A host has it while it has the link; its own address outlives both it and the agent."""
    async with open_mesh(tmp_path) as mesh:

        def build(vni: Vni) -> Network:
            return make_network(
                "phys", ("10.9.0.0/16", "fd09::/64"), vni, mode=Mode.MACVLAN, parent="eth7",
                host_access=True,
            )  # fmt: skip

        network = await mesh.registry.create_network(build, None)
        node = mesh.add_node()
        await mesh.start(node)
        outcome = node.running.reconciler.result.networks[network.name]
        assert outcome.refused
        assert "eth7" in outcome.errors[0]
        assert node.state().links == {}
        node.kernel.host_links["eth7"] = HostLink(1400)
        assert node.kernel.on_change is not None
        node.kernel.on_change()
        shim = shim_name(network)
        await until(lambda: shim in node.state().links, "the host has its macvlan")
        assert node.state().links[shim].mtu_bytes == 1400
        before = node.state()
        assert {len(a.address) for a in before.addresses} == {4, 16}
        await node.crash()
        writes = node.kernel.writes
        await mesh.start(node)
        assert node.state() == before
        assert node.kernel.writes == writes
        del node.kernel.host_links["eth7"]
        node.kernel.on_change()
        await until(lambda: shim not in node.state().links, "the network is refused")
        assert node.running.pool.host_addresses.keys() == {network.name}


async def test_a_process_is_attached_and_taken_over_by_the_next_agent(
    tmp_path: Path,
    autojump_clock: MockClock,
    process: subprocess.Popen[bytes],
    elsewhere: None,
) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 2)
        node = mesh.nodes[0]
        network = node.running.follower.snapshot.networks[NetworkName("prod")]
        request = AttachRequest(
            network="prod", name="web", publish=parse_all_published(["8080:80"])
        )
        with open_sandbox(process.pid) as sandbox:
            endpoint = await node.running.attacher.attach(sandbox, request)
        assert {a.network for a in endpoint.addresses} == set(mesh.subnets_of(node))
        link = endpoint_link_name(endpoint.id)
        assert node.state().links[link].master == bridge_name(network)
        key = endpoint_key(endpoint)
        await until(lambda: key in mesh.store._database.keys, "others can list it")
        await node.crash()
        before = node.state()
        await mesh.start(node)
        assert node.running.endpoints.all == [endpoint]
        assert node.state() == before
        await node.running.attacher.detach(endpoint.sandbox.netns, "prod")
        assert link not in node.state().links
        await until(lambda: key not in mesh.store._database.keys, "others list it no more")
