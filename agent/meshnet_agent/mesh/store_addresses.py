"""The addresses at which this host reaches etcd: no network may have them among its own."""

from __future__ import annotations

import contextlib
import math
from ipaddress import ip_address
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.model import IpAddress
    from meshnet_agent.dataplane.dirty import Dirty

_AGAIN_S = 60.0
"""How often names are resolved."""
_DEADLINE_S = 2.0
"""How long that may take: longer, and what was known before counts on."""


class StoreAddresses:
    """The addresses of some hosts, which are given by address or by name.

    Attributes:
        all: those that are known.
    """

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        self._known: dict[str, frozenset[IpAddress]] = {}
        self._names: list[str] = []
        for host in hosts:
            try:
                self._known[host] = frozenset({ip_address(host)})
            except ValueError:
                self._names.append(host)
        self.all: frozenset[IpAddress] = frozenset().union(*self._known.values())

    async def run(
        self, dirty: Dirty, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Resolve names, and mark `dirty` when an address changed.  Never returns.

        Started once the names were resolved, or could not be for a while.
        """
        started = False
        while True:
            for name in self._names:
                with trio.move_on_after(_DEADLINE_S), contextlib.suppress(OSError, UnicodeError):
                    found = await trio.socket.getaddrinfo(name, None)
                    # A link-local address comes with its zone.
                    texts = {str(address[0]).partition("%")[0] for *_, address in found}
                    self._known[name] = frozenset(map(ip_address, texts))
            before = self.all
            self.all = frozenset().union(*self._known.values())
            if self.all != before:
                dirty.mark_all()
            if not started:
                started = True
                task_status.started()
            await trio.sleep(_AGAIN_S if self._names else math.inf)
