"""Seeded random faults, one after another and overlapping, for a mesh in one process.

Tens of thousands of sequences cost minutes, as the clock jumps.  They find what a rare order of
events breaks; `tests.netns.faults` adds what real kernels and a real etcd do.

``python -m tests.unit.sequences --count 10000`` prints the seed of each one that breaks something;
``--seed N`` repeats that one.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import structlog
import trio
from trio.testing import MockClock

from meshnet.errors import ConflictError
from meshnet.firewall import UNKNOWN
from meshnet.kernel.fakes.kernel import MemoryKernel
from meshnet.model import HostId, NetworkName
from meshnet.state import ElementKey, FdbKey, Ruleset
from meshnet.store import CompactedError, Delete, Put
from meshnet.store.memory import MemoryStore
from meshnet.store.mirror import ALIVE, HOSTS, NETWORKS, SUBNETS
from meshnet.tables import Table
from tests.unit.mesh import RESYNC_S, TTL_S, Mesh, Node, full_mesh, open_mesh

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from meshnet.model import IpNetwork

HOSTS_AT_START = 3
MOST_HOSTS = 5
FAULTS = 10
LONGEST_S = 30.0
"""Seconds that a fault lasts at most: two leases, far less than the grace period."""
_PROD = (ip_network("10.42.0.0/16"), ip_network("fd00:42::/48"))
_LOOK_S = 0.5
_WHOLE_S = 3 * RESYNC_S
_NOBODY = b'{"v":1,"host":"h99"}'
_HOSTILE = {
    NETWORKS + "evil": b'{"v":1,"name":"evil","mode":"vxlan","subnets":["10.42.0.0/17"],'
    b'"vni":5000,"port":4789,"host_prefix":24,"host_prefix6":64}',
    NETWORKS + "x": b"\xff\xfe",
    HOSTS + "h98": b'{"v":1,"id":"h98","underlay_ip":"127.0.0.1"}',
    ALIVE + "h97": b"[" * 10_000,
    SUBNETS + "prod/10.42.0.0-16": _NOBODY,
    SUBNETS + "prod/10.42.240.0-24": b"null",
    SUBNETS + "nowhere/10.42.2.0-24": _NOBODY,
}


class Broken(AssertionError):  # noqa: N818  (a finding, not an error of ours)
    """An invariant that does not hold."""


@dataclass
class World:
    """A mesh, what happens to it, and which packets may be lost meanwhile.

    Attributes:
        cut: nodes whose own kernel was damaged, and which were not whole since.
        whole: nodes that have been whole once: packets between them must flow from then on.
        busy: nodes that one fault has; a second one would be no other than the first.
        story: what happened, in order.
    """

    mesh: Mesh
    rng: Random
    cut: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    busy: set[str] = field(default_factory=set)
    extra: set[str] = field(default_factory=set)
    story: list[str] = field(default_factory=list)

    def say(self, what: str) -> None:
        """Add a line to the story."""
        self.story.append(f"{trio.current_time():8.1f} {what}")

    def take(self) -> Node | None:
        """Choose a node that no fault affects, for a new fault."""
        free = [node for node in self.mesh.nodes if node.id not in self.busy]
        if not free:
            return None
        node = self.rng.choice(free)
        self.busy.add(node.id)
        return node

    async def last(self) -> None:
        """Let a fault last for a while: often shorter than a lease, sometimes longer."""
        await trio.sleep(math.exp(self.rng.uniform(math.log(0.1), math.log(LONGEST_S))))


async def crash(world: World, node: Node) -> None:
    await node.crash()
    await world.last()
    await world.mesh.start(node)


async def stop(world: World, node: Node) -> None:
    await node.stop()
    await world.last()
    await world.mesh.start(node)


async def reboot(world: World, node: Node) -> None:
    world.cut.add(node.id)
    await node.crash()
    node.kernel = MemoryKernel(node.ip)
    await world.last()
    await world.mesh.start(node)


async def outage_for_one(world: World, node: Node) -> None:
    node.store.set_available(False)
    await world.last()
    node.store.set_available(True)


async def outage_for_all(world: World, _node: Node) -> None:
    nodes = [node for node in world.mesh.nodes if node.id not in world.busy]
    world.busy |= {node.id for node in nodes}
    for node in nodes:
        node.store.set_available(False)
    await world.last()
    for node in nodes:
        node.store.set_available(True)
    world.busy -= {node.id for node in nodes}


async def watches_break(world: World, node: Node) -> None:
    for watch in list(node.store._watches):
        watch.break_off(CompactedError("compacted"))


async def compaction(world: World, node: Node) -> None:
    node.store.set_available(False)
    await world.last()
    revision = (await world.mesh.snapshot()).revision
    if world.mesh.store._database.compacted < revision:
        world.mesh.store.compact(revision)
    node.store.set_available(True)


async def wiped(world: World, node: Node) -> None:
    node.see_another_store(MemoryStore())
    await world.last()
    node.see_another_store(world.mesh.store)


async def restored(world: World, node: Node) -> None:
    old = MemoryStore()
    database, current = old._database, world.mesh.store._database
    database.keys = {k: v for k, v in current.keys.items() if not v.lease_id}
    database.revision = max(1, current.revision - world.rng.randrange(1, 6))
    node.see_another_store(old)
    await world.last()
    node.see_another_store(world.mesh.store)


async def hostile_value(world: World, _node: Node) -> None:
    key, value = world.rng.choice(list(_HOSTILE.items()))
    await world.mesh.store.commit([], [Put(key, value)])
    await world.last()
    await world.mesh.store.commit([], [Delete(key)])


async def damage(world: World, node: Node) -> None:
    rng, state = world.rng, copy.deepcopy(node.state())
    if not state.fdb or "mnv4097" not in state.links:
        return
    world.cut.add(node.id)
    notified = node.kernel.on_change
    if silent := rng.random() < 0.3:
        node.kernel.on_change = None
    tunnel = state.links["mnv4097"]
    choices = (
        (Table.LINK, "mnv4097", None),
        (Table.LINK, "mnb4097", None),
        (Table.LINK, "mnv4097", tunnel._replace(up=False)),
        (Table.LINK, "mnv4097", tunnel._replace(mac=bytes(6))),
        (Table.FDB, rng.choice(sorted(state.fdb)), bytes((10, 9, 0, 99))),
        (Table.FDB, rng.choice(sorted(state.fdb)), None),
        (Table.FDB, FdbKey("mnv4097", bytes(6)), bytes((10, 9, 0, 99))),
        (Table.NEIGHBOUR, rng.choice(sorted(state.neighbours)), None),
        (Table.NEXTHOP, rng.choice(sorted(state.nexthops)), None),
        (Table.ROUTE, rng.choice(sorted(k for k in state.routes)), None),
        (Table.FIREWALL, "", Ruleset(UNKNOWN, {})),
        (Table.FIREWALL, "", None),
        (Table.ELEMENT, ElementKey("members4", bytes((10, 9, 0, 99))), b""),
        (Table.SYSCTL, "net/ipv4/conf/eth0/forwarding", "0"),
    )
    table, key, value = rng.choice(choices)
    world.say(f"  {table.name} {key} of {node.id} := {value!r:.60}{', silently' if silent else ''}")
    node.kernel.by_hand(table, key, value)
    if silent and node.kernel.on_change is None:
        node.kernel.on_change = notified


async def kernel_refuses(world: World, node: Node) -> None:
    for _ in range(world.rng.randrange(1, 4)):
        node.kernel.fail_next(nth=world.rng.randrange(1, 8))
    await damage(world, node)


async def underlay_address_goes(world: World, node: Node) -> None:
    address = node.kernel.underlay_ips.pop()
    node.kernel.by_hand(Table.FIREWALL, "", Ruleset(UNKNOWN, {}))
    world.cut.add(node.id)
    await world.last()
    node.kernel.underlay_ips.append(address)


async def twin(world: World, node: Node) -> None:
    other = Node(
        node.id, world.mesh.nodes[-1].ip, world.mesh.store.connect(), MemoryKernel(node.ip),
        node.directory.with_name(f"twin{trio.current_time()}"), "twin",
    )  # fmt: skip
    try:
        with trio.move_on_after(5):
            await other.run(task_status=trio.TASK_STATUS_IGNORED)
    except ConflictError:
        return
    raise Broken(f"a second {node.id} was let in")


async def join(world: World, _node: Node) -> None:
    if len(world.mesh.nodes) < MOST_HOSTS:
        node = world.mesh.add_node()
        world.busy.add(node.id)
        await world.mesh.start(node)
        world.busy.discard(node.id)


async def leave(world: World, node: Node) -> None:
    if len(world.mesh.nodes) <= 2:
        return
    world.mesh.nodes.remove(node)
    await node.stop()
    await world.mesh.registry.remove_host(HostId(node.id))
    # Its id is not used again: the next node has a new number.
    node.stopped.set()


async def network_comes_and_goes(world: World, _node: Node) -> None:
    name = f"n{len(world.story)}"
    number = len(world.story) % 200 + 44
    world.extra.add(name)
    await world.mesh.create_network(name, f"10.{number}.0.0/16")
    await world.last()
    await world.mesh.registry.remove_network(NetworkName(name))
    world.extra.discard(name)


FAULT_KINDS = (
    crash, stop, reboot, outage_for_one, outage_for_all, watches_break, compaction, wiped, restored,
    hostile_value, damage, kernel_refuses, underlay_address_goes, twin, join, leave,
    network_comes_and_goes,
)  # fmt: skip


def reaches(world: World, source: Node, target: Node) -> bool:
    """Tell whether packets reach a node's subnets of the network that is always there."""
    subnets = [s for s in world.mesh.subnets_of(target) if overlaps_prod(s)]
    try:
        return len(subnets) == len(_PROD) and all(
            world.mesh.deliver(source, subnet.network_address + 2) is target for subnet in subnets
        )
    except KeyError:  # a route without its neighbour or FDB entry
        return False


