"""What a host knows of the pool of an underlay network: who has which address.

Only a hint, except for the host's own addresses: the store decides (`meshnet.store.addresses`).
No I/O.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meshnet.errors import ConflictError
from meshnet.ipam import choose_address

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from meshnet.model import AddressHolder, IpAddress, Network


@dataclass(slots=True)
class PoolView:
    """Who has which address of one network's pool.

    Attributes:
        revision: of the network's key; what is written depends on it.
        choosing: what attaches under way have chosen, so that a host does not race itself.
        written: what this host wrote since the last listing began; None: freed.
        begun: how many listings began.
        listed: the number of the last listing that ended well; 0: what is known may be wrong.
    """

    network: Network
    revision: int = 0
    holders: dict[IpAddress, AddressHolder] = field(default_factory=dict)
    bad_values: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    choosing: set[IpAddress] = field(default_factory=set)
    written: dict[IpAddress, AddressHolder | None] = field(default_factory=dict)
    begun: int = 0
    listed: int = 0

    def note(self, address: IpAddress, holder: AddressHolder | None) -> None:
        """Take in that this host wrote a key; None: it freed the address."""
        self.written[address] = holder
        self._apply(address, holder)

    def replace(self, holders: dict[IpAddress, AddressHolder]) -> None:
        """Take in a listing; what this host wrote meanwhile may be missing in it."""
        self.holders = holders
        for address, holder in self.written.items():
            self._apply(address, holder)

    def _apply(self, address: IpAddress, holder: AddressHolder | None) -> None:
        if holder is None:
            self.holders.pop(address, None)
        else:
            self.holders[address] = holder

    @contextlib.contextmanager
    def chosen(self, addresses: Collection[IpAddress]) -> Iterator[None]:
        """While the block runs, no other attach of this host chooses the addresses."""
        self.choosing.update(addresses)
        try:
            yield
        finally:
            self.choosing.difference_update(addresses)

    def choose(
        self,
        excluded: Collection[IpAddress],
        versions: Collection[int],
        wanted: IpAddress | None,
        random_below: Callable[[int], int] | None,
    ) -> list[IpAddress]:
        """A free address of each IP version; `wanted` is taken for its version.

        Args:
            excluded: addresses of routers and hosts.
            random_below: see `meshnet.ipam.choose_address`.

        Raises:
            ConflictError: `wanted` is held, as far as is known.
            PoolExhaustedError: none is free, as far as is known.
        """
        taken = {*self.holders, *self.choosing, *excluded}
        chosen = []
        for version in versions:
            if wanted is None or wanted.version != version:
                chosen.append(
                    choose_address(self.network, version, taken, random_below=random_below)
                )
                continue
            if wanted in taken:
                raise self._conflict(wanted)
            chosen.append(wanted)
        return chosen

    def _conflict(self, wanted: IpAddress) -> ConflictError:
        holder = self.holders.get(wanted)
        if holder is not None and holder.held_by:
            return answered(self.network, wanted, holder.held_by)
        by = name_of(holder) if holder is not None else "another attach"
        return ConflictError(
            f"address {wanted} of network {self.network.name} is held by {by}: choose another, "
            "or leave --ip out (meshnet endpoint ls shows who has it)"
        )


def name_of(holder: AddressHolder) -> str:
    """Who has an address, in words."""
    if holder.held_by:
        return f"a machine outside the mesh, {holder.held_by.hex(':')},"
    return f"host {holder.host}" if holder.host else "an entry that cannot be read"


def answered(network: Network, address: IpAddress, mac: bytes) -> ConflictError:
    """The error for an address that a machine outside the mesh has."""
    return ConflictError(
        f"address {address} of network {network.name} is in use by {mac.hex(':')}, a machine "
        "outside the mesh: choose another --ip, or stop that machine"
    )
