"""This host's membership of the mesh: its lease, its entry, its subnets of overlay networks.

Losing the lease, or etcd, changes nothing in the kernel: others see the host as dead until it has a
lease again, and it keeps its subnets as long as no other host was given them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import structlog
import trio

from meshnet.backends import Addressing
from meshnet.backends.occupied import reserved_apart
from meshnet.backends.table import addressing_of
from meshnet.errors import (
    MeshnetError,
    PolicyRefusedError,
    PoolExhaustedError,
    StoreUnavailableError,
)
from meshnet.model import Reservations
from meshnet.store import LeaseExpiredError
from meshnet_agent.mesh.view import MeshListener
from meshnet_agent.tasks.backoff import Backoff
from meshnet_agent.tasks.broadcast import Broadcast
from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from meshnet.backends import Occupant
    from meshnet.model import Claim, Host, IpNetwork, MeshSnapshot, Network, NetworkName
    from meshnet.store import LeaseId
    from meshnet.store.mirror import Changes
    from meshnet.store.registry import Registry
    from meshnet_agent.dataplane.dirty import Dirty

_log = structlog.get_logger()
_REJOIN_S = (0.1, 1.0)
"""Range of the pause before keys that were removed or overwritten are written again."""
_LONGEST_REJOIN_S = 300.0
_NEWS_PER_S = 1_000_000
"""How many watch deliveries a second hosts may cause that come back after losing their leases at
once: each host that comes back is delivered to every agent.  Three etcd members of four cores can
deliver so much (docs/design/etcd-load.md); with more, etcd is too busy to renew leases."""


_RESERVE_AGAIN_S = (0.2, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimant:
    """What an agent claims its host with: entry, claim, and the lease's time to live (seconds)."""

    host: Host
    claim: Claim
    ttl_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipReport:
    """This host's part in the mesh.

    Attributes:
        lease_ok: whether the last renewal of this host's lease succeeded.
        refusals: networks of which this host has no subnet, and why.
    """

    host: Host
    lease_ok: bool
    refusals: Mapping[NetworkName, MeshnetError]


class StoreGuard(Protocol):
    """Whether the store may be written to (`meshnet_agent.mesh.identity.MeshIdentity`)."""

    async def check(self) -> None:
        """Check that the store holds this host's mesh.

        Raises:
            PolicyRefusedError: it does not.
            StoreUnavailableError: the store does not answer.
        """
        ...


class SubnetUsers(Protocol):
    """The endpoints of this host, which need the subnets that it had."""

    def subnet_of(self, network: NetworkName, version: int) -> IpNetwork | None:
        """The subnet of an IP version (4 or 6) that endpoints of a network are in."""
        ...


