"""Locks of the image store, and its writes all at once.  All functions raise `OSError`."""

from __future__ import annotations

import ctypes
import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)


def try_lock(directory: Path) -> int:
    """Lock a directory; returns the descriptor that holds the lock until it is closed.

    Raises:
        BlockingIOError: another process has it.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sync_filesystem(directory: Path) -> None:
    """Like fsync(2) for all files at once: syncfs(2), which Python lacks."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(directory))
    finally:
        os.close(fd)
