"""What the API shows of the agent's parts: values, taken from all parts in one place.

Documents are built from these reports alone, so that nothing changes while they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from meshnet.backends.table import backend_of
from meshnet.errors import NotFoundError
from meshnet.model import NetworkName

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from meshnet.backends import Underlay
    from meshnet.kernel import Wiring
    from meshnet.kernel.vteps import VtepProcesses
    from meshnet.model import (
        Endpoint,
        HostId,
        IpNetwork,
        MeshSnapshot,
        Network,
    )
    from meshnet.plan import NetworkOutcome
    from meshnet_agent.containers.directory import ContainerDirectory
    from meshnet_agent.containers.runtime import RuntimeProvider
    from meshnet_agent.dataplane.fallback import Fall, Fallback, FallbackReport, Pair
    from meshnet_agent.dataplane.reconciler import PassesReport, Reconciler
    from meshnet_agent.endpoints.addresses.pool import PoolAddresses, PoolReport
    from meshnet_agent.endpoints.directory import EndpointDirectory, EndpointsReport
    from meshnet_agent.endpoints.published_ports import PublishedPorts
    from meshnet_agent.host_firewalls.opener import FirewallOpener
    from meshnet_agent.mesh.follower import Follower, StoreReport
    from meshnet_agent.mesh.liveness import Liveness
    from meshnet_agent.mesh.membership import Membership, MembershipReport
    from meshnet_agent.tasks.worker import Worker

_SLICE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class VtepReport:
    """What the userspace VTEP of a network counted.

    Attributes:
        counters: `meshnet.vtep.control`; empty if it did not answer.
        hosts: by underlay address.
    """

    counters: Mapping[str, Any]
    hosts: Mapping[str, HostId]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkReport:
    """A network with what hangs on it.

    Attributes:
        mtu_bytes: what its endpoints get on this host; None while it is not up here.
        hosts: each host's subnets.
        endpoints: those of this host.
        vtep: None: it has no userspace VTEP here.
    """

    network: Network
    mtu_bytes: int | None
    hosts: Mapping[HostId, Sequence[IpNetwork]]
    endpoints: Sequence[Endpoint]
    vtep: VtepReport | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PathsReport:
    """By what packets leave this host for the others, and which of those are dead.

    Attributes:
        dead_for_s: hosts without a lease, and for how many seconds this agent has seen them so.
        here: this host.
        underlay, networks: of the last pass.
        falls: peers in fallback.
    """

    here: HostId
    snapshot: MeshSnapshot
    underlay: Underlay | None
    networks: Mapping[NetworkName, NetworkOutcome]
    falls: Mapping[Pair, Fall]
    dead_for_s: Mapping[HostId, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    """All that ``meshnet status`` shows.

    Attributes:
        dead: hosts without a lease.
        port_notes: what an operator should know of published ports.
        firewall_notes: which other firewalls keep packets out.
        drops: packets that this host's firewall dropped, by reason.
        passed_over: OCI runtimes that cannot run here, and why.
        vtep_engine: that of new userspace VTEPs; None: this host can have none.
    """

    snapshot: MeshSnapshot
    store: StoreReport
    membership: MembershipReport
    dead: Collection[HostId]
    passes: PassesReport
    endpoints: EndpointsReport
    port_notes: Sequence[str]
    firewall_notes: Sequence[str]
    pool: PoolReport
    fallback: FallbackReport
    drops: Mapping[str, int]
    passed_over: Mapping[str, str]
    container_errors: Sequence[str]
    vtep_engine: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedParts:
    """The parts that reports are taken of.

    Attributes:
        vteps: None: this host can have no userspace VTEP.
        containers: None: this agent does not run containers.
        runtime: what runs this host's containers.
    """

    follower: Follower
    liveness: Liveness
    membership: Membership
    reconciler: Reconciler
    fallback: Fallback
    endpoints: EndpointDirectory
    ports: PublishedPorts
    firewalls: FirewallOpener
    pool: PoolAddresses
    wiring: Worker[Wiring]
    vteps: VtepProcesses | None
    runtime: RuntimeProvider
    containers: ContainerDirectory | None = None


class Reports:
    """Takes the reports."""

    def __init__(self, parts: ReportedParts) -> None:
        self._follower = parts.follower
        self._liveness = parts.liveness
        self._membership = parts.membership
        self._reconciler = parts.reconciler
        self._fallback = parts.fallback
        self._endpoints = parts.endpoints
        self._ports = parts.ports
        self._firewalls = parts.firewalls
        self._pool = parts.pool
        self._wiring = parts.wiring
        self._vteps = parts.vteps
        self._containers = parts.containers
        self._runtime = parts.runtime

    def networks(self) -> list[tuple[Network, int | None]]:
        """All networks, each with the MTU of its endpoints on this host, None while unknown."""
        networks = self._follower.snapshot.networks.values()
        return [(network, self._mtu_bytes(network.name)) for network in networks]

    def _mtu_bytes(self, name: NetworkName) -> int | None:
        outcome = self._reconciler.result.networks.get(name)
        return outcome.plan.mtu_bytes if outcome is not None and outcome.plan is not None else None

    async def network(self, name: str) -> NetworkReport:
        """One network.

        Raises:
            NotFoundError: there is no such network.
        """
        snapshot = self._follower.snapshot
        network = snapshot.networks.get(NetworkName(name))
        if network is None:
            raise NotFoundError(f"network {name} does not exist: meshnet network ls lists them")
        hosts: dict[HostId, Sequence[IpNetwork]] = {}
        for number, host in enumerate(list(snapshot.hosts)):
            await let_others_run(number)
            owned = snapshot.subnets_of(host, network.name)
            if owned:
                hosts[host] = owned
        return NetworkReport(
            network=network,
            mtu_bytes=self._mtu_bytes(network.name),
            hosts=hosts,
            endpoints=[e for e in self._endpoints.all if e.network == network.name],
            vtep=await self._vtep(network),
        )

    async def _vtep(self, network: Network) -> VtepReport | None:
        underlay = self._reconciler.result.underlay
        if self._vteps is None or underlay is None:
            return None
        tun = backend_of(network).on(underlay).userspace_vtep(network)
        if tun is None:
            return None
        counters = await trio.to_thread.run_sync(self._vteps.counters, tun)
        hosts = self._follower.snapshot.hosts.values()
        return VtepReport(counters=counters, hosts={str(h.underlay_ip): h.id for h in hosts})

    def paths(self) -> PathsReport:
        """By what packets leave this host for the others, now."""
        result = self._reconciler.result
        return PathsReport(
            here=self._membership.host.id,
            snapshot=self._follower.snapshot,
            underlay=result.underlay,
            networks=result.networks,
            falls=dict(self._fallback.falls),
            dead_for_s=self._liveness.dead_for_s(),
        )

    async def status(self) -> StatusReport:
        """How this host is doing.

        Raises:
            KernelRefusedError: the firewall's counters cannot be read.
        """
        drops = await self._wiring.run(lambda wiring: wiring.drops())
        # From here on nothing is waited for: what is shown is of one moment.
        snapshot = self._follower.snapshot
        return StatusReport(
            snapshot=snapshot,
            store=self._follower.report(),
            membership=self._membership.report(),
            dead=self._liveness.dead_for_s().keys(),
            passes=self._reconciler.report(),
            endpoints=self._endpoints.report(),
            port_notes=self._ports.report(),
            firewall_notes=self._firewalls.report(),
            pool=self._pool.report(),
            fallback=self._fallback.report(trio.current_time()),
            drops=drops,
            passed_over=self._runtime.report(),
            container_errors=self._containers.report() if self._containers is not None else (),
            vtep_engine=self._vteps.engine if self._vteps is not None else None,
        )


async def let_others_run(number: int) -> None:
    """Called for each of thousands of items: they must not hold up an attach."""
    if number % _SLICE == _SLICE - 1:
        await trio.lowlevel.checkpoint()
