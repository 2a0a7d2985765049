"""Locks and durable writes of the image store.  All functions raise `OSError`."""

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


def sync(directory: Path) -> None:
    """Make names in a directory survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_filesystem(directory: Path) -> None:
    """Like fsync(2) for all files at once: syncfs(2), which Python lacks."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(directory))
    finally:
        os.close(fd)


def write_whole(file: Path, content: bytes) -> None:
    """Replace a file atomically and durably."""
    draft = file.with_name(file.name + ".new")
    with open(draft, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(draft, file)
    sync(file.parent)
