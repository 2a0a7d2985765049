"""The API's socket, and the HTTP server (hypercorn) behind it."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, cast

import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve

from meshnet.errors import UsageError
from meshnet.system.group import open_to_group
from meshnet_agent.api.errors import raw_refusal
from meshnet_agent.api.overload import refuse_clients

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hypercorn.typing import ASGIFramework
    from starlette.applications import Starlette

_BACKLOG = 4096
"""Clients that may wait to be served; where more come at once, Linux refuses them (``EAGAIN``)."""


@contextlib.contextmanager
def open_socket(path: Path) -> Iterator[socket.socket]:
    """Listen at the API's socket until the block ends: mode 0660, group meshnet if there is one.

    Raises:
        UsageError: its path is too long.
    """
    with listen(path) as listener:
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)  # ours alone: the run directory is locked


def listen(path: Path) -> socket.socket:
    """The API's socket: mode 0660, group meshnet where there is one."""
    path.unlink(missing_ok=True)  # ours alone: the run directory is locked
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Not chmod after bind: until then others could connect.
    before = os.umask(0o117)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        # sun_path holds 108 bytes (linux/un.h).
        raise UsageError(
            f"socket {path} cannot be made ({error}): give a shorter --run-dir"
        ) from error
    finally:
        os.umask(before)
    open_to_group(path, 0o660)
    listener.setblocking(False)
    listener.listen(_BACKLOG)
    return listener


async def serve_api(
    listener: socket.socket,
    app: Starlette,
    task_status: trio.TaskStatus[trio.Event] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the API until it is cancelled, or the event that it passes to `started` is set."""
    hypercorn = HypercornConfig()
    hypercorn.bind = [f"fd://{os.dup(listener.fileno())}"]  # hypercorn closes it
    hypercorn.backlog = _BACKLOG
    hypercorn.graceful_timeout = 1.0
    hypercorn.loglevel = "ERROR"
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serve(
                cast("ASGIFramework", app),
                hypercorn,
                shutdown_trigger=stop.wait,
                task_status=task_status,
            )
        )
        nursery.start_soon(refuse_clients, listener, raw_refusal)
        task_status.started(stop)
