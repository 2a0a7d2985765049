"""Listens to the kernel, and marks everything dirty when somebody else changed an object of ours.

When a socket's buffer overflows (ENOBUFS, netlink(7)), notifications are lost.  The pass that
follows dumps everything, so nothing more is lost than them.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

import structlog
import trio

from meshnet.backends.occupied import kept_off, spans_of
from meshnet.backends.table import backend_of
from meshnet.kernel.events import (
    nftables_concerns_us,
    open_nftables_events,
    open_route_events,
    others_rules_changed,
)
from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    import socket
    from collections.abc import Collection

    from meshnet.backends import Underlay
    from meshnet.kernel import Kernel
    from meshnet.kernel.events import EventFilter
    from meshnet_agent.dataplane.dirty import Dirty
    from meshnet_agent.dataplane.pass_values import PassResult
    from meshnet_agent.mesh.view import MeshView
    from meshnet_agent.tasks.worker import Worker

_log = structlog.get_logger()
_RECEIVE_BYTES = 1 << 18


class KernelEvents(Protocol):
    """Where the kernel's notifications come from."""

    async def listen(
        self,
        event_filter: EventFilter,
        dirty: Dirty,
        rules_changed: Flag,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Mark `dirty` when a notification concerns us.  Never returns.

        Started once the sockets are subscribed, so that nothing after that is missed.

        Raises:
            OSError: a socket cannot be opened or read.
        """
        ...


class NetlinkEvents:
    """`KernelEvents` of this network namespace.

    Args:
        own_ports: netlink port ids of the sockets through which this agent writes itself.  The
            kernel drops notifications of these writes: they must not wake the agent.
        own_nft_ports: the same for the sockets that write nftables elements.
    """

    def __init__(self, own_ports: Collection[int], own_nft_ports: Collection[int]) -> None:
        self._own_ports = own_ports
        self._own_nft_ports = own_nft_ports

    async def listen(
        self,
        event_filter: EventFilter,
        dirty: Dirty,
        rules_changed: Flag,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """See `KernelEvents`."""
        with (
            open_route_events(self._own_ports) as routes,
            open_nftables_events(self._own_nft_ports) as rules,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_receive, routes, _Routes(event_filter, dirty))
                nursery.start_soon(_receive, rules, _Rules(dirty, rules_changed))
                task_status.started()


class _Heard(Protocol):
    """What to do with notifications."""

    def look(self, data: bytes) -> None:
        """Act on those of a datagram."""
        ...

    def lost(self) -> None:
        """Some were lost, and may have been anything."""
        ...


class _Routes:
    """`_Heard` of rtnetlink."""

    def __init__(self, event_filter: EventFilter, dirty: Dirty) -> None:
        self._filter = event_filter
        self._dirty = dirty

    def look(self, data: bytes) -> None:
        if self._filter.concerns_us(data):
            self._dirty.mark_all()

    def lost(self) -> None:
        self._dirty.mark_all()


class _Rules:
    """`_Heard` of nf_tables."""

    def __init__(self, dirty: Dirty, changed: Flag) -> None:
        self._dirty = dirty
        self._changed = changed

    def look(self, data: bytes) -> None:
        if nftables_concerns_us(data):
            self._dirty.mark_all()
        if others_rules_changed(data):
            self._changed.set()

    def lost(self) -> None:
        self._dirty.mark_all()
        self._changed.set()


async def _receive(events: socket.socket, heard: _Heard) -> None:
    while True:
        await trio.lowlevel.wait_readable(events)
        try:
            data = events.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            _log.warning("kernel notifications lost, comparing everything")
            heard.lost()
            continue
        heard.look(data)


class Monitor:
    """Tells the filter which links matter, after every pass over everything.

    The filter goes by index, and a link that was removed and made again has another one.
    """

    def __init__(self, kernel: Worker[Kernel], event_filter: EventFilter, mesh: MeshView) -> None:
        self._kernel = kernel
        self._filter = event_filter
        self._mesh = mesh
        self._underlay: Underlay | None = None
        self._look = Flag()

    def passed(self, result: PassResult) -> None:
        """See `PassListener`: links may have been made, and have new indices."""
        self._underlay = result.underlay
        self._look.set()

    async def run(self) -> None:
        """Keep the filter current.  Never returns."""
        while True:
            await self._look.wait()
            if self._underlay is not None:
                await self._update(self._underlay)

    async def _update(self, underlay: Underlay) -> None:
        indices = await self._kernel.run(lambda kernel: kernel.link_indices())
        networks = self._mesh.snapshot.networks.values()
        links = [backend_of(network).link_names(network) for network in networks]
        spans = spans_of(networks)
        # From a link that goes the kernel removes routes, and does not tell.
        in_the_way = {
            occupant.dev
            for network in networks
            for occupant in kept_off(network, underlay.occupied)
        }
        parents = {name for names in links for name in names.parents}

        def known(names: Collection[str]) -> set[int]:
            return {indices[name] for name in names if name in indices}

        self._filter.look_at(
            known([name for names in links for name in names.local]),
            known([name for names in links for name in names.tunnels]),
            known({underlay.dev, *(p.dev for p in underlay.paths.values()), *parents, *in_the_way}),
            known({"lo", *underlay.forwarding_links}),
            parents,
            spans,
        )
