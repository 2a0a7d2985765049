"""The pools of underlay networks in the store: who holds which address of the physical network.

One key an address::

    /meshnet/v1/addresses/NETWORK/ADDRESS

No agent watches these keys.  An agent lists those of a network when it starts and when it lost a
race, so what it knows is only a hint.  A transaction on the key's absence decides who gets an
address, so no two endpoints of the mesh ever have the same one.

Every function raises `StoreUnavailableError` when the store does not answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meshnet.codec.document import BadValueError
from meshnet.codec.endpoints import address_from_key, decode_address_holder, encode_address_holder
from meshnet.codec.networks import decode_network
from meshnet.errors import ConflictError, NotFoundError
from meshnet.model import AddressHolder, HostId
from meshnet.store import Absent, Delete, Holds, Put, Unchanged
from meshnet.store.mirror import ADDRESSES, network_key, printable_key

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from meshnet.model import IpAddress, Network, NetworkName
    from meshnet.store import Condition, Store, Write

SET_ASIDE_S = 600
"""How long an address stays set aside after a machine outside the mesh answered for it."""

_BATCH = 100
"""Writes a transaction: etcd allows 128."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolListing:
    """All that is held of a network's pool, as of one revision.

    Attributes:
        network_revision: revision of the last write of the network's key; `hold_addresses` depends
            on it.
        holders: by address; the holder of one whose value cannot be read is "", which is nobody.
        bad_values: keys that cannot be used, and why.
    """

    network_revision: int
    holders: Mapping[IpAddress, AddressHolder]
    bad_values: Mapping[str, str] = field(default_factory=dict)


def address_key(network: NetworkName, address: IpAddress) -> str:
    """Key of an address of a network's pool."""
    return f"{ADDRESSES}{network}/{address}"


async def list_pool(store: Store, network: Network) -> PoolListing:
    """List the holders of all addresses of a network's pool.

    Raises:
        NotFoundError: the network is gone, or another one has its name.
    """
    found = next(iter((await store.read(network_key(network.name))).items), None)
    if found is None or not _is_same(found.value, network):
        raise NotFoundError(f"network {network.name} does not exist (any more)")
    prefix = f"{ADDRESSES}{network.name}/"
    holders: dict[IpAddress, AddressHolder] = {}
    bad: dict[str, str] = {}
    for item in (await store.list_prefix(prefix)).items:
        try:
            address = address_from_key(item.key.removeprefix(prefix))
            holders[address] = AddressHolder(HostId(""))  # held, whatever the value is
            holders[address] = decode_address_holder(item.value)
        except BadValueError as error:
            bad[printable_key(item.key)] = str(error)
    return PoolListing(network_revision=found.mod_revision, holders=holders, bad_values=bad)


def _is_same(value: bytes, network: Network) -> bool:
    try:
        return decode_network(value) == network
    except BadValueError:
        return False


async def hold_addresses(
    store: Store,
    network: NetworkName,
    network_revision: int,
    addresses: Collection[IpAddress],
    holder: AddressHolder,
) -> bool:
    """Take several addresses in one transaction: all of them or none.

    Args:
        network_revision: of `list_pool`.

    Returns:
        Whether they were taken; if not, one is held already or the network changed.
    """
    keys = [address_key(network, address) for address in addresses]
    value = encode_address_holder(holder)
    when: list[Condition] = [Unchanged(network_key(network), network_revision)]
    when += [Absent(key) for key in keys]
    return (await store.commit(when, [Put(key, value) for key in keys])).succeeded


async def free_addresses(
    store: Store, network: NetworkName, held: Mapping[IpAddress, AddressHolder]
) -> None:
    """Free addresses whose holders are as given; one that has another holder by now is left."""
    items = [
        (address_key(network, address), encode_address_holder(holder))
        for address, holder in held.items()
    ]
    for first in range(0, len(items), _BATCH):
        batch = items[first : first + _BATCH]
        if await _delete(store, batch):
            continue
        # One address that has another holder fails the whole transaction: free the others singly.
        for item in batch:
            await _delete(store, [item])


async def _delete(store: Store, items: Collection[tuple[str, bytes]]) -> bool:
    when = [Holds(key, value) for key, value in items]
    return (await store.commit(when, [Delete(key) for key, _ in items])).succeeded


async def set_aside(
    store: Store,
    network: NetworkName,
    held: Mapping[IpAddress, AddressHolder],
    answers: Mapping[IpAddress, bytes],
    ttl_s: int,
) -> None:
    """Mark addresses that this host took as held by a machine outside the mesh.

    Args:
        held: all addresses that were taken together; those without an answer are freed.
        answers: by address, the MAC that answered (6 bytes).
        ttl_s: how many seconds they stay set aside; after that they may be tried again.

    Raises:
        ConflictError: one of them has another holder by now, as after ``network rm``.
    """
    lease = await store.grant_lease(ttl_s)
    when: list[Condition] = []
    then: list[Write] = []
    for address, holder in held.items():
        key = address_key(network, address)
        when.append(Holds(key, encode_address_holder(holder)))
        if address in answers:
            outsider = AddressHolder(HostId(""), held_by=answers[address])
            then.append(Put(key, encode_address_holder(outsider), lease))
        else:
            then.append(Delete(key))
    if not (await store.commit(when, then)).succeeded:
        raise ConflictError(f"network {network} was removed meanwhile: try again")


async def addresses_of(store: Store, host: HostId) -> list[str]:
    """Keys of all addresses that a host holds, of every network."""
    keys = []
    for item in (await store.list_prefix(ADDRESSES)).items:
        try:
            if decode_address_holder(item.value).host == host:
                keys.append(item.key)
        except BadValueError:
            continue
    return keys
