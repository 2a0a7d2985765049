"""Listens to the kernel and raises the reconciler's flag when somebody changed what is ours.

A socket whose buffer overran (ENOBUFS) has lost notifications; the pass that follows dumps
everything, so nothing else is lost.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.kernel.events import open_nftables_events, open_route_events

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection

_log = structlog.get_logger()
_RECEIVE_BYTES = 1 << 18


async def listen(
    concerns_us: Callable[[bytes], bool],
    nftables_concerns_us: Callable[[bytes], bool],
    on_change: Callable[[], None],
    own_ports: Collection[int] = (),
    own_nft_ports: Collection[int] = (),
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen to both sockets for ever; started once nothing can be missed any more.

    Args:
        on_change: called when a notification concerns us.
        own_ports: netlink addresses of the sockets that we write through ourselves.
        own_nft_ports: the same of nftables' elements.

    Raises:
        OSError: a socket cannot be had.
    """
    with (
        open_route_events(own_ports) as routes,
        open_nftables_events(own_nft_ports) as rules,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_receive, routes, concerns_us, on_change)
            nursery.start_soon(_receive, rules, nftables_concerns_us, on_change)
            task_status.started()


async def _receive(
    events: socket.socket, concerns_us: Callable[[bytes], bool], on_change: Callable[[], None]
) -> None:
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
            on_change()
            continue
        if concerns_us(data):
            on_change()
