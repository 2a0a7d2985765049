"""Tells people at a terminal what a command does once it takes more than a second."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager

from meshnet.cli.output import QUIET_S

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say on a terminal what takes so long, and for how long already; `what` names it."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def tell() -> None:
        started = time.monotonic()
        while not done.wait(QUIET_S):
            print(f"\r{what}: {time.monotonic() - started:.0f} s", end="", file=sys.stderr)

    # A thread, because the caller meanwhile blocks in a system call or waits for a program.
    teller = threading.Thread(target=tell)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
        print("\r\x1b[K", end="", file=sys.stderr)  # ECMA-48 EL: clear the line
