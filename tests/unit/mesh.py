"""A mesh in one process: agents on one store in memory, each with a kernel in memory."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Generic, TypeVar

import pytest
import structlog
import trio

from meshnet.config import load_config
from meshnet.kernel.events import EventFilter
from meshnet.kernel.fakes.kernel import MemoryKernel
from meshnet.kernel.fakes.wiring import MemoryWiring
from meshnet.state import FdbKey, NeighbourKey
from meshnet.store.memory import MemoryStore
from meshnet.store.registry import Registry
from meshnet_agent.daemon import Parts, make_parts, run_parts
from meshnet_agent.dataplane.dirty import Dirty
from meshnet_agent.edges import Edges
from meshnet_agent.mesh.saver import SnapshotFile
from meshnet_agent.state_dir import StateDir
from tests.unit.host_ports import FakePorts
from tests.values import make_network, underlay_ip

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from meshnet.errors import MeshnetError
    from meshnet.model import IpAddress, IpNetwork, MeshSnapshot, Network, Vni
    from meshnet.state import KernelState
    from meshnet_agent.tasks.flag import Flag

T = TypeVar("T", covariant=True)
R = TypeVar("R")
TTL_S, GRACE_S, RESYNC_S = 15, 120, 60


class CountedDirty(Dirty):
    """Counts how often a pass over everything was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def mark_all(self) -> None:
        super().mark_all()
        self.count += 1


class InlineWorker(Generic[T]):
    """`meshnet_agent.tasks.worker.Worker` without a thread: a clock that jumps knows none."""

    def __init__(self, owned: T) -> None:
        self._owned = owned

    async def run(self, call: Callable[[T], R]) -> R:
        await trio.lowlevel.checkpoint()
        return call(self._owned)


@dataclass
class MemoryProber:
    """The wire, where a test says who answers for which address."""

    answers: dict[IpAddress, bytes] = field(default_factory=dict)
    error: MeshnetError | None = None

    async def probe(self, link: str, address: IpAddress) -> bytes | None:
        await trio.sleep(0.2)
        if self.error is not None:
            raise self.error
        return self.answers.get(address)


@dataclass
class MemoryTakeovers:
    """Takeovers, where a test says what stands and what fails, and sees what was asked for."""

    taken: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    failure: MeshnetError | None = None
    return_failure: MeshnetError | None = None

    def bridges(self) -> list[str]:
        return sorted(self.taken)

    async def standing(self) -> dict[str, str]:
        await trio.lowlevel.checkpoint()
        return dict(self.taken)

    async def take_over(self, bridge: str, parent: str, gateways: Sequence[IpAddress]) -> None:
        self.asked.append(f"take {bridge}")
        await trio.sleep(0.5)
        if self.failure is not None:
            raise self.failure
        self.taken[bridge] = parent

    async def give_back(self, bridge: str) -> None:
        self.asked.append(f"return {bridge}")
        await trio.sleep(0.5)
        if self.return_failure is not None:
            raise self.return_failure
        del self.taken[bridge]


@dataclass
class Node:
    """One host; what it has outlives its agent, as it does in reality."""

    id: str
    ip: IpAddress
    store: MemoryStore
    kernel: MemoryKernel
    directory: Path
    instance: str
    ports: FakePorts = field(default_factory=FakePorts)
    agent: Parts | None = None
    prober: MemoryProber = field(default_factory=MemoryProber)
    takeovers: MemoryTakeovers = field(default_factory=MemoryTakeovers)
    stop_agent: trio.CancelScope = field(default_factory=trio.CancelScope)
    stopped: trio.Event = field(default_factory=trio.Event)

    @property
    def running(self) -> Parts:
        assert self.agent is not None
        return self.agent

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Run the agent until it is stopped or ends by itself."""
        arguments = {
            "etcd": "memory", "underlay-ip": str(self.ip), "host-id": self.id,
            "lease-ttl": str(TTL_S), "grace": str(GRACE_S), "resync": str(RESYNC_S),
        }  # fmt: skip
        config = load_config(arguments, {}, None, hostname="")
        disk = StateDir(self.directory, lambda: self.instance)
        self.stopped = trio.Event()
        self.stop_agent = trio.CancelScope()
        edges = Edges(
            store=self.store,
            kernel=InlineWorker(self.kernel),
            wiring=InlineWorker(MemoryWiring(self.kernel)),
            state_dir=disk,
            snapshot=InlineWorker(SnapshotFile(disk.snapshot)),
            underlay_ip=self.ip,
            event_filter=EventFilter(),
            kernel_events=self,
            prober=self.prober,
            host_ports=self.ports,
            takeovers=self.takeovers,
        )
        self.agent = make_parts(config, edges)
        try:
            with self.stop_agent:
                await run_parts(self.agent, task_status)
        finally:
            disk.close()
            self.stopped.set()

    async def stop(self) -> None:
        """Stop the agent as a signal would: it gives its lease back."""
        self.stop_agent.cancel()
        await self.stopped.wait()

    async def crash(self) -> None:
        """End the agent without telling the store."""
        self.store.set_available(False)
        await self.stop()
        self.store.set_available(True)

    async def listen(
        self,
        event_filter: EventFilter,
        dirty: Dirty,
        rules_changed: Flag,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen as `KernelEvents` does: changes by others are noticed at once."""
        self.kernel.on_change = dirty.mark_all
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            self.kernel.on_change = None

    def see_another_store(self, store: MemoryStore) -> None:
        """Put another database at the same address, as a wiped or restored etcd is."""
        self.store.set_available(False)
        self.store._database = store._database
        self.store.set_available(True)

    def state(self) -> KernelState:
        return self.kernel.dump()

    def essence(self) -> KernelState:
        """The state without the numbers of nexthops, which may change when they are made again."""
        state = self.kernel.dump()
        nexthops = sorted(state.nexthops.items(), key=lambda item: item[1])
        number = {old: new for new, (old, _) in enumerate(nexthops, 1)} | {0: 0}
        routes = {k: r._replace(nexthop_id=number[r.nexthop_id]) for k, r in state.routes.items()}
        return replace(state, nexthops={number[i]: n for i, n in nexthops}, routes=routes)


