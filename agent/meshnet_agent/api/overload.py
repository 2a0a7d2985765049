"""Answers clients for which the agent has no descriptor left.

trio's listener only logs that it could not accept one, and tries again ten times a second: the
client would wait until it gives up.  So the agent keeps a spare descriptor.  It closes that to
accept a client, answers, and hangs up.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from typing import TYPE_CHECKING

import trio

from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import BinaryIO

_ACCEPTING = logging.getLogger("trio.serve_listeners")
_PATIENCE_S = 1.0
"""How long a client may take to send its request, and again to read the refusal."""
_REQUEST_BYTES = 1 << 16


class _Failures(logging.Handler):
    """Learns from trio's log that a client could not be accepted, and why: trio has no hook."""

    def __init__(self) -> None:
        super().__init__()
        self.happened = Flag()
        self.errno = errno.EMFILE

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, OSError) and error.errno is not None:
            self.errno = error.errno
        self.happened.set()


async def refuse_clients(listener: socket.socket, answer: Callable[[int], bytes]) -> None:
    """Refuse each client for which `listener` has no descriptor, with an answer.  Never returns.

    Args:
        answer: a whole HTTP response, given the errno.
    """
    failures = _Failures()
    _ACCEPTING.addHandler(failures)
    spare = _open_spare()
    try:
        while True:
            await failures.happened.wait()
            free = _open_spare()
            if free is not None:
                # A descriptor is free again: leave it to the listener, or keep it as the spare.
                if spare is not None:
                    free.close()
                else:
                    spare = free
            elif spare is not None:
                spare.close()
                try:
                    await _refuse_one(listener, answer(failures.errno))
                finally:
                    spare = _open_spare()
    finally:
        _ACCEPTING.removeHandler(failures)
        if spare is not None:
            spare.close()


async def _refuse_one(listener: socket.socket, response: bytes) -> None:
    """Accept one client, answer it, and hang up.

    Nothing is awaited before the accept or after the close, so that no other task can take the
    descriptor in between.
    """
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        taken, _ = listener.accept()
        with taken:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(taken))
            with trio.move_on_after(_PATIENCE_S):
                # Read first: closing a socket with unread data resets the connection, and the
                # client would not see the answer.
                await stream.receive_some(_REQUEST_BYTES)
            with trio.move_on_after(_PATIENCE_S):
                await stream.send_all(response)


def _open_spare() -> BinaryIO | None:
    """A descriptor to close when it is needed; None: none is left, the next client must wait."""
    try:
        return open(os.devnull, "rb", buffering=0)
    except OSError:
        return None