def overlaps_prod(subnet: IpNetwork) -> bool:
    """Tell whether a subnet is of the permanent network, and not of one that comes and goes."""
    return any(p.version == subnet.version and p.overlaps(subnet) for p in _PROD)


def pairs_that_must_flow(world: World) -> list[tuple[Node, Node]]:
    """Those between nodes that have been whole, and whose kernels nobody has damaged since."""
    nodes = [n for n in world.mesh.nodes if n.id in world.whole and n.id not in world.cut]
    return [(a, b) for a in nodes for b in nodes if a is not b]


def is_whole(world: World, node: Node) -> bool:
    """Whether a node's packets and those to it flow, as far as the others are whole."""
    others = [n for n in world.mesh.nodes if n.id in world.whole - world.cut and n is not node]
    return (
        node.agent is not None
        and not node.stopped.is_set()
        and node.running.reconciler.in_sync
        and all(reaches(world, node, n) and reaches(world, n, node) for n in others)
    )


def look(world: World) -> None:
    """Check what must hold at every moment.

    Raises:
        Broken: it does not.
    """
    for source, target in pairs_that_must_flow(world):
        if not reaches(world, source, target):
            raise Broken(f"packets from {source.id} to {target.id} are lost")
    owners: dict[object, str] = {}
    for node in world.mesh.nodes:
        for subnet in world.mesh.subnets_of(node):
            if owners.setdefault(subnet, node.id) != node.id:
                raise Broken(f"{subnet} is on {owners[subnet]} and on {node.id}")


