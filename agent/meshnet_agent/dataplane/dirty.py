"""What the next pass has to look at: everything, or the hosts that changed.

Parts set this flag when the kernel may differ from what it should hold.  It coalesces and never
queues: a burst of events becomes one pass.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.model import HostId


class Dirty:
    """Marked by many, waited for and cleared by the reconciler.

    Attributes:
        everything: whether the next pass has to look at everything.
    """

    def __init__(self) -> None:
        self.everything = True
        self._hosts: set[HostId] = set()
        self._flag = Flag()

    def mark_all(self) -> None:
        """Ask for a pass over everything."""
        self.everything = True
        self._flag.set()

    def touch(self, hosts: Iterable[HostId]) -> None:
        """Ask for a pass over hosts that changed.

        With no hosts it only wakes the reconciler, which then computes anew when the next grace
        period ends.
        """
        self._hosts.update(hosts)
        self._flag.set()

    @property
    def hosts(self) -> int:
        """How many changed hosts wait for a pass."""
        return len(self._hosts)

    async def wait(self) -> None:
        """Wait until something is asked for."""
        await self._flag.wait()

    def clear_all(self) -> None:
        """Note that a pass over everything begins: it covers all changed hosts."""
        self.everything = False
        self._hosts.clear()

    def clear_some(self, most: int) -> set[HostId]:
        """Note that a pass over some hosts begins; returns up to `most` of them, the rest stays."""
        batch = set(itertools.islice(self._hosts, most))
        self._hosts -= batch
        if self._hosts:
            self._flag.set()
        return batch