class Membership(MeshListener):
    """Claims the host, keeps its lease alive and reserves a subnet of every network.

    Attributes:
        host: this host, as it is published.
        subnets: this host's subnets, by network, IPv4 first.
        errors: by network, why this host has no subnet of it.
        lease_ok: whether the last renewal of the lease succeeded.
        occupied: what this host's links and routes lead to: it reserves no subnet that overlaps it.

    Args:
        dirty: marked when `subnets` or `errors` changed.
        endpoints: the subnet that they are in is preferred, unless another host has it by now.
    """

    def __init__(
        self,
        registry: Registry,
        identity: StoreGuard,
        claimant: Claimant,
        dirty: Dirty,
        endpoints: SubnetUsers,
    ) -> None:
        self.host = claimant.host
        self.subnets: dict[NetworkName, tuple[IpNetwork, ...]] = {}
        self.errors: dict[NetworkName, MeshnetError] = {}
        self.lease_ok = False
        self.occupied: tuple[Occupant, ...] = ()
        self._registry = registry
        self._identity = identity
        self._claim = claimant.claim
        self._ttl_s = claimant.ttl_s
        self._dirty = dirty
        self._endpoints = endpoints
        self._lease: LeaseId | None = None
        # Leases that the host's key may be under: the answer to a claim may have been lost.
        self._granted: set[LeaseId] = set()
        self._snapshot: MeshSnapshot | None = None
        # What was reserved last, and the revision from which snapshots show it: until then this
        # host must not reserve a second subnet.
        self._reserved: dict[tuple[NetworkName, int], tuple[IpNetwork, int]] = {}
        # Where a reservation may have been made without this host learning of it.
        self._unsure: set[tuple[NetworkName, int]] = set()
        # Number of reservations by network: a full network is tried again only when that falls.
        self._counts: dict[NetworkName, int] = {}
        self._published = trio.Event()
        # The entry that this agent published last.
        self._claimed: Host | None = None
        self._look = Flag()
        self._claiming = trio.Lock()
        self._progress = Broadcast()

    async def join(self) -> None:
        """Claim the host.

        Raises:
            ConflictError: another agent runs as this host.
            StoreUnavailableError: the store does not answer.
            PolicyRefusedError: the store is not this host's mesh.
        """
        async with self._claiming:
            await self._identity.check()
            host = self.host
            self._lease = await self._registry.claim_host(
                host, self._claim, self._ttl_s, self._granted
            )
            self._granted = {self._lease}
            self._claimed = host
        self.lease_ok = True

    async def keep_alive(self) -> None:
        """Renew the lease three times per time to live, or get a new one.  Never returns.

        Raises:
            ConflictError: another agent claimed this host's id while the lease was lost.
        """
        renew_s = self._ttl_s / 3
        pause_s = renew_s
        said = ""
        while True:
            await trio.sleep(pause_s * random.uniform(0.9, 1.1))
            try:
                if self._lease is None:
                    await trio.sleep(self._rejoin_pause_s())
                lease = self._lease
                if lease is None:
                    await self.join()
                    _log.info("lease taken again")
                    self._look.set()
                else:
                    await self._registry.store.keep_alive(lease)
                    self.lease_ok = True
                pause_s, said = renew_s, ""
            except LeaseExpiredError:
                if self._lease != lease or self._claiming.locked():
                    pause_s = renew_s  # this agent itself replaced it, or is about to
                    continue
                _log.warning("lease ran out")
                self._lease = None
                self.lease_ok = False
                pause_s = 0.0
            except (StoreUnavailableError, PolicyRefusedError) as error:
                self.lease_ok = False
                if str(error) != said:  # it may be so for hours
                    _log.warning("lease not renewed", reason=str(error))
                said = str(error)
                # A call takes up to 5 s to fail, a third of the default lease.  With a full pause
                # after it, the lease ran out after a single renewal that timed out.
                pause_s = renew_s * random.uniform(0.0, 0.5)

    def _rejoin_pause_s(self) -> float:
        """Seconds to wait before claiming this host again: the more hosts are dead, the longer."""
        least_s, most_s = _REJOIN_S
        if self._snapshot is not None:
            hosts = self._snapshot.hosts.keys()
            dead = len(hosts - self._snapshot.alive.keys())
            most_s = max(most_s, min(_LONGEST_REJOIN_S, dead * len(hosts) / _NEWS_PER_S))
        return random.uniform(least_s, most_s)

    async def leave(self) -> None:
        """End the lease, so that others see at once that this agent has stopped."""
        if self._lease is not None:
            await self._registry.store.revoke_lease(self._lease)
            self._lease = None

    async def settled(self) -> None:
        """Wait until this host has a subnet of every network, or an error that says why not."""
        while self._snapshot is None or any(
            name not in self.subnets and name not in self.errors for name in self._snapshot.networks
        ):
            await self._progress.wait()

    def report(self) -> MembershipReport:
        """This host's part in the mesh, now."""
        return MembershipReport(host=self.host, lease_ok=self.lease_ok, refusals=dict(self.errors))

    def move(self, host: Host) -> None:
        """Publish this host again: its underlay address has changed."""
        self.host = host
        self._claim = replace(self._claim, underlay_ip=host.underlay_ip)
        self._look.set()

    def mesh_changed(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        """See `MeshListener`; reservations follow in `reserve`."""
        self._snapshot = snapshot
        changed = False
        for name in list(self.subnets):
            if name not in snapshot.networks:
                del self.subnets[name]
                changed = True
        for name in [n for n in self.errors if n not in snapshot.networks]:
            del self.errors[name]
        self._reserved = {k: s for k, s in self._reserved.items() if k[0] in snapshot.networks}
        for name, network in snapshot.networks.items():
            if addressing_of(network) is not Addressing.SUBNETS:
                # Hosts do not own parts of such a network: each uses its whole CIDR.
                if self.subnets.get(name) != network.subnets:
                    self.subnets[name] = network.subnets
                    changed = True
                continue
            held = snapshot.subnets_of(self.host.id, name)
            kept = self.subnets.get(name, ())
            mine = self._merge(network, held, kept, snapshot)
            if mine == kept:
                pass
            elif mine:
                self.subnets[name] = mine
                changed = True
            else:
                _log.error("subnet was given to another host", network=name, subnets=str(kept))
                del self.subnets[name]
                changed = True
            count = len(snapshot.reservations.get(name, ()))
            freed = count < self._counts.get(name, 0)
            self._counts[name] = count
            full = isinstance(self.errors.get(name), PoolExhaustedError) and not freed
            if len(held) < len(network.subnets) and not full:
                self._look.set()
        if self._is_published(snapshot):
            self._published.set()
        else:
            self._look.set()
        if changed:
            self._announce()

    def _merge(
        self,
        network: Network,
        held: Sequence[IpNetwork],
        kept: Sequence[IpNetwork],
        snapshot: MeshSnapshot,
    ) -> tuple[IpNetwork, ...]:
        """This host's subnets, one per IP version: reserved, or kept while no other host has it.

        A kept subnet that does not fit the network is dropped: the network was removed, and another
        one created by its name, before this agent noticed.
        """
        owners = snapshot.reservations.get(network.name, Reservations())
        mine = {
            s.version: s
            for s in kept
            if network.is_host_subnet(s) and owners.get(s, self.host.id) == self.host.id
        }
        mine |= {s.version: s for s in reversed(held)}
        return tuple(mine[version] for version in sorted(mine))

    async def reserve(self) -> None:
        """Reserve what is missing whenever the snapshot shows it.  Never returns."""
        backoff = Backoff(*_RESERVE_AGAIN_S)
        while True:
            await self._look.wait()
            try:
                await self._reserve_missing()
                backoff.reset()
            except (StoreUnavailableError, PolicyRefusedError) as error:
                _log.warning("subnet not reserved", reason=str(error))
                await trio.sleep(backoff.failed())
                self._look.set()

    async def _reserve_missing(self) -> None:
        snapshot = self._snapshot
        if snapshot is None or self._lease is None:
            return
        if self._claimed != self.host:
            # Its underlay address changed, and peers cannot reach it until they know.
            await self.join()
        elif not self._is_published(snapshot):
            # Pause first: where somebody removes the keys again and again, agent and remover would
            # keep etcd busy.
            self._published = trio.Event()
            with trio.move_on_after(self._rejoin_pause_s()):
                await self._published.wait()
            snapshot = self._snapshot or snapshot
            if not self._is_published(snapshot):
                await self.join()
        refused: PolicyRefusedError | None = None
        for name, network in snapshot.networks.items():
            if addressing_of(network) is not Addressing.SUBNETS:
                continue
            held = snapshot.subnets_of(self.host.id, name)
            for cidr in network.subnets:
                _, shown_from = self._reserved.get((name, cidr.version), (None, 0))
                on_its_way = snapshot.revision < shown_from
                if cidr.version not in {s.version for s in held} and not on_its_way:
                    try:
                        await self._reserve(network, cidr.version)
                    except PolicyRefusedError as error:
                        refused = error  # for this network only: go on with the others
        if refused is not None:
            raise refused

    async def _reserve(self, network: Network, version: int) -> None:
        kept = self.subnets.get(network.name, ())
        last, _ = self._reserved.get((network.name, version), (None, 0))
        prefer = next((s for s in kept if s.version == version), last)
        if prefer is None:
            prefer = self._endpoints.subnet_of(network.name, version)
        known = None
        if self._snapshot is not None and (network.name, version) not in self._unsure:
            known = self._snapshot.reservations.get(network.name, Reservations())
        before = self.errors.pop(network.name, None)
        try:
            subnet, shown_from = await self._registry.reserve_subnet(
                network,
                version,
                self.host.id,
                known=known,
                prefer=prefer,
                random_below=random.randrange,
                apart=reserved_apart(network, self.occupied),
            )
        except StoreUnavailableError:
            self._unsure.add((network.name, version))
            raise
        except MeshnetError as error:
            self.errors[network.name] = error
            if str(before) != str(error):
                _log.error("no subnet", network=network.name, reason=str(error))
                self._announce()
            if isinstance(error, PolicyRefusedError):
                raise
        else:
            self._unsure.discard((network.name, version))
            self._reserved[network.name, version] = subnet, shown_from
            _log.info("subnet reserved", network=network.name, subnet=str(subnet))

    def _is_published(self, snapshot: MeshSnapshot) -> bool:
        """Whether the store has this host's keys: somebody may have removed them by hand."""
        return snapshot.hosts.get(self.host.id) == self.host and self.host.id in snapshot.alive

    def _announce(self) -> None:
        self._progress.send()
        self._dirty.mark_all()
