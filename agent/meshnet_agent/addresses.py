"""Addresses of endpoints: where they come from, who has them on this host."""

from __future__ import annotations

from ipaddress import ip_interface
from typing import TYPE_CHECKING

from meshnet.errors import MeshnetError, UsageError
from meshnet.ipam import AddressPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from meshnet.model import IpAddress, IpInterface, IpNetwork, Network, NetworkName


class SubnetAddresses:
    """Addresses of subnets that this host has for itself: nobody else need be asked.

    Args:
        in_use: the addresses of this host's endpoints; asked once for each subnet.
    """

    def __init__(self, in_use: Callable[[], Iterable[IpInterface]]) -> None:
        self._in_use = in_use
        self._pools: dict[IpNetwork, AddressPool] = {}

    def take(
        self, network: Network, subnets: Sequence[IpNetwork], wanted: IpAddress | None
    ) -> tuple[IpInterface, ...]:
        """One address of each subnet; `wanted` is the one of its IP version.

        Raises:
            UsageError, ConflictError, PoolExhaustedError: as of `AddressPool.take`; nothing is
                taken.
        """
        if wanted is not None and wanted.version not in {s.version for s in subnets}:
            raise UsageError(
                f"address {wanted} is IPv{wanted.version}, network {network.name} has "
                f"{', '.join(map(str, subnets))} here: choose one within it"
            )
        taken: list[IpInterface] = []
        try:
            for subnet in subnets:
                matches = wanted is not None and wanted.version == subnet.version
                address = self._pool(network.name, subnet).take(wanted if matches else None)
                taken.append(ip_interface((address, subnet.prefixlen)))
        except MeshnetError:
            self.free(taken)
            raise
        return tuple(taken)

    def free(self, addresses: Iterable[IpInterface]) -> None:
        """Give addresses back."""
        for address in addresses:
            if address.network in self._pools:
                self._pools[address.network].free(address.ip)

    def _pool(self, network: NetworkName, subnet: IpNetwork) -> AddressPool:
        if subnet not in self._pools:
            in_use = [a.ip for a in self._in_use() if a.network == subnet]
            self._pools[subnet] = AddressPool(network, subnet, in_use)
        return self._pools[subnet]
