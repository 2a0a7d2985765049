"""What agents do with the store: claims, reservations, networks, endpoints.

Every write is a transaction on what it depends on, so that two agents at the same instant cannot
both win: a host id is claimed by the absence of its lease key, a subnet by the absence of its
reservation, the set of networks by its serial key.  Keys: `meshnet.store.mirror`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from meshnet.codec.document import BadValueError
from meshnet.codec.endpoints import decode_endpoint
from meshnet.codec.hosts import (
    encode_claim,
    encode_host,
    encode_reservation,
)
from meshnet.codec.networks import check_network, encode_network
from meshnet.errors import (
    ConflictError,
    NotFoundError,
    PoolExhaustedError,
    StoreUnavailableError,
)
from meshnet.ipam import choose_subnet
from meshnet.model import (
    Endpoint,
    Host,
    HostId,
    NetworkName,
    Reservation,
    Vni,
)
from meshnet.store import (
    Absent,
    Delete,
    DeletePrefix,
    Holds,
    LeaseExpiredError,
    PrefixEmpty,
    Put,
    Unchanged,
)
from meshnet.store.addresses import addresses_of
from meshnet.store.mirror import (
    ADDRESSES,
    ENDPOINTS,
    MESH,
    NETWORKS_SERIAL,
    SUBNETS,
    alive_key,
    host_key,
    load,
    network_key,
    subnet_key,
)
from meshnet.store.registry_rules import (
    address_of,
    check_conflicts,
    claim_conflict,
    claim_of,
    free_vni,
    owned_by,
    owners_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from meshnet.model import Claim, IpNetwork, MeshSnapshot, Network
    from meshnet.store import Commit, Condition, LeaseId, Store, Write

_TRIES = 64
_STALE = 3
"""Failed transactions after which reservations are read anew instead of one by one."""
_ORDERLY = 16
"""A network with fewer reservations gives out its lowest subnet first, because people read small
meshes.  In larger ones each host chooses at random, so that hosts that join at once do not race."""
_BATCH = 100
"""Writes a transaction: etcd allows 128."""


class Registry:
    """The operations; stateless but for the store it uses.

    Every method raises `StoreUnavailableError` when the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    # --- hosts --------------------------------------------------------------------------------

    async def claim_host(
        self, host: Host, claim: Claim, ttl_s: int, granted: set[LeaseId]
    ) -> LeaseId:
        """Become `host`: publish it and put its key under a lease of `ttl_s` seconds.

        A claim that is there already is this agent's own, and replaced at once, if it is under a
        lease that the agent was granted, or has the same instance and underlay address.  The same
        instance is not enough: a cloned machine has a copy of the state directory, and the two
        would take the host from each other again and again.

        Args:
            granted: leases that the agent was granted since it started and that the host's key may
                be under; this call adds its own before it writes with them.

        Raises:
            ConflictError: another agent holds the id; the message says where it runs.
        """
        for _ in range(_TRIES):
            lease = await self.store.grant_lease(ttl_s)
            granted.add(lease)
            try:
                return await self._claim_host(host, claim, lease, ttl_s, granted)
            except LeaseExpiredError:
                continue  # etcd or this machine is so slow that the lease ran out meanwhile
        raise StoreUnavailableError(
            f"a lease of {ttl_s} s runs out before etcd has written host {host.id}: give a longer "
            "--lease-ttl, or find out why etcd is slow"
        )

    async def _claim_host(
        self, host: Host, claim: Claim, lease: LeaseId, ttl_s: int, granted: set[LeaseId]
    ) -> LeaseId:
        key = alive_key(host.id)
        alive = Put(key, encode_claim(claim), lease)
        for _ in range(_TRIES):
            unchanged, entry = await self._publication(host)
            writes = [alive, *entry]
            if (await self.store.commit([Absent(key), *unchanged], writes)).succeeded:
                return lease
            held = next(iter((await self.store.read(key)).items), None)
            if held is None:
                continue  # it ran out in between
            if held.lease_id not in granted and claim_of(held.value) != claim:
                await self.store.revoke_lease(lease)
                raise ConflictError(claim_conflict(host, claim, held.value, ttl_s))
            # This agent's own, or its before a restart: end the lease, which nobody renews.
            when = [Holds(key, held.value), *unchanged]
            if (await self.store.commit(when, writes)).succeeded:
                if held.lease_id not in (0, lease):
                    await self.store.revoke_lease(type(lease)(held.lease_id))
                return lease
        raise ConflictError(
            f"other agents keep claiming host id {host.id}: choose another --host-id"
        )

    async def _publication(self, host: Host) -> tuple[list[Condition], list[Write]]:
        """What publishes a host: nothing, if it is published, on condition that it stays so.

        Every write is delivered to every agent, and a host that starts again has rarely changed.
        """
        put = Put(host_key(host.id), encode_host(host))
        if any(item.value == put.value for item in (await self.store.read(put.key)).items):
            return [Holds(put.key, put.value)], []
        return [], [put]

    async def remove_host(self, host: HostId) -> list[Endpoint]:
        """Forget a host that is gone for good: its entry, reservations, endpoints and addresses.

        Returns:
            the endpoints that it had published: they may still run where only its agent is dead.

        Raises:
            NotFoundError: nothing is known of the host.
            ConflictError: it is alive.
        """
        snapshot = await self.snapshot()
        owned = [
            subnet_key(network, subnet)
            for network, reservations in snapshot.reservations.items()
            for subnet, owner in reservations.items()
            if owner == host
        ]
        if host not in snapshot.hosts and host_key(host) not in snapshot.bad_values and not owned:
            raise NotFoundError(f"host {host} does not exist: meshnet hosts lists them")
        networks = snapshot.networks.keys() | snapshot.reservations.keys()
        prefixes = [f"{ENDPOINTS}{n}/{host}/" for n in sorted(networks)]
        endpoints = [e for prefix in prefixes for e in await self._endpoints_below(prefix)]
        writes: list[Write] = [DeletePrefix(prefix) for prefix in prefixes]
        writes += [Delete(key) for key in (*owned, *await addresses_of(self.store, host))]
        # Last: if this is cut short, the host still exists and can be removed again.
        writes.append(Delete(host_key(host)))
        for first in range(0, len(writes), _BATCH):
            when = [Absent(alive_key(host))]
            if not (await self.store.commit(when, writes[first : first + _BATCH])).succeeded:
                raise ConflictError(
                    f"host {host} is alive: stop its agent first, then remove it "
                    "(after a crash wait until its lease has run out)"
                )
        return endpoints

    # --- subnets ------------------------------------------------------------------------------

    async def reserve_subnet(
        self,
        network: Network,
        version: int,
        host: HostId,
        *,
        known: Mapping[IpNetwork, HostId] | None,
        prefer: IpNetwork | None,
        random_below: Callable[[int], int],
        apart: Collection[IpNetwork] = (),
    ) -> tuple[IpNetwork, int]:
        """Get a subnet of an IP version for a host: the one it has, `prefer`, or a free one.

        The transaction decides who owns a subnet; what the caller knows only saves reading all
        reservations.  A host that may own one that `known` does not show passes it as `prefer`,
        or None for `known`; otherwise it gets a second one.

        Args:
            known: the network's reservations as the caller last saw them; read anew once several
                transactions have failed.  None: read first.
            random_below: a random number in [0, n): spreads hosts that reserve at once.
            apart: what a free subnet must not overlap.

        Returns:
            The subnet, and the revision from which on the store shows that it is this host's; 0 if
            it showed it already.

        Raises:
            PoolExhaustedError: all subnets are reserved, as far as is known.
            NotFoundError: the network is gone.
        """
        taken = known if known is not None else await self._reservations(network.name)
        for attempt in range(1, _TRIES + 1):
            mine = owned_by(taken, network, version, host)
            if mine:
                return min(mine, key=address_of), 0
            if prefer is not None and prefer not in taken and network.is_host_subnet(prefer):
                subnet = prefer
            else:
                orderly = attempt == 1 and len(taken) < _ORDERLY
                # Raises without asking the store: hosts of a full network try again and again.
                subnet = choose_subnet(
                    network,
                    version,
                    taken,
                    apart=apart,
                    random_below=None if orderly else random_below,
                )
            done = await self._write_reservation(network.name, subnet, host)
            if done.succeeded:
                return subnet, done.revision
            if attempt == _STALE:
                taken = await self._reservations(network.name)
            else:
                held = (await self.store.read(subnet_key(network.name, subnet))).items
                taken = {**taken, **owners_of(network.name, held)}
        raise PoolExhaustedError(
            f"network {network.name}: lost the race for a subnet {_TRIES} times: try again"
        )

    async def _write_reservation(
        self, network: NetworkName, subnet: IpNetwork, host: HostId
    ) -> Commit:
        """Reserve a subnet that is free, of a network that is there."""
        network_revision = await self._revision_of(network_key(network))
        if not network_revision:
            raise NotFoundError(f"network {network} does not exist (any more)")
        reservation = Reservation(network=network, subnet=subnet, host=host)
        key = subnet_key(network, subnet)
        # On condition of the network's revision: if it is removed and created again meanwhile, it
        # may have other addresses, and a reservation of the old ones would stay.
        return await self.store.commit(
            [Absent(key), Unchanged(network_key(network), network_revision)],
            [Put(key, encode_reservation(reservation))],
        )

    async def _reservations(self, network: NetworkName) -> dict[IpNetwork, HostId]:
        listing = await self.store.list_prefix(f"{SUBNETS}{network}/")
        return owners_of(network, listing.items)

    # --- networks -----------------------------------------------------------------------------

    async def create_network(
        self,
        build: Callable[[Vni], Network],
        vni: int | None,
        check_host: Callable[[Network], None] = lambda _network: None,
    ) -> Network:
        """Create a network.

        Args:
            build: makes the network, given its VNI.
            vni: the VNI asked for; None: the lowest free one from `FIRST_VNI`.
            check_host: raises an error if the host that creates it cannot have it.

        Raises:
            UsageError: the network cannot work (`check_network`).
            ConflictError: its name, VNI, UDP port or addresses are another network's.
            PolicyRefusedError: a host's underlay address is among its addresses.
        """
        for _ in range(_TRIES):
            serial = await self._revision_of(NETWORKS_SERIAL)
            snapshot = await self.snapshot()
            used = {n.vni for n in snapshot.networks.values()}
            chosen = vni if vni is not None else free_vni(used)
            network = build(Vni(chosen))
            check_network(network)
            check_conflicts(network, snapshot)
            check_host(network)
            done = await self.store.commit(
                [Unchanged(NETWORKS_SERIAL, serial), Absent(network_key(network.name))],
                [
                    Put(network_key(network.name), encode_network(network)),
                    Put(NETWORKS_SERIAL, network.name.encode()),
                ],
            )
            if done.succeeded:
                return network
        raise ConflictError("other networks are created or removed all the time: try again")

    async def remove_network(self, name: NetworkName) -> None:
        """Remove a network and its reservations.

        Raises:
            NotFoundError: there is no such network.
            ConflictError: it has endpoints; the message names some.
        """
        key = network_key(name)
        if not await self.network_exists(name):
            raise NotFoundError(f"network {name} does not exist: meshnet network ls lists them")
        prefix = f"{ENDPOINTS}{name}/"
        done = await self.store.commit(
            [PrefixEmpty(prefix)],
            [
                Delete(key),
                DeletePrefix(f"{SUBNETS}{name}/"),
                DeletePrefix(f"{ADDRESSES}{name}/"),
                Put(NETWORKS_SERIAL, name.encode()),
            ],
        )
        if not done.succeeded:
            endpoints = await self.list_endpoints(name)
            some = ", ".join(f"{e.name} on {e.host}" for e in endpoints[:3])
            raise ConflictError(
                f"network {name} has {len(endpoints)} endpoints ({some}"
                f"{', …' if len(endpoints) > 3 else ''}): detach them first"
            )

    async def network_exists(self, name: NetworkName) -> bool:
        """Whether the store has a network of that name right now."""
        return await self._revision_of(network_key(name)) > 0

    async def _revision_of(self, key: str) -> int:
        """Revision of a key's last write; 0: there is no such key."""
        return next((item.mod_revision for item in (await self.store.read(key)).items), 0)

    async def snapshot(self) -> MeshSnapshot:
        """The whole mesh, read now (the agent itself follows changes instead)."""
        return load(await self.store.list_prefix(MESH)).snapshot()

    # --- endpoints ----------------------------------------------------------------------------

    async def list_endpoints(self, network: NetworkName | None = None) -> Sequence[Endpoint]:
        """Published endpoints of all hosts; unreadable ones, and misplaced ones, are left out."""
        return await self._endpoints_below(
            ENDPOINTS + (f"{network}/" if network is not None else "")
        )

    async def _endpoints_below(self, prefix: str) -> list[Endpoint]:
        found = []
        for item in (await self.store.list_prefix(prefix)).items:
            with contextlib.suppress(BadValueError):
                endpoint = decode_endpoint(item.value)
                if endpoint_key(endpoint) == item.key:
                    found.append(endpoint)
        return found

    async def list_published(self, network: NetworkName, host: HostId) -> dict[str, bytes]:
        """Keys and values a host has published endpoints of a network under."""
        listing = await self.store.list_prefix(f"{ENDPOINTS}{network}/{host}/")
        return {item.key: item.value for item in listing.items}

    async def publish(self, puts: dict[str, bytes], deletes: Sequence[str]) -> None:
        """Write endpoint keys (`endpoint_key`)."""
        writes: list[Write] = [Put(key, value) for key, value in puts.items()]
        writes += [Delete(key) for key in deletes]
        for first in range(0, len(writes), _BATCH):
            await self.store.commit([], writes[first : first + _BATCH])


def endpoint_key(endpoint: Endpoint) -> str:
    """Key an endpoint is published under."""
    return f"{ENDPOINTS}{endpoint.network}/{endpoint.host}/{endpoint.id}"
