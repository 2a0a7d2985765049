"""Answering clients when there is no descriptor left to take them by.

trio's listener tries again ten times a second and says so to its logger; the client would wait
until it gives up.  So one descriptor is kept back: it is given up to take a client, tell it, and
let it go.
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
"""How long a client may take to say what it wants, and to hear that it cannot be."""
_REQUEST_BYTES = 1 << 16


class _Failures(logging.Handler):
    """Hears of clients that could not be taken, and why."""

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
    """Tell each client that `listener` has no descriptor for that it is so.  Never returns.

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
                # One has come free: the listener takes the client by it, or this is the spare now.
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
    """Between its end and its return nobody else runs, who might open the descriptor anew."""
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        taken, _ = listener.accept()
        with taken:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(taken))
            with trio.move_on_after(_PATIENCE_S):
                # What is not read when the socket is closed would reset the connection.
                await stream.receive_some(_REQUEST_BYTES)
            with trio.move_on_after(_PATIENCE_S):
                await stream.send_all(response)


def _open_spare() -> BinaryIO | None:
    """A descriptor to be given up; None if there is none, and the next client has to wait."""
    try:
        return open(os.devnull, "rb", buffering=0)
    except OSError:
        return None
