"""What the next pass is to look at: everything, or hosts that changed.

The flag that parts set when something may differ from what the kernel holds.  It gathers and never
queues: a burst of events is one pass.
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
        everything: whether the next pass is to look at everything.
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
        """Ask for a pass over hosts that changed; with none, for a look at the clock."""
        self._hosts.update(hosts)
        self._flag.set()

    @property
    def hosts(self) -> int:
        """How many hosts changed and have not been looked at."""
        return len(self._hosts)

    async def wait(self) -> None:
        """Wait until something is asked for."""
        await self._flag.wait()

    def clear_all(self) -> None:
        """A pass over everything begins."""
        self.everything = False
        self._hosts.clear()

    def clear_some(self, most: int) -> set[HostId]:
        """A pass over some hosts begins: returns at most so many, and leaves the rest."""
        batch = set(itertools.islice(self._hosts, most))
        self._hosts -= batch
        if self._hosts:
            self._flag.set()
        return batch
