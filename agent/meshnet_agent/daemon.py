"""The composition root: makes the parts of one host's agent, and runs them in nurseries.

::

    root: signals, API server
      └─ store: keep-alive, watch, reservations, endpoint publication, addresses of pools
           └─ data plane: kernel monitor, reconciler, endpoints

The innermost nursery is stopped first.  Stopping, crashing or losing the store removes nothing from
the kernel.  An unexpected exception ends the process, and systemd starts it again.

Parts see each other through small read-only protocols: what the mesh is (`mesh.view`), what the
data plane last did (`dataplane.view`), which endpoints this host has.  They learn of events in two
ways: the follower and the reconciler tell their listeners, and any part marks what is `Dirty`.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import MeshnetError
from meshnet.model import Claim, Host, HostId
from meshnet.plan import fallen_peers
from meshnet.runtime.spec.id_ranges import parse_range
from meshnet.store.registry import Registry
from meshnet_agent.api.app import Served, make_app, operations_of
from meshnet_agent.api.reports import ReportedParts, Reports
from meshnet_agent.api.server import open_socket, serve_api
from meshnet_agent.containers.bundle.paths import ContainerPaths
from meshnet_agent.containers.images import Images
from meshnet_agent.containers.lifecycle import Containers
from meshnet_agent.containers.runtime import RuntimeProvider
from meshnet_agent.dataplane.dirty import Dirty
from meshnet_agent.dataplane.fallback import Fallback
from meshnet_agent.dataplane.inputs import LocalParts, PassInputs
from meshnet_agent.dataplane.monitor import Monitor
from meshnet_agent.dataplane.occupancy import Occupancy
from meshnet_agent.dataplane.probes import Probes
from meshnet_agent.dataplane.reconciler import Reconciler
from meshnet_agent.dataplane.takeovers import Takeovers
from meshnet_agent.dataplane.underlay_address import UnderlayAddress
from meshnet_agent.edges import open_edges
from meshnet_agent.endpoints.addresses.pool import PoolAddresses
from meshnet_agent.endpoints.addresses.subnet import HostAddresses
from meshnet_agent.endpoints.attach import Attacher
from meshnet_agent.endpoints.directory import EndpointDirectory
from meshnet_agent.endpoints.keeper import Keeper
from meshnet_agent.endpoints.links import EndpointLinks
from meshnet_agent.endpoints.networks import ReadyNetworks
from meshnet_agent.endpoints.published_ports import PublishedPorts
from meshnet_agent.endpoints.records import EndpointRecords
from meshnet_agent.endpoints.sandbox import Sandboxes
from meshnet_agent.host_firewalls.opener import FirewallOpener
from meshnet_agent.mesh.arrival import learn_mesh
from meshnet_agent.mesh.follower import Follower
from meshnet_agent.mesh.identity import MeshIdentity
from meshnet_agent.mesh.liveness import Liveness
from meshnet_agent.mesh.membership import Claimant, Membership
from meshnet_agent.mesh.operations import MeshOperations
from meshnet_agent.mesh.presence import Presence
from meshnet_agent.mesh.publisher import Publisher
from meshnet_agent.mesh.saver import Saver
from meshnet_agent.notify import Notifier
from meshnet_agent.state_dir import RuntimeDir, hold_namespace
from meshnet_agent.tasks.readiness import Readiness
from meshnet_agent.tasks.right_of_way import RightOfWay

if TYPE_CHECKING:
    from meshnet.config import AgentConfig
    from meshnet_agent.containers.directory import ContainerDirectory
    from meshnet_agent.edges import Edges

_log = structlog.get_logger()
_FIRST_RESERVATIONS_S = 2.0
"""How long the first pass waits for this host's subnets at most."""
_LEAVE_S = 2.0
"""How long giving the lease back may delay the end of the agent; else the lease runs out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All parts of one host's agent (see "Parts" in docs/architecture.md)."""

    edges: Edges
    readiness: Readiness
    dirty: Dirty
    right_of_way: RightOfWay
    registry: Registry
    identity: MeshIdentity
    follower: Follower
    saver: Saver
    liveness: Liveness
    membership: Membership
    publisher: Publisher
    pool: PoolAddresses
    endpoints: EndpointDirectory
    ports: PublishedPorts
    attacher: Attacher
    networks: ReadyNetworks
    keeper: Keeper
    takeovers: Takeovers
    fallback: Fallback
    reconciler: Reconciler
    probes: Probes
    monitor: Monitor
    inputs: PassInputs
    firewalls: FirewallOpener
    occupancy: Occupancy


