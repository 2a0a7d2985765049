"""What the API shows of the agent's parts: values, taken from all parts in one place.

Documents are built from these reports alone, so that nothing changes while they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from meshnet.backends.table import backend_of
from meshnet.errors import NotFoundError
from meshnet.model import NetworkName
from meshnet_agent.dataplane.pass_values import PassResult

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from meshnet.backends import Underlay
    from meshnet.errors import MeshnetError
    from meshnet.kernel import Wiring
    from meshnet.kernel.vteps import VtepProcesses
    from meshnet.model import (
        Endpoint,
        EndpointId,
        Host,
        HostId,
        IpAddress,
        IpNetwork,
        MeshSnapshot,
        Network,
    )
    from meshnet.plan import NetworkOutcome
    from meshnet_agent.containers.runtime import RuntimeProvider
    from meshnet_agent.dataplane.fallback import Fall, Fallback, Pair, Statistics
    from meshnet_agent.dataplane.reconciler import Reconciler
    from meshnet_agent.endpoints.addresses.pool import PoolAddresses
    from meshnet_agent.endpoints.directory import EndpointDirectory
    from meshnet_agent.endpoints.published_ports import PublishedPorts
    from meshnet_agent.mesh.follower import Follower
    from meshnet_agent.mesh.liveness import Liveness
    from meshnet_agent.mesh.membership import Membership
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
    """By what packets leave this host for the others.

    Attributes:
        here: this host.
        underlay, networks: of the last pass.
        falls: peers in fallback.
    """

    here: HostId
    snapshot: MeshSnapshot
    underlay: Underlay | None
    networks: Mapping[NetworkName, NetworkOutcome]
    falls: Mapping[Pair, Fall]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreReport:
    """How the store is heard.

    Attributes:
        connected: the watch runs.
        lag_s: seconds since it was last heard of.
        error: why the watch does not run.
        lease_ok: this host's lease was renewed.
        refusals: networks without a subnet for this host, and why.
        dead: hosts without a lease.
    """

    connected: bool
    lag_s: float
    error: str | None
    lease_ok: bool
    refusals: Mapping[NetworkName, MeshnetError]
    dead: Collection[HostId]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassesReport:
    """What the reconciler did (`meshnet_agent.dataplane.reconciler.Reconciler`)."""

    result: PassResult = field(default_factory=PassResult)
    blocked: str | None = None
    in_sync: bool = True
    pending: int = 0
    passes: int = 0
    full_passes: int = 0
    writes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointsReport:
    """This host's endpoints.

    Attributes:
        unhealed: those whose link is gone for good, and why.
        unreadable: ids of those whose record could not be read.
        port_notes: what an operator should know of published ports.
    """

    all: Sequence[Endpoint]
    unhealed: Mapping[EndpointId, str]
    unreadable: Collection[str]
    port_notes: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolReport:
    """Addresses of underlay networks.

    Attributes:
        errors: by network.
        set_aside: addresses that a machine outside the mesh has, with its MAC.
        bad_values: keys of the store whose value cannot be used, and why.
    """

    errors: Mapping[NetworkName, Sequence[str]]
    set_aside: Sequence[tuple[NetworkName, IpAddress, bytes]]
    bad_values: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbesReport:
    """What the probes found.

    Attributes:
        falls: peers in fallback.
        now: the time that `Fall.since` counts in.
        statistics: of networks with a fallback.
    """

    falls: Mapping[Pair, Fall]
    now: float
    statistics: Mapping[NetworkName, Statistics]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    """All that ``meshnet status`` shows.

    Attributes:
        drops: packets that this host's firewall dropped, by reason.
        passed_over: OCI runtimes that cannot run here, and why.
    """

    host: Host
    snapshot: MeshSnapshot
    store: StoreReport
    passes: PassesReport
    endpoints: EndpointsReport
    pool: PoolReport
    probes: ProbesReport
    drops: Mapping[str, int]
    passed_over: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedParts:
    """The parts that reports are taken of.

    Attributes:
        vteps: None: this host can have no userspace VTEP.
        runtime: what runs this host's containers.
    """

    follower: Follower
    liveness: Liveness
    membership: Membership
    reconciler: Reconciler
    fallback: Fallback
    endpoints: EndpointDirectory
    ports: PublishedPorts
    pool: PoolAddresses
    wiring: Worker[Wiring]
    vteps: VtepProcesses | None
    runtime: RuntimeProvider


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
        self._pool = parts.pool
        self._wiring = parts.wiring
        self._vteps = parts.vteps
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
            host=self._membership.host,
            snapshot=snapshot,
            store=self._store(),
            passes=self._passes(),
            endpoints=EndpointsReport(
                all=self._endpoints.all,
                unhealed=self._endpoints.unhealed,
                unreadable=self._endpoints.unreadable,
                port_notes=self._ports.notes(),
            ),
            pool=PoolReport(
                errors={name: self._pool.errors(name) for name in snapshot.networks},
                set_aside=self._pool.set_aside,
                bad_values=self._pool.bad_values,
            ),
            probes=ProbesReport(
                falls=self._fallback.falls,
                now=trio.current_time(),
                statistics={
                    network.name: self._fallback.statistics(network.name)
                    for network in snapshot.networks.values()
                    if network.fallback
                },
            ),
            drops=drops,
            passed_over=self._runtime.report(),
        )

    def _store(self) -> StoreReport:
        return StoreReport(
            connected=self._follower.connected,
            lag_s=self._follower.lag_s,
            error=self._follower.error,
            lease_ok=self._membership.lease_ok,
            refusals=self._membership.errors,
            dead=self._liveness.dead_for_s().keys(),
        )

    def _passes(self) -> PassesReport:
        return PassesReport(
            result=self._reconciler.result,
            blocked=self._reconciler.blocked,
            in_sync=self._reconciler.in_sync,
            pending=self._reconciler.pending,
            passes=self._reconciler.passes,
            full_passes=self._reconciler.full_passes,
            writes=self._reconciler.writes,
        )


async def let_others_run(number: int) -> None:
    """Called for each of thousands of items: they must not hold up an attach."""
    if number % _SLICE == _SLICE - 1:
        await trio.lowlevel.checkpoint()
