"""The steps of a takeover and of its undoing, ordered so that the host is reachable at any moment.

Batches are carried out one after the other; the kernel works through a batch in one go, and nobody
can kill the process in the middle of it.  After any batch every address is on at least one of the
two links and every route leads by one of them, so a crash in between cuts nobody off.

Taking over: the parent becomes a port of the bridge, which gets the addresses (1), then neighbours
and routes, behind those of the parent (2); then the parent's are removed (3), which hands over
route by route.  Until (3) packets leave by the parent.  From (1) on they arrive at the bridge, and
either link answers for an address that is on both.

Giving back is the reverse, and looks only at what is missing, so it also undoes a takeover that was
cut short after any batch.  The parent stops being a port last, after the bridge's routes are gone:
until then packets arrive at the bridge and leave by the parent.

Pure: imports no I/O.
"""

from __future__ import annotations

from enum import IntEnum
from socket import AF_INET
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from meshnet.kernel.takeover.contents import Contents, LinkObject


class Verb(IntEnum):
    """What is done to an object."""

    ADD = 1
    DELETE = 2


class Step(NamedTuple):
    """One request to the kernel: an object comes to a link, or goes from it.

    Attributes:
        link: the bridge or the parent.
        moved: None: the parent becomes a port of the bridge, or ceases to be one.
    """

    verb: Verb
    link: str
    moved: LinkObject | None

    def __str__(self) -> str:
        verb = self.verb.name.lower()
        return f"{verb} {self.moved or 'port'} on {self.link}"


def plan_taking(parent: str, bridge: str, held: Contents) -> list[list[Step]]:
    """Batches that move all that a parent has to a new bridge, which is up and has nothing."""
    return [
        [Step(Verb.ADD, parent, None), *_add(bridge, in_order_of_adding(held.addresses))],
        _add(bridge, (*held.neighbours, *held.nexthops, *held.own_routes)),
        [
            *_delete(parent, (*held.routes, *held.neighbours)),
            *_delete(parent, reversed(held.addresses)),
        ],
    ]


def plan_giving_back(
    parent: str,
    bridge: str,
    wanted: Contents,
    on_parent: Contents,
    on_bridge: Contents,
    *,
    is_port: bool,
) -> list[list[Step]]:
    """Batches after which a parent has all that is wanted, and a bridge nothing but addresses.

    Those vanish with the bridge.

    Args:
        wanted: what the parent must have at least.
        on_parent: what it has now.
        on_bridge: what the bridge has now.
        is_port: whether the parent is a port of the bridge.
    """
    held = {r.identity for table in on_parent for r in table}
    missing = [r for r in in_order_of_adding(wanted.addresses) if r.identity not in held]
    rest = (*wanted.neighbours, *wanted.nexthops, *wanted.own_routes)
    return [
        _add(parent, missing),
        _add(parent, [r for r in rest if r.identity not in held]),
        [
            *_delete(bridge, on_bridge.routes),
            *([Step(Verb.DELETE, parent, None)] if is_port else []),
        ],
    ]


def in_order_of_adding(addresses: Sequence[LinkObject]) -> list[LinkObject]:
    """Addresses in the order of adding by which they end up in the order given.

    That decides source addresses.  The kernel puts a new IPv4 address last, and a new IPv6 address
    first within its scope (``__inet_insert_ifa``, ``ipv6_link_dev_addr``).
    """
    ipv4 = [a for a in addresses if a.family == AF_INET]
    return [*ipv4, *(a for a in reversed(addresses) if a.family != AF_INET)]


def _add(link: str, moving: Iterable[LinkObject]) -> list[Step]:
    return [Step(Verb.ADD, link, moved) for moved in moving]


def _delete(link: str, moving: Iterable[LinkObject]) -> list[Step]:
    return [Step(Verb.DELETE, link, moved) for moved in moving]