def make_parts(config: AgentConfig, edges: Edges) -> Parts:
    """Make all parts; none of them runs yet."""
    claimant = _claimant(config, edges)
    host = claimant.host.id
    dirty, right_of_way = Dirty(), RightOfWay()
    registry, identity = Registry(edges.store), MeshIdentity(edges.store, edges.state_dir.mesh)
    follower = Follower(edges.store, identity, right_of_way)
    saver = Saver(follower, identity, host, edges.snapshot)
    liveness = Liveness(follower, config.grace_s)
    records = EndpointRecords(edges.state_dir.endpoints)
    endpoints = EndpointDirectory(records, host)
    pool = PoolAddresses(edges.store, host, edges.prober, follower, endpoints, dirty)
    membership = Membership(registry, identity, claimant, dirty, endpoints)
    takeovers = Takeovers(edges.takeovers, follower, dirty)
    fallback = Fallback(secrets.randbits(62), trio.current_time())
    local = LocalParts(
        membership=membership,
        endpoints=endpoints,
        pool=pool,
        takeovers=takeovers,
        fallback=fallback,
        store=edges.store_addresses,
    )
    inputs = PassInputs(follower, liveness, local, dirty, config.underlay_dev)
    reconciler = Reconciler(edges.kernel, inputs, dirty, right_of_way, config.resync_s)
    networks = ReadyNetworks(follower, reconciler, membership, registry, edges.wiring)
    links = EndpointLinks(edges.wiring, records)
    ports = PublishedPorts(edges.host_ports, reconciler)
    addresses = HostAddresses(endpoints, pool)
    keeper = Keeper(endpoints, Sandboxes(edges.wiring), links, ports, addresses, networks)
    attacher = Attacher(endpoints, keeper, links, ports, addresses, networks, right_of_way)
    parts = Parts(
        edges=edges,
        readiness=Readiness(),
        dirty=dirty,
        right_of_way=right_of_way,
        registry=registry,
        identity=identity,
        follower=follower,
        saver=saver,
        liveness=liveness,
        membership=membership,
        publisher=Publisher(registry, follower, endpoints, host),
        pool=pool,
        endpoints=endpoints,
        ports=ports,
        attacher=attacher,
        networks=networks,
        keeper=keeper,
        takeovers=takeovers,
        fallback=fallback,
        reconciler=reconciler,
        probes=Probes(edges.vteps, inputs, fallback, dirty),
        monitor=Monitor(edges.kernel, edges.event_filter, follower),
        inputs=inputs,
        firewalls=FirewallOpener(edges.firewalls, follower, on=config.open_firewalls == "auto"),
        occupancy=Occupancy(edges.kernel, edges.store_addresses, membership, config.underlay_dev),
    )
    _introduce(parts)
    return parts


def _introduce(parts: Parts) -> None:
    """Register the listeners; they are told in this order.

    Liveness comes first, because the inputs of passes ask it which hosts have expired.
    """
    parts.membership.occupied = parts.edges.occupied
    parts.edges.event_filter.expects_endpoint = parts.endpoints.expects_link
    parts.follower.tell(
        parts.liveness,
        parts.membership,
        parts.keeper,
        Presence(parts.membership.host.id, parts.publisher, parts.pool),
        parts.pool,
        parts.inputs,
        parts.probes,
        parts.saver,
    )
    parts.reconciler.tell(
        UnderlayAddress(parts.edges.store, parts.membership),
        parts.monitor,
        parts.pool,
        parts.takeovers,
        parts.keeper,
        parts.probes,
        parts.firewalls,
    )


def _claimant(config: AgentConfig, edges: Edges) -> Claimant:
    ip = edges.underlay_ip
    return Claimant(
        host=Host(id=HostId(config.host_id), underlay_ip=ip, datapath=edges.datapath),
        claim=Claim(instance=edges.state_dir.instance, underlay_ip=ip),
        ttl_s=config.lease_ttl_s,
    )


