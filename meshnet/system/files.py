"""Files that survive a power cut: replaced whole, by a rename, and written to the disk."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from meshnet.system import libc

if TYPE_CHECKING:
    from pathlib import Path

UNFINISHED = ".new"
"""Suffix of a file that is being written."""


def write_whole(file: Path, content: bytes, *, keep: bool = True) -> None:
    """Replace a file atomically and durably; if the disk refuses, all is as before.

    Args:
        keep: else a power cut may bring the file back as it was before; it is never half.

    Raises:
        OSError: the disk refused.
    """
    draft = file.with_name(file.name + UNFINISHED)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(fd)
        os.replace(draft, file)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    if keep:
        sync(file.parent)


def sync(directory: Path) -> None:
    """Make names in a directory survive a power cut.

    Raises:
        OSError: the disk refused.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_filesystem(directory: Path) -> None:
    """Make all that was written to a file system survive a power cut: fsync(2) of everything.

    Raises:
        OSError: the disk refused.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        libc.syncfs(fd)
    finally:
        os.close(fd)
