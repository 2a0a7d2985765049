"""What a host knows of pools, kept in step with what it reads from the store and writes to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.model import AddressHolder, HostId
from meshnet.store.addresses import (
    SET_ASIDE_S,
    free_addresses,
    hold_addresses,
    list_pool,
    set_aside,
)
from meshnet.wire.mac import is_endpoint_mac

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from meshnet.model import IpAddress, NetworkName
    from meshnet.store import Store
    from meshnet_agent.endpoints.addresses.pool_view import PoolView

_log = structlog.get_logger()
_LEAVING_S = 30
"""How long an address stays set aside if an endpoint's MAC answered for it: most likely the kernel
has not quite removed the namespace of the endpoint that had it last."""


class PoolStore:
    """Reads and writes pools, each with its view.

    After a write that got no answer nobody knows whether it was made.  Then the view is marked to
    be listed again (`PoolView.listed`).
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._listing: dict[NetworkName, trio.Lock] = {}

    async def list(self, pool: PoolView, seen: int) -> None:
        """List a pool, unless a listing that began after number `seen` has ended.

        Raises:
            NotFoundError: its network is gone.
            StoreUnavailableError: the store does not answer.
        """
        async with self._listing.setdefault(pool.network.name, trio.Lock()):
            # Many attaches that lost a race want a listing at once, and one serves them all.
            if pool.listed > seen:
                return
            pool.begun += 1
            pool.written.clear()
            listing = await list_pool(self._store, pool.network)
            pool.listed = pool.begun
            pool.revision = listing.network_revision
            pool.bad_values = dict(listing.bad_values)
            pool.replace(dict(listing.holders))

    async def commit(
        self, pool: PoolView, addresses: Collection[IpAddress], holder: AddressHolder
    ) -> bool:
        """Let a holder hold all of the addresses, or none; returns whether it holds them.

        Raises:
            StoreUnavailableError: the store does not answer, and may have written them.
        """
        try:
            won = await hold_addresses(
                self._store, pool.network.name, pool.revision, addresses, holder
            )
        except BaseException:
            pool.listed = 0
            raise
        if won:
            for address in addresses:
                pool.note(address, holder)
        return won

    async def free(self, pool: PoolView, held: Mapping[IpAddress, AddressHolder]) -> None:
        """Give addresses back, except those that somebody else holds by now.

        Raises:
            StoreUnavailableError: the store does not answer.
        """
        await free_addresses(self._store, pool.network.name, held)
        for address in held:
            pool.note(address, None)

    async def set_aside(
        self,
        pool: PoolView,
        held: Mapping[IpAddress, AddressHolder],
        answers: Mapping[IpAddress, bytes],
    ) -> None:
        """Give addresses back, and set aside for a while those that somebody answered for.

        Raises:
            StoreUnavailableError: the store does not answer, and may have done it.
        """
        leaving = all(is_endpoint_mac(mac) for mac in answers.values())
        ttl_s = _LEAVING_S if leaving else SET_ASIDE_S
        try:
            await set_aside(self._store, pool.network.name, held, answers, ttl_s)
        except BaseException:
            pool.listed = 0
            raise
        for address in held:
            mac = answers.get(address, b"")
            pool.note(address, AddressHolder(HostId(""), held_by=mac) if mac else None)
            if mac:
                _log.warning(
                    "address set aside, a machine outside the mesh answers for it",
                    network=pool.network.name,
                    address=str(address),
                    mac=mac.hex(":"),
                )