async def run_parts(
    parts: Parts, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Join the mesh and serve it until cancelled; started once the first pass is applied.

    Cancellation gives the lease back and removes nothing from the kernel.

    Raises:
        ConflictError: another agent runs as this host, or this state directory is another host's.
        StoreUnavailableError: the store did not answer while the agent started.
        PolicyRefusedError: the store is not this host's mesh.
    """
    # Records first: a host whose id changed must not take over endpoints of the id before, and has
    # to be refused before it claims anything.
    await parts.keeper.load()
    await learn_mesh(parts.membership, parts.follower, parts.saver)
    try:
        async with trio.open_nursery() as store:
            store.start_soon(parts.membership.keep_alive)
            store.start_soon(parts.membership.reserve)
            store.start_soon(parts.follower.watch)
            store.start_soon(parts.publisher.run)
            store.start_soon(parts.saver.run)
            async with trio.open_nursery() as data_plane:
                await data_plane.start(parts.keeper.run)
                data_plane.start_soon(parts.ports.run)
                if parts.follower.is_complete:  # else its own task lists them, once it can
                    await parts.pool.load()
                store.start_soon(parts.pool.run)
                # The listing came before the keeper ran, and networks may have been removed while
                # this agent was down.
                parts.keeper.mesh_changed(parts.follower.snapshot, None)
                await _start_data_plane(parts, data_plane)
                parts.readiness.ready = True
                task_status.started()
    finally:
        with trio.move_on_after(_LEAVE_S, shield=True), contextlib.suppress(MeshnetError):
            await parts.membership.leave()
        parts.identity.save()


async def _start_data_plane(parts: Parts, nursery: trio.Nursery) -> None:
    """Listen first, then dump: otherwise a change in between would be missed."""
    edges = parts.edges
    await nursery.start(
        edges.kernel_events.listen, edges.event_filter, parts.dirty, parts.firewalls.changed
    )
    await nursery.start(edges.store_addresses.run, parts.dirty)
    # Without its first subnets the first pass would program next to nothing, and "ready" would come
    # too early.
    with trio.move_on_after(_FIRST_RESERVATIONS_S):
        await parts.membership.settled()
    await _adopt_fallen(parts)
    await nursery.start(parts.takeovers.run)
    nursery.start_soon(parts.monitor.run)
    await nursery.start(parts.reconciler.run)
    nursery.start_soon(parts.probes.run)
    nursery.start_soon(parts.firewalls.run)


async def _adopt_fallen(parts: Parts) -> None:
    """Take from the kernel's routes which peers are in fallback: a restart must move nobody."""
    snapshot = parts.follower.snapshot
    if any(network.fallback for network in snapshot.networks.values()):
        state = await parts.edges.kernel.run(lambda kernel: kernel.dump())
        parts.fallback.adopt(fallen_peers(snapshot, state), trio.current_time())


async def serve(config: AgentConfig) -> None:
    """Run the agent of this host until SIGTERM or SIGINT.

    The containers' tasks stop first, because cleaning up after a container that ended needs the
    mesh's parts.  The API stops last, so that requests get an answer until the end.
    """
    notifier = Notifier()
    with hold_namespace(), contextlib.closing(RuntimeDir(Path(config.run_dir))) as run_dir:
        await _serve(config, run_dir, notifier)


async def _serve(config: AgentConfig, run_dir: RuntimeDir, notifier: Notifier) -> None:
    id_pool = parse_range(config.userns_range, "userns-range")
    async with open_edges(config, run_dir) as edges:
        parts = make_parts(config, edges)
        images = Images(
            edges.state_dir.images,
            max_bytes=config.image_max_bytes,
            max_entries=config.image_max_entries,
        )
        await images.collect()
        mesh = make_operations(parts)
        runtime = RuntimeProvider(run_dir.oci, systemd_cgroup=config.cgroup_driver == "systemd")
        paths = ContainerPaths(
            state=edges.state_dir.containers,
            run=run_dir.containers,
            userns=run_dir.userns,
            images=edges.state_dir.images,
            volumes=edges.state_dir.volumes,
        )
        containers = Containers(paths, mesh, runtime, id_pool)
        reports = Reports(report_sources(parts, runtime, containers.directory))
        served = Served(mesh=mesh, reports=reports, images=images, containers=containers)
        with open_socket(run_dir.socket) as listener:
            async with trio.open_nursery() as root:
                app = make_app(operations_of(served, parts.readiness), parts.readiness)
                stop_api = await root.start(serve_api, listener, app)
                async with trio.open_nursery() as middle:
                    with trio.CancelScope() as running:
                        root.start_soon(_stop_on_signal, parts.readiness, running, notifier)
                        await middle.start(run_parts, parts)
                        async with trio.open_nursery() as inner:
                            await inner.start(containers.run)
                            notifier.tell("READY=1")
                            _log.info("ready", host=config.host_id, socket=listener.getsockname())
                    middle.cancel_scope.cancel()
                stop_api.set()
                root.cancel_scope.cancel()


def make_operations(parts: Parts) -> MeshOperations:
    """The operations that the API and the containers call."""
    return MeshOperations(
        parts.follower,
        parts.registry,
        parts.networks,
        parts.endpoints,
        parts.attacher,
        parts.occupancy,
    )


def report_sources(
    parts: Parts, runtime: RuntimeProvider, containers: ContainerDirectory | None = None
) -> ReportedParts:
    """The parts that the API's reports are made from."""
    return ReportedParts(
        follower=parts.follower,
        liveness=parts.liveness,
        membership=parts.membership,
        reconciler=parts.reconciler,
        fallback=parts.fallback,
        endpoints=parts.endpoints,
        ports=parts.ports,
        firewalls=parts.firewalls,
        pool=parts.pool,
        wiring=parts.edges.wiring,
        vteps=parts.edges.vteps,
        runtime=runtime,
        containers=containers,
    )


async def _stop_on_signal(
    readiness: Readiness, running: trio.CancelScope, notifier: Notifier
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            _log.info("stopping", signal=signal.Signals(number).name)
            notifier.tell("STOPPING=1")
            # Before anything stops: a new request is refused with a reason, not cut off.
            readiness.ready = False
            running.cancel()