class Mesh:
    """The hosts, and what happens to a packet between them."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.store = MemoryStore()
        self.registry = Registry(self.store)
        self.nodes: list[Node] = []
        self._made = 0
        self._directory = directory
        self._nursery = nursery

    async def create_network(self, name: str = "prod", *subnets: str) -> Network:
        def build(vni: Vni) -> Network:
            return make_network(name, subnets or ("10.42.0.0/16", "fd00:42::/48"), vni)

        return await self.registry.create_network(build, None)

    def add_node(self) -> Node:
        self._made += 1
        number = self._made
        ip = underlay_ip(number)
        directory = self._directory / f"h{number}"
        node = Node(
            f"h{number}", ip, self.store.connect(), MemoryKernel(ip), directory, f"i{number}"
        )
        self.nodes.append(node)
        return node

    async def start(self, node: Node) -> None:
        """Start a node's agent; on return its first pass is over."""
        await self._nursery.start(node.run)

    async def start_many(self, count: int) -> None:
        """Add nodes and start their agents, all at once."""
        async with trio.open_nursery() as nursery:
            for node in [self.add_node() for _ in range(count)]:
                nursery.start_soon(self.start, node)

    async def snapshot(self) -> MeshSnapshot:
        return await self.registry.snapshot()

    # --- packets --------------------------------------------------------------------------------

    def subnets_of(self, node: Node) -> list[IpNetwork]:
        """The subnets whose gateway the node is."""
        return [
            ip_network((a.address, a.prefix_length), strict=False) for a in node.state().addresses
        ]

    def deliver(self, source: Node, target: IpAddress) -> Node | None:
        """Find the host that a packet from one of `source`'s containers reaches."""
        state = source.state()
        packed = target.packed
        if any(target in subnet for subnet in self.subnets_of(source)):
            return source
        matching = [
            key
            for key in state.routes
            if len(key.prefix) == len(packed)
            and target in ip_network((key.prefix, key.prefix_length))
        ]
        if not matching:
            return None
        route = state.routes[max(matching, key=lambda key: key.prefix_length)]
        if not route.nexthop_id:
            return None
        nexthop = state.nexthops[route.nexthop_id]
        link = state.links.get(nexthop.dev)
        if link is None or link.vxlan is None or not link.up:
            return None
        mac = state.neighbours[NeighbourKey(nexthop.dev, nexthop.gateway)]
        remote = ip_address(state.fdb[FdbKey(nexthop.dev, mac)])
        for node in self.nodes:
            if node.ip == remote:
                return self._receive(node, target, link.vxlan.vni, mac)
        return None

    def _receive(self, node: Node, target: IpAddress, vni: int, mac: bytes) -> Node | None:
        """The far end: a VTEP with that VNI and MAC, and a subnet that holds the target."""
        vteps = node.state().links.values()
        if not any(link.vxlan and link.vxlan.vni == vni and link.mac == mac for link in vteps):
            return None
        return node if any(target in subnet for subnet in self.subnets_of(node)) else None

    def is_full(self, subnets_each: int = 2) -> bool:
        """Tell whether every running node reaches all subnets of all others."""
        running = [n for n in self.nodes if n.agent is not None and not n.stopped.is_set()]
        return all(
            len(self.subnets_of(b)) == subnets_each
            and all(self.deliver(a, s.network_address + 2) is b for s in self.subnets_of(b))
            for a in running
            for b in running
        )

    def reaches(self, source: Node, target: Node) -> bool:
        subnets = self.subnets_of(target)
        return bool(subnets) and all(
            self.deliver(source, s.network_address + 2) is target for s in subnets
        )


async def until(predicate: Callable[[], bool], what: str, deadline_s: float = 30) -> None:
    """Wait until something is true, by a clock that jumps."""
    with trio.move_on_after(deadline_s):
        while not predicate():  # noqa: ASYNC110  (there is no event for it, nor any real wait)
            await trio.sleep(0.05)
        return
    pytest.fail(f"not within {deadline_s} s: {what}")


@asynccontextmanager
async def open_mesh(directory: Path, seed: int = 1) -> AsyncIterator[Mesh]:
    """A mesh whose agents are all stopped at the end; scheduling and jitter come from `seed`."""
    random.seed(seed)
    trio._core._run._r.seed(seed)
    with pytest.MonkeyPatch.context() as patch, structlog.testing.capture_logs():
        patch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
        async with trio.open_nursery() as nursery:
            mesh = Mesh(directory, nursery)
            yield mesh
            nursery.cancel_scope.cancel()


async def full_mesh(mesh: Mesh, count: int) -> None:
    """A network and `count` hosts that all reach each other."""
    await mesh.create_network()
    await mesh.start_many(count)
    await until(mesh.is_full, "every host reaches every other")


def kinds(group: BaseException) -> set[type[BaseException]]:
    """The classes of the exceptions in a group."""
    if isinstance(group, BaseExceptionGroup):
        return {kind for error in group.exceptions for kind in kinds(error)}
    return {type(group)}