async def _watch(world: World) -> None:
    while True:
        await trio.sleep(_LOOK_S)
        look(world)
        for node in world.mesh.nodes:
            if node.id not in world.busy and is_whole(world, node):
                world.cut.discard(node.id)
                world.whole.add(node.id)


async def _one(world: World, kind: Callable[[World, Node], Awaitable[None]], node: Node) -> None:
    world.say(f"{kind.__name__} {node.id}")
    await kind(world, node)
    world.busy.discard(node.id)
    world.say(f"{kind.__name__} {node.id} is over")


async def run_sequence(directory: Path, seed: int, faults: int = FAULTS) -> World:
    """One sequence.

    Raises:
        Broken: an invariant; the story is in its notes.
    """
    rng = Random(seed)
    async with open_mesh(directory, seed) as mesh:
        await full_mesh(mesh, HOSTS_AT_START)
        world = World(mesh, rng, whole={node.id for node in mesh.nodes})
        try:
            async with trio.open_nursery() as watching:
                watching.start_soon(_watch, world)
                async with trio.open_nursery() as nursery:
                    for _ in range(faults):
                        node = world.take()
                        if node is not None:
                            nursery.start_soon(_one, world, rng.choice(FAULT_KINDS), node)
                        await trio.sleep(rng.choice((0.0, 0.3, 2.0, 10.0, TTL_S + 1.0)))
                await _wait_whole(world)
                await trio.sleep(1.2 * RESYNC_S)  # what was damaged silently is found
                writes = [node.kernel.writes for node in mesh.nodes]
                await trio.sleep(1.2 * RESYNC_S)
                if [node.kernel.writes for node in mesh.nodes] != writes:
                    raise Broken("a resync with nothing to do writes")
                await _compare_store(world)
                watching.cancel_scope.cancel()
        except BaseException as error:
            error.add_note("\n".join(world.story))
            raise
    return world


