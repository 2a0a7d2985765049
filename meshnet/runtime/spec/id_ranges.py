"""Which ids of the host a container's own user and group ids are: ranges that never overlap.

A container with a user namespace has the ids 0, 1, … of its own; they are `IdRange.first` and so on
of the host, for users and for groups alike (user_namespaces(7)).  Pure: who holds which range is in
the containers' records.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshnet.errors import ConflictError, PoolExhaustedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

PER_CONTAINER = 1 << 16
"""Ids of a container: as many as POSIX programs and distributions count on."""
_NO_ID = (1 << 32) - 1
"""(uid_t) -1 says "no change" to chown(2): nobody has it."""
_RANGE = re.compile(r"([0-9]{1,10}):([0-9]{1,10})")


@dataclass(frozen=True, slots=True, order=True)
class IdRange:
    """Ids of the host from `first` on."""

    first: int
    size: int

    @property
    def end(self) -> int:
        """The first id after it."""
        return self.first + self.size

    def overlaps(self, other: IdRange) -> bool:
        """Whether an id is in both."""
        return self.first < other.end and other.first < self.end

    def __str__(self) -> str:
        return f"{self.first}:{self.size}"


def parse_range(text: str, what: str) -> IdRange:
    """``FIRST:SIZE``; never the host's root.

    Args:
        what: what the message calls it.

    Raises:
        UsageError: anything else.
    """
    found = _RANGE.fullmatch(text)
    if found is not None:
        ids = IdRange(int(found[1]), int(found[2]))
        if ids.first > 0 and ids.size > 0 and ids.end <= _NO_ID:
            return ids
    raise UsageError(
        f"{what} {text!r} is not usable: give FIRST:SIZE, ids from 1 to {_NO_ID - 1} of the host"
    )


def allocate(pool: IdRange, taken: Mapping[str, IdRange]) -> IdRange:
    """The first `PER_CONTAINER` ids of a pool that no container has.

    Args:
        taken: by the container's name.

    Raises:
        PoolExhaustedError: there are none.
    """
    first = pool.first
    for other in sorted(taken.values()):
        if other.first >= first + PER_CONTAINER:
            break
        first = max(first, other.end)
    if first + PER_CONTAINER > pool.end:
        raise PoolExhaustedError(
            f"userns-range {pool} has no {PER_CONTAINER} ids left for another container: remove "
            "containers, or give the agent a larger one"
        )
    return IdRange(first, PER_CONTAINER)


def check_free(wanted: IdRange, taken: Mapping[str, IdRange]) -> IdRange:
    """A range that was asked for, if no container has an id of it.

    Raises:
        ConflictError: one has.
    """
    for name, other in taken.items():
        if wanted.overlaps(other):
            raise ConflictError(
                f"ids {wanted} overlap with {other} of container {name}: choose others, or share "
                f"its namespace by --userns container:{name}"
            )
    return wanted
