"""Addresses of endpoints: where they come from, and which are in use on this host."""

from __future__ import annotations

from contextlib import asynccontextmanager
from ipaddress import ip_interface
from typing import TYPE_CHECKING, Protocol

from meshnet.backends import Addressing
from meshnet.backends.table import addressing_of
from meshnet.errors import MeshnetError, UsageError
from meshnet.ipam import AddressPool
from meshnet_agent.endpoints.addresses.former import FormerAddresses

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence
    from contextlib import AbstractAsyncContextManager

    from meshnet.model import (
        Endpoint,
        EndpointId,
        IpAddress,
        IpInterface,
        IpNetwork,
        Network,
        NetworkName,
    )
    from meshnet_agent.endpoints.request import ReadyNetwork
    from meshnet_agent.endpoints.surroundings import OwnEndpoints


class Addresses(Protocol):
    """Where endpoints' addresses come from."""

    def allocate(
        self,
        ready: ReadyNetwork,
        identity: EndpointId,
        wanted: IpAddress | None,
        former: Sequence[IpInterface] = (),
    ) -> AbstractAsyncContextManager[tuple[IpInterface, ...]]:
        """One address of each of the network's IP versions; `wanted` is taken for its version.

        If the block ends well, the endpoint keeps them; otherwise they are given back.

        Args:
            former: what to choose if it is free.

        Raises:
            UsageError: an endpoint may not have `wanted`.
            ConflictError: `wanted` is in use.
            PoolExhaustedError: no address is left.
        """
        ...

    def free(self, addresses: Collection[IpInterface]) -> None:
        """Give addresses back, unless an endpoint of this host still has them."""
        ...


class HostAddresses:
    """The addresses of all networks: from this host's subnets, or from a pool of all hosts.

    Args:
        endpoints: this host's, whose addresses are not given out again.
    """

    def __init__(self, endpoints: OwnEndpoints, pool: Addresses) -> None:
        self._former = FormerAddresses()
        self._subnets = SubnetAddresses(endpoints, self._former)
        self._pool = pool

    def allocate(
        self,
        ready: ReadyNetwork,
        identity: EndpointId,
        wanted: IpAddress | None,
        name: str | None = None,
    ) -> AbstractAsyncContextManager[tuple[IpInterface, ...]]:
        """See `Addresses`; an endpoint of that name gets those it had last, if they are free."""
        shared = addressing_of(ready.network) is Addressing.POOL
        source = self._pool if shared else self._subnets
        former = self._former.of(ready.network.name, name)
        return source.allocate(ready, identity, wanted, former)

    def remember(self, endpoint: Endpoint) -> None:
        """Note the addresses of an endpoint that ends, in case that it comes back."""
        self._former.remember(endpoint)

    def free(self, addresses: Collection[IpInterface]) -> None:
        """See `Addresses`."""
        for source in (self._subnets, self._pool):
            source.free(addresses)


class SubnetAddresses:
    """Addresses of subnets that belong to this host alone: it need not ask anybody.

    Args:
        endpoints: this host's, whose addresses are not given out again.
        former: whose addresses are given to others last.
    """

    def __init__(self, endpoints: OwnEndpoints, former: FormerAddresses) -> None:
        self._endpoints = endpoints
        self._former = former
        self._pools: dict[IpNetwork, AddressPool] = {}

    @asynccontextmanager
    async def allocate(
        self,
        ready: ReadyNetwork,
        identity: EndpointId,
        wanted: IpAddress | None,
        former: Sequence[IpInterface] = (),
    ) -> AsyncIterator[tuple[IpInterface, ...]]:
        """See `Addresses`."""
        addresses = self._choose(ready.network, ready.subnets, wanted, former)
        try:
            yield addresses
        except BaseException:
            self.free(addresses)
            raise

    def _choose(
        self,
        network: Network,
        subnets: Sequence[IpNetwork],
        wanted: IpAddress | None,
        former: Sequence[IpInterface],
    ) -> tuple[IpInterface, ...]:
        if wanted is not None and wanted.version not in {s.version for s in subnets}:
            raise UsageError(
                f"address {wanted} is IPv{wanted.version}, but network {network.name} has "
                f"{', '.join(map(str, subnets))} here: choose an address within that"
            )
        taken: list[IpInterface] = []
        try:
            for subnet in subnets:
                matches = wanted is not None and wanted.version == subnet.version
                before = next((a.ip for a in former if a.network == subnet), None)
                address = self._pool(network.name, subnet).allocate(
                    wanted if matches else None, former=before
                )
                taken.append(ip_interface((address, subnet.prefixlen)))
        except MeshnetError:
            self.free(taken)
            raise
        return tuple(taken)

    def free(self, addresses: Collection[IpInterface]) -> None:
        """See `Addresses`."""
        # If an attach failed and could not be undone, the endpoint stays and so do its addresses.
        in_use = self._in_use()
        for address in addresses:
            if address.network in self._pools and address not in in_use:
                self._pools[address.network].free(address.ip)

    def _pool(self, network: NetworkName, subnet: IpNetwork) -> AddressPool:
        if subnet not in self._pools:
            in_use = [a.ip for a in self._in_use() if a.network == subnet]
            resting = self._former.within(subnet)
            self._pools[subnet] = AddressPool(network, subnet, in_use, resting)
        return self._pools[subnet]

    def _in_use(self) -> set[IpInterface]:
        return {a for e in self._endpoints.all for a in e.addresses}