async def _wait_whole(world: World) -> None:
    def whole() -> bool:
        nodes = world.mesh.nodes
        return all(is_whole(world, node) and node.running.membership.lease_ok for node in nodes)

    with trio.move_on_after(_WHOLE_S):
        while not whole():  # noqa: ASYNC110  (there is no event for it, nor any real wait)
            await trio.sleep(_LOOK_S)
        return
    told = [
        f"{n.id}: in sync {n.running.reconciler.in_sync}, lease {n.running.membership.lease_ok}, "
        f"ended {n.stopped.is_set()}, reaches "
        f"{[m.id for m in world.mesh.nodes if reaches(world, n, m)]}"
        for n in world.mesh.nodes
    ]
    raise Broken(f"not whole after {_WHOLE_S} s: {told}")


async def _compare_store(world: World) -> None:
    snapshot = await world.mesh.snapshot()
    ids = {node.id for node in world.mesh.nodes}
    if set(snapshot.hosts) != ids or set(snapshot.alive) != ids:
        raise Broken(f"the store has hosts {set(snapshot.hosts)}, alive {set(snapshot.alive)}")
    if set(snapshot.networks) != {"prod"}:
        raise Broken(f"the store has networks {set(snapshot.networks)}")
    for node in world.mesh.nodes:
        state = node.state()
        others = (len(ids) - 1) * 2
        counts = {"routes": len(state.routes), "fdb": len(state.fdb), "links": len(state.links)}
        if len(state.fdb) != len(ids) - 1 or len(state.neighbours) != others:
            raise Broken(f"{node.id} has {counts} and {len(state.neighbours)} neighbours")


def play(seed: int, faults: int = FAULTS) -> World:
    """Run one sequence by a clock that jumps."""
    with tempfile.TemporaryDirectory(prefix="meshnet-sequence-") as directory:
        return trio.run(
            run_sequence, Path(directory), seed, faults, clock=MockClock(autojump_threshold=0)
        )


def _drop(*_: object) -> structlog.typing.EventDict:
    raise structlog.DropEvent


def main() -> int:
    """Run; the exit status is 1 if an invariant broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.unit.sequences", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first sequence")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--faults", type=int, default=FAULTS)
    options = parser.parse_args()
    structlog.configure(processors=[_drop])
    happened: Counter[str] = Counter()
    broken, began = 0, time.monotonic()
    for seed in range(options.seed, options.seed + options.count):
        try:
            world = play(seed, options.faults)
            happened.update(line.split()[1] for line in world.story if not line.endswith("over"))
        except Exception as error:
            broken += 1
            print(f"seed {seed}: {_told(error)}", flush=True)
    print(f"{options.count} sequences, {broken} broken, {time.monotonic() - began:.0f} s: "
          + ", ".join(f"{n} {kind}" for kind, n in sorted(happened.items())))  # fmt: skip
    return 1 if broken else 0


def _told(error: BaseException) -> str:
    notes = "\n".join(getattr(error, "__notes__", ()))
    inner = [_told(e) for e in error.exceptions] if isinstance(error, BaseExceptionGroup) else []
    return "\n".join([f"{type(error).__name__}: {str(error)[:500]}", notes, *inner])


if __name__ == "__main__":
    sys.exit(main())
