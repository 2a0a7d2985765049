"""Addresses of underlay networks: one pool for all hosts, and the wire has a say.

The store decides which endpoint of the mesh has an address (`meshnet.store.addresses`).  Then the
agent asks the wire whether somebody outside the mesh has it.  An address that somebody answers for
is set aside for a while, and the next one is tried.  Many attaches do this at the same time.

In the background the agent compares what this host holds with its endpoints, and gives back what
belongs neither to an endpoint on disk nor to an attach under way.  So nothing leaks, no matter when
the agent is killed, and a detach does not need the store.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.backends import Addressing
from meshnet.backends.table import addressing_of
from meshnet.errors import (
    ConflictError,
    KernelRefusedError,
    MeshnetError,
    NotFoundError,
    PoolExhaustedError,
)
from meshnet.ipam import check_pool_address
from meshnet.model import AddressHolder
from meshnet_agent.endpoints.addresses.pool_store import PoolStore
from meshnet_agent.endpoints.addresses.pool_view import PoolView, answered, name_of
from meshnet_agent.endpoints.addresses.wire import ask_wire
from meshnet_agent.mesh.view import MeshListener
from meshnet_agent.tasks.backoff import Backoff
from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence

    from meshnet.backends import HostLink
    from meshnet.kernel.address_probe import AddressProber
    from meshnet.model import (
        EndpointId,
        HostId,
        IpAddress,
        IpInterface,
        MeshSnapshot,
        Network,
        NetworkName,
    )
    from meshnet.store import Store
    from meshnet.store.mirror import Changes
    from meshnet_agent.dataplane.dirty import Dirty
    from meshnet_agent.dataplane.pass_values import PassResult
    from meshnet_agent.endpoints.request import ReadyNetwork
    from meshnet_agent.endpoints.surroundings import OwnEndpoints
    from meshnet_agent.mesh.view import MeshView

_log = structlog.get_logger()
_TRIES = 64
"""Races lost to other hosts after which an attach gives up."""
_MAX_CONFLICTS = 10
"""Answers from the wire after which an attach gives up (MAX_CONFLICTS of RFC 5227 §1.1)."""
_DELAYS_S = (0.2, 10.0)
"""Shortest and longest pause after the store could not be compared with."""
_REFRESH_S, _REFRESH_ASIDE_S = 600.0, 60.0
"""Time after which pools are listed again; sooner while an address is set aside, so that
``status`` does not name it long after that has ended."""


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


class PoolAddresses(MeshListener):
    """Allocates addresses of pools for this host, and gives back what it does not need.

    Args:
        prober: asks the wire whether an address is free.
        endpoints: this host's.
        dirty: marked when `host_addresses` changed, or the endpoints that the host reaches by them.

    Attributes:
        host_addresses: what this host holds for itself, by network.
    """

    def __init__(
        self,
        store: Store,
        host: HostId,
        prober: AddressProber,
        mesh: MeshView,
        endpoints: OwnEndpoints,
        dirty: Dirty,
    ) -> None:
        self.host_addresses: dict[NetworkName, tuple[IpAddress, ...]] = {}
        self._store = PoolStore(store)
        self._host = host
        self._prober = prober
        self._mesh = mesh
        self._dirty = dirty
        self._links: Mapping[str, HostLink] = {}
        self._endpoints = endpoints
        self._pools: dict[NetworkName, PoolView] = {}
        self._allocating: set[EndpointId] = set()
        self._look = Flag()

    # --- for status ---------------------------------------------------------------------------

    def report(self) -> PoolReport:
        """The addresses of underlay networks, now."""
        return PoolReport(
            errors={name: pool.errors for name, pool in self._pools.items()},
            set_aside=self._set_aside_now(),
            bad_values={k: why for p in self._pools.values() for k, why in p.bad_values.items()},
        )

    def _set_aside_now(self) -> list[tuple[NetworkName, IpAddress, bytes]]:
        return [
            (name, address, holder.held_by)
            for name, pool in self._pools.items()
            for address, holder in pool.holders.items()
            if holder.held_by
        ]

    # --- for attach and detach ----------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def allocate(
        self,
        ready: ReadyNetwork,
        identity: EndpointId,
        wanted: IpAddress | None,
        former: Sequence[IpInterface] = (),
    ) -> AsyncIterator[tuple[IpInterface, ...]]:
        """See `meshnet_agent.endpoints.addresses.subnet.Addresses`.

        Raises:
            StoreUnavailableError: the store does not answer.
        """
        network = ready.network
        # First: the background gives back what belongs to no endpoint and to no attach under way.
        self._allocating.add(identity)
        try:
            found = await self._find(
                self._pool(network),
                ready.uplink,
                AddressHolder(self._host, identity),
                [s.version for s in ready.subnets],
                wanted,
            )
            lengths = {s.version: s.prefixlen for s in network.subnets}
            yield tuple(ip_interface((a, lengths[a.version])) for a in found)
        finally:
            self._allocating.discard(identity)
            self._note_endpoints()

    def free(self, addresses: Collection[IpInterface]) -> None:
        """See `endpoints.addresses.subnet.Addresses`: their endpoint is off the disk."""
        self._note_endpoints()

    def _note_endpoints(self) -> None:
        """An endpoint of this host may have come or gone."""
        self._look.set()
        if self.host_addresses:
            self._dirty.mark_all()  # the host reaches each of its endpoints by a route

    def _link_addresses(self, link: str) -> Collection[IpAddress] | None:
        """This host's own addresses on a link; None: there is no such link."""
        found = self._links.get(link)
        return found.addresses if found is not None else None

    def _pool(self, network: Network) -> PoolView:
        known = self._pools.get(network.name)
        if known is None or known.network != network:
            known = self._pools[network.name] = PoolView(network)
        return known

    async def _find(
        self,
        pool: PoolView,
        link: str,
        holder: AddressHolder,
        versions: Collection[int],
        wanted: IpAddress | None = None,
    ) -> list[IpAddress]:
        """Find an address of each IP version that nobody has, and hold them in the store."""
        excluded = self._excluded(pool.network, link)
        if wanted is not None:
            check_pool_address(pool.network, wanted, excluded)
        entered, races, conflicts = pool.begun, 0, 0
        if not pool.listed:
            await self._store.list(pool, entered)
        while races < _TRIES and conflicts < _MAX_CONFLICTS:
            try:
                # Normally the lowest free one.  After one lost race the listing shows the winner's,
                # and the lowest will do again; but where many take addresses at once they would
                # all go for the same one, and lose again.
                spread = races > 1 or (races == 1 and bool(pool.choosing))
                chosen = pool.choose(
                    excluded, versions, wanted, random.randrange if spread else None
                )
            except (PoolExhaustedError, ConflictError):
                if pool.listed > entered:
                    raise
                await self._store.list(pool, pool.begun)  # others may have freed some
                continue
            with pool.chosen(chosen):
                if not await self._store.commit(pool, chosen, holder):
                    races += 1
                    await self._store.list(pool, pool.begun)
                    continue
            # The store first: it settles who of the mesh may have the address, in milliseconds,
            # and no other host asks the wire for the same one meanwhile.
            try:
                answers = await ask_wire(self._prober, link, chosen)
            except MeshnetError:
                await self._store.free(pool, dict.fromkeys(chosen, holder))
                raise
            if not answers:
                return chosen
            await self._store.set_aside(pool, dict.fromkeys(chosen, holder), answers)
            if wanted in answers:
                raise answered(pool.network, wanted, answers[wanted])
            conflicts += 1
        if conflicts == _MAX_CONFLICTS:
            raise ConflictError(
                f"network {pool.network.name}: machines outside the mesh answered for all "
                f"{conflicts} addresses that were tried (meshnet status lists them): choose a "
                "--range that nobody else uses, or look for a machine that does proxy ARP"
            )
        raise ConflictError(
            f"network {pool.network.name}: other hosts were faster to take {races} addresses: try "
            "again"
        )

    def _excluded(self, network: Network, link: str) -> set[IpAddress]:
        """Addresses of routers and hosts, which no endpoint gets."""
        hosts = {host.underlay_ip for host in self._mesh.snapshot.hosts.values()}
        return {*network.gateways, *hosts, *(self._link_addresses(link) or ())}

    # --- in the background --------------------------------------------------------------------

    def mesh_changed(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        """See `MeshListener`: each underlay network has a pool."""
        if changes is None or changes.networks:
            self.refresh()

    def passed(self, result: PassResult) -> None:
        """See `PassListener`: a pass went over the host's links."""
        if result.underlay is not None:
            self._links = result.underlay.links
        self._look.set()

    def refresh(self) -> None:
        """List all pools again: the set of networks changed, or this host was away."""
        for pool in self._pools.values():
            pool.listed = 0
        self._look.set()

    async def load(self) -> None:
        """List all pools, so that a pass can be planned with what this host holds."""
        for pool in self._current():
            with contextlib.suppress(NotFoundError):  # the watch will say so
                await self._store.list(pool, pool.begun)
        self._publish()

    async def run(self) -> None:
        """Give back what is not needed, after every change and from time to time, forever."""
        backoff = Backoff(*_DELAYS_S)
        while True:
            wait_s = _REFRESH_ASIDE_S if self._set_aside_now() else _REFRESH_S
            # Hosts that started together must not all list the store together.
            with trio.move_on_after(wait_s * random.uniform(0.9, 1.1)) as waiting:
                await self._look.wait()
            if waiting.cancelled_caught:
                self.refresh()
            try:
                await self._sync()
                backoff.reset()
            except MeshnetError as error:
                _log.warning("addresses not compared with the store", reason=str(error))
                self.refresh()
                await trio.sleep(backoff.failed())

    def _current(self) -> list[PoolView]:
        """The pools of all underlay networks; those of others are forgotten."""
        networks = [
            n for n in self._mesh.snapshot.networks.values() if addressing_of(n) is Addressing.POOL
        ]
        self._pools = {n.name: self._pool(n) for n in networks}
        return list(self._pools.values())

    async def _sync(self) -> None:
        pools = self._current()
        if not all(pool.listed for pool in pools):
            await self._mesh.check_store()
        for pool in pools:
            if not pool.listed:
                await self._store.list(pool, pool.begun)
            await self._give_back(pool)
            pool.errors = [*await self._restore(pool), *await self._hold_own(pool)]
        self._publish()

    async def _give_back(self, pool: PoolView) -> None:
        """Free what no endpoint on disk and no attach under way has."""
        # Including ids of records that cannot be read: their endpoints may be alive.  The empty id
        # stands for the host itself.
        needed = {
            *self._endpoints.recorded_ids(),
            *self._allocating,
            *([""] if pool.network.host_access else []),
        }
        unneeded = {
            address: holder
            for address, holder in pool.holders.items()
            if holder.host == self._host and holder.endpoint not in needed
        }
        if unneeded:
            await self._store.free(pool, unneeded)

    async def _restore(self, pool: PoolView) -> list[str]:
        """Hold again what endpoints have and the store lost; returns what others hold by now."""
        errors = []
        for endpoint in self._endpoints.all:
            holder = AddressHolder(self._host, endpoint.id)
            mine = [a for a in endpoint.addresses if a.network in pool.network.subnets]
            if endpoint.network != pool.network.name:
                continue
            for address in (a.ip for a in mine if pool.holders.get(a.ip) != holder):
                if address in pool.holders:
                    errors.append(
                        f"endpoint {endpoint.name} has {address}, which "
                        f"{name_of(pool.holders[address])} holds: detach and attach it again"
                    )
                elif not await self._store.commit(pool, [address], holder):
                    pool.listed = 0
                    self._look.set()
        return errors

    async def _hold_own(self, pool: PoolView) -> list[str]:
        """Hold an address of each IP version for the host itself, if the network wants that."""
        network = pool.network
        link = network.parent or ""
        if not network.host_access or self._link_addresses(link) is None:
            return []
        have = {a.version for a in self._own(pool)}
        try:
            for version in {s.version for s in network.subnets} - have:
                await self._find(pool, link, AddressHolder(self._host), [version])
        except (ConflictError, PoolExhaustedError, KernelRefusedError) as error:
            return [f"no address for the host itself: {error}"]
        return []

    def _own(self, pool: PoolView) -> list[IpAddress]:
        mine = AddressHolder(self._host)
        held = [address for address, holder in pool.holders.items() if holder == mine]
        return sorted(held, key=lambda address: (address.version, int(address)))

    def _publish(self) -> None:
        own = {name: tuple(self._own(pool)) for name, pool in self._pools.items()}
        own = {name: addresses for name, addresses in own.items() if addresses}
        if own != self.host_addresses:
            self.host_addresses = own
            self._dirty.mark_all()
