"""The agent: its parts, wired together, in nurseries.

::

    root: signals, API server
      └─ store: keep-alive, watch, reservations, endpoint publication, addresses of pools
           └─ data plane: kernel monitor, reconciler, endpoints

The innermost is stopped first.  Stopping, crashing or losing the store removes nothing from the
kernel.  An unexpected exception ends the process; systemd starts it again.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.backends.macvlan import shim_name
from meshnet.backends.overlay import bridge_name
from meshnet.backends.udp import tun_name
from meshnet.backends.underlay_bridge import parent_bridge_name
from meshnet.backends.vxlan import vxlan_name
from meshnet.errors import MeshnetError
from meshnet.kernel.events import EventFilter, nftables_concerns_us
from meshnet.model import Claim, Datapath, Host, HostId, Mode
from meshnet.plan import LocalView, fallen_peers, probed_peers
from meshnet.store.registry import Registry
from meshnet_agent.dataplane.monitor import listen
from meshnet_agent.dataplane.passes import HostView, PartInput, PassInput
from meshnet_agent.dataplane.probes import Probes, Target
from meshnet_agent.dataplane.reconciler import Reconciler
from meshnet_agent.dataplane.takeovers import Takeovers
from meshnet_agent.endpoints.addresses.pool import PoolAddresses
from meshnet_agent.endpoints.addresses.subnet import HostAddresses, SubnetAddresses
from meshnet_agent.endpoints.attach import Attacher
from meshnet_agent.endpoints.directory import EndpointDirectory
from meshnet_agent.endpoints.keeper import Keeper
from meshnet_agent.endpoints.links import EndpointLinks
from meshnet_agent.endpoints.networks import ReadyNetworks
from meshnet_agent.endpoints.published_ports import PublishedPorts
from meshnet_agent.endpoints.records import EndpointRecords
from meshnet_agent.endpoints.sandbox import Sandboxes
from meshnet_agent.mesh.follower import Follower
from meshnet_agent.mesh.identity import MeshIdentity
from meshnet_agent.mesh.membership import Membership
from meshnet_agent.mesh.publisher import Publisher
from meshnet_agent.tasks.right_of_way import RightOfWay

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from meshnet.config import AgentConfig
    from meshnet.kernel import Kernel, Wiring
    from meshnet.kernel.address_probe import AddressProber
    from meshnet.kernel.vteps import VtepProcesses
    from meshnet.model import IpAddress, IpNetwork, MeshSnapshot, NetworkName
    from meshnet.store import Store
    from meshnet.store.mirror import Changes
    from meshnet_agent.dataplane.fallback import Pair
    from meshnet_agent.dataplane.takeovers import TakeoverRunner
    from meshnet_agent.endpoints.published_ports import HostPorts
    from meshnet_agent.state_dir import StateDir
    from meshnet_agent.tasks.worker import Worker

    Listen = Callable[..., Awaitable[None]]

_log = structlog.get_logger()
_FIRST_RESERVATIONS_S = 2.0


class Agent:
    """One host's agent, on any store and any kernel.

    Args:
        datapath: what forwards this host's packets on ``vxlan`` networks.
        vteps: its userspace VTEPs, to ask what they counted.
        prober: asks the wire whether an address is free.
        host_ports: the ports of this host, to keep its processes off published ones.
        takeovers: takes this host's links over, for networks that have them for a parent.
        listen: waits for the kernel's notifications (`meshnet_agent.dataplane.monitor.listen`).
    """

    def __init__(
        self,
        config: AgentConfig,
        store: Store,
        kernel: Worker[Kernel],
        wiring: Worker[Wiring],
        disk: StateDir,
        underlay_ip: IpAddress,
        event_filter: EventFilter,
        prober: AddressProber,
        host_ports: HostPorts,
        takeovers: TakeoverRunner,
        listen: Listen = listen,
        *,
        datapath: Datapath = Datapath.KERNEL,
        vteps: VtepProcesses | None = None,
    ) -> None:
        self.config = config
        self.ready = False
        self.vteps = vteps
        self._kernel = kernel
        self._wiring = wiring
        self.host = Host(id=HostId(config.host_id), underlay_ip=underlay_ip, datapath=datapath)
        self.registry = Registry(store)
        claim = Claim(instance=disk.instance, underlay_ip=underlay_ip)
        self._event_filter = event_filter
        self._listen = listen
        self.way = RightOfWay()
        self.reconciler = Reconciler(
            kernel,
            self._gather,
            self._gather_part,
            self._on_missing_links,
            resync_s=config.resync_s,
            next_change_s=self._next_expiry_s,
            way=self.way,
        )
        self.probes = Probes(vteps, self._whom_to_probe, self.reconciler.touch)
        self.identity = MeshIdentity(store, disk.mesh)
        self.follower = Follower(store, self.identity, self._on_snapshot, self._on_return, self.way)
        self.membership = Membership(
            self.registry,
            self.host,
            claim,
            ttl_s=config.lease_ttl_s,
            check_store=self.identity.check,
            on_change=self.reconciler.mark_dirty,
            endpoints_in=self._endpoints_in,
        )
        records = EndpointRecords(disk.endpoints)
        links = EndpointLinks(wiring, records)
        self.endpoints = EndpointDirectory(records, self.host.id)
        self.pool = PoolAddresses(
            store, self.host.id, prober, self.follower, self.reconciler, self.endpoints
        )
        self.ports = PublishedPorts(host_ports, self.reconciler)
        self.networks = ReadyNetworks(
            self.follower, self.reconciler, self.membership, self.registry, wiring
        )
        addresses = HostAddresses(SubnetAddresses(self.endpoints), self.pool)
        self.keeper = Keeper(
            self.endpoints, Sandboxes(wiring), links, self.ports, addresses, self.networks
        )
        self.attacher = Attacher(
            self.endpoints, self.keeper, links, self.ports, addresses, self.networks, self.way
        )
        event_filter.expects_endpoint = self.endpoints.expects_link
        self.publisher = Publisher(
            self.registry,
            self.endpoints,
            self.host.id,
            lambda: self.follower.snapshot.networks,
            self.follower.check_store,
            lambda: self.follower.connected,
        )
        self.takeovers = Takeovers(
            takeovers,
            snapshot=lambda: self.follower.snapshot,
            underlay=lambda: self.reconciler.result.underlay,
            on_change=self.reconciler.mark_dirty,
        )
        self._was_alive = False
        self._expired: frozenset[HostId] = frozenset()

    # --- life ---------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Join the mesh and serve it until cancelled; started when the first pass is applied.

        Raises:
            ConflictError: another agent is this host, or this one was another host before.
            StoreUnavailableError: the store did not answer at start.
            PolicyRefusedError: the store is not this host's mesh.
        """
        await self.keeper.load()
        await self.membership.join()
        await self.follower.list_all()
        try:
            async with trio.open_nursery() as store_nursery:
                store_nursery.start_soon(self.membership.keep_alive)
                store_nursery.start_soon(self.membership.reserve)
                store_nursery.start_soon(self.follower.watch)
                store_nursery.start_soon(self.publisher.run)
                async with trio.open_nursery() as data_plane:
                    await data_plane.start(self.keeper.run)
                    data_plane.start_soon(self.ports.run)
                    await self.pool.load()
                    store_nursery.start_soon(self.pool.run)
                    # Networks may have been removed while this agent was down.
                    self._on_snapshot(self.follower.snapshot, None)
                    await data_plane.start(
                        self._listen,
                        self._event_filter.concerns_us,
                        nftables_concerns_us,
                        self.reconciler.mark_dirty,
                    )
                    # The first pass is a useful one if it has the first reservations.
                    with trio.move_on_after(_FIRST_RESERVATIONS_S):
                        await self.membership.settled()
                    await self._adopt_fallen()
                    await data_plane.start(self.takeovers.run)
                    await data_plane.start(self.reconciler.run)
                    data_plane.start_soon(self._keep_filter_current)
                    data_plane.start_soon(self.probes.run)
                    self.ready = True
                    task_status.started()
        finally:
            with trio.move_on_after(2, shield=True), contextlib.suppress(MeshnetError):
                await self.membership.leave()
            self.identity.save()

    async def _keep_filter_current(self) -> None:
        while True:
            self.probes.refresh()  # which peers are on-link may have changed
            underlay = self.reconciler.result.underlay
            if underlay is not None:
                self._follow_address(underlay.ip)
                networks = self.follower.snapshot.networks.values()
                parents = {n.parent for n in networks if n.parent is not None}
                parents |= {
                    parent_bridge_name(n) for n in networks if n.mode is Mode.UNDERLAY_BRIDGE
                }
                self._event_filter.look_at(
                    indices_of([name(n) for n in networks for name in (bridge_name, shim_name)]),
                    indices_of([name(n) for n in networks for name in (vxlan_name, tun_name)]),
                    indices_of([*underlay.forwarding_links, *parents]),
                    parents,
                )
            self.pool.look()
            self.takeovers.look()
            self.keeper.look()
            await self.reconciler.wait_for_pass()

    def _follow_address(self, underlay_ip: IpAddress) -> None:
        """Publish where this host is now, if its link was given another address."""
        if underlay_ip != self.host.underlay_ip:
            _log.warning(
                "underlay address changed",
                before=str(self.host.underlay_ip),
                now=str(underlay_ip),
            )
            self.host = replace(self.host, underlay_ip=underlay_ip)
            self.registry.store.reconnect()
            self.membership.move(self.host)
            self.probes.refresh()

    async def _adopt_fallen(self) -> None:
        """Start from the ways that the kernel sends by: a restart moves nobody."""
        snapshot = self.follower.snapshot
        if any(network.fallback for network in snapshot.networks.values()):
            state = await self._kernel.run(lambda kernel: kernel.dump())
            self.probes.adopt(fallen_peers(snapshot, state))

    def _whom_to_probe(self) -> dict[Pair, Target] | None:
        snapshot, result = self.follower.snapshot, self.reconciler.result
        if result.underlay is None or snapshot.holes:
            return None
        local = self._local_view()
        targets: dict[Pair, Target] = {}
        for network in snapshot.networks.values():
            outcome = result.networks.get(network.name)
            if not network.fallback:
                continue
            if outcome is None:
                return None  # the next pass has it
            if outcome.plan is None:
                continue
            mtu_bytes = outcome.plan.mtu_bytes
            for host, peer in probed_peers(network, snapshot, local, result.underlay).items():
                target = Target(tun_name(network), str(peer.host.underlay_ip), mtu_bytes)
                targets[network.name, host] = target
        return targets

    def _local_view(self) -> LocalView:
        """What this agent knows of its own host, now."""
        return LocalView(
            host=self.host.id,
            subnets=dict(self.membership.subnets),
            endpoints=self.endpoints.all,
            addresses=dict(self.pool.host_addresses),
            takeovers=dict(self.takeovers.states),
            expired=self._expired,
            fallen=self.probes.fallen,
        )

    def _next_expiry_s(self) -> float:
        """Seconds until the next dead host's grace period ends."""
        left = (self.config.grace_s - dead_s for dead_s in self.follower.dead_for_s().values())
        return min((seconds for seconds in left if seconds > 0), default=float("inf"))

    def _gather(self) -> PassInput:
        self._expired = self._find_expired()
        return PassInput(
            snapshot=self.follower.copy_snapshot(),
            local=self._local_view(),
            underlay_ip=self.host.underlay_ip,
            underlay_dev=self.config.underlay_dev,
        )

    def _gather_part(self, hosts: Collection[HostId]) -> PartInput | None:
        expired, before = self._find_expired(), self._expired
        self._expired = expired
        if not hosts and expired == before:
            return None
        snapshot = self.follower.snapshot
        if snapshot.holes:
            self.reconciler.mark_dirty()  # it knows what may be deleted
            return None
        return PartInput(
            hosts={h: HostView(snapshot.hosts.get(h), snapshot.reserved_by(h)) for h in hosts},
            expired=expired,
            fallen=self.probes.fallen,
        )

    def _find_expired(self) -> frozenset[HostId]:
        dead = self.follower.dead_for_s()
        return frozenset(h for h, s in dead.items() if s >= self.config.grace_s)

    def _on_snapshot(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        self.membership.follow(snapshot)
        self.keeper.follow(snapshot)
        alive = self.host.id in snapshot.alive
        if alive and not self._was_alive:
            # Somebody may have removed this host, and with it what it published, in between.
            self.publisher.refresh()
            self.pool.refresh()
        self._was_alive = alive
        if changes is None or changes.networks:
            self.pool.refresh()
        if changes is None or changes.networks or snapshot.holes:
            self.reconciler.mark_dirty()
            self.probes.refresh()
        else:
            # A lease alone changes nothing in the kernel, but for a host that was given up.
            touched = changes.hosts | (changes.leases & self._expired)
            self.reconciler.touch(touched)
            if touched:
                self.probes.refresh()

    def _endpoints_in(self, network: NetworkName, version: int) -> IpNetwork | None:
        return self.endpoints.subnet_of(network, version)

    def _on_return(self) -> None:
        """What was written last may have gone to an etcd that is no more."""
        self.publisher.refresh()
        self.pool.refresh()

    def _on_missing_links(self, names: Collection[str]) -> None:
        self.keeper.look(names)

    async def drops(self) -> dict[str, int]:
        """Packets that this host's firewall dropped, by reason."""
        return await self._wiring.run(lambda wiring: wiring.drops())


def indices_of(names: Collection[str]) -> set[int]:
    """Indices of those links that exist."""
    found = set()
    for name in names:
        with contextlib.suppress(OSError):
            found.add(socket.if_nametoindex(name))
    return found
