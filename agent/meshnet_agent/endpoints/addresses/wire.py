"""Asks the wire of an underlay network whether somebody outside the mesh has an address."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from meshnet.errors import MeshnetError

if TYPE_CHECKING:
    from collections.abc import Collection

    from meshnet.kernel.address_probe import AddressProber
    from meshnet.model import IpAddress


async def ask_wire(
    prober: AddressProber, link: str, addresses: Collection[IpAddress]
) -> dict[IpAddress, bytes]:
    """Ask for several addresses at once; returns the MAC that answered, by address.

    Raises:
        MeshnetError: one of them could not be asked for.
    """
    answers: dict[IpAddress, bytes] = {}
    failures: list[MeshnetError] = []

    async def ask(address: IpAddress) -> None:
        try:
            mac = await prober.probe(link, address)
        except MeshnetError as error:
            failures.append(error)  # raised here, it would leave the nursery in a group
        else:
            if mac is not None:
                answers[address] = mac

    async with trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(ask, address)
    if failures:
        raise failures[0]
    return answers
