"""Addresses that endpoints had: whoever comes back by the same name gets them, if they are free.

A container has the same address after a stop and a start, and after a power cut.  Clients that
looked it up, and peers that remember its MAC, need not notice.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from meshnet.model import Endpoint, IpAddress, IpInterface, IpNetwork, NetworkName

_MOST = 1024


class FormerAddresses:
    """By network and name, the latest ones; they outlive the agent as far as their record does."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[NetworkName, str], tuple[IpInterface, ...]] = OrderedDict()

    def remember(self, endpoint: Endpoint) -> None:
        """Note the addresses of an endpoint that ends."""
        if endpoint.name == f"{endpoint.sandbox.label}-{endpoint.id[:4]}":
            return  # a name that the agent made, by which nobody comes back
        key = endpoint.network, endpoint.name
        self._known[key] = endpoint.addresses
        self._known.move_to_end(key)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)

    def of(self, network: NetworkName, name: str | None) -> tuple[IpInterface, ...]:
        """The addresses that an endpoint of that name had last on a network."""
        return self._known.get((network, name), ()) if name is not None else ()

    def within(self, subnet: IpNetwork) -> Collection[IpAddress]:
        """All of a subnet: they are given to others last."""
        return {a.ip for known in self._known.values() for a in known if a.network == subnet}
