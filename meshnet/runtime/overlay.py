"""Root file systems: read-only lower directories under one writable layer (overlayfs).

Blocks; mounts appear in the mount namespace of the caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MNT_DETACH = 2  # linux/fs.h
_libc = ctypes.CDLL(None, use_errno=True)


def mount_rootfs(target: Path, lowerdirs: Sequence[Path], upper: Path, work: Path) -> None:
    """Stack directories; what is written goes to `upper`.

    Args:
        lowerdirs: the uppermost first; they are not changed.
        work: an empty directory on the file system of `upper`, for the kernel.

    Raises:
        KernelRefusedError: a directory is missing, or the kernel refused.
    """
    with contextlib.ExitStack() as stack:

        def short(path: Path) -> str:
            # The options have one page: descriptors are shorter than paths, and have no colons.
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return f"/proc/self/fd/{fd}"

        try:
            for directory in (target, upper, work):
                directory.mkdir(exist_ok=True)
            lower = ":".join(map(short, lowerdirs))
            options = f"lowerdir={lower},upperdir={short(upper)},workdir={short(work)}"
        except OSError as error:
            raise KernelRefusedError(
                f"root file system: {error.filename}: {error.strerror}"
            ) from error
        done = _libc.mount(
            b"overlay", os.fsencode(target), b"overlay", ctypes.c_ulong(0), options.encode()
        )
        if done != 0:
            reason = os.strerror(ctypes.get_errno())
            raise KernelRefusedError(f"overlay of {', '.join(map(str, lowerdirs))}: {reason}")


def unmount_rootfs(target: Path) -> None:
    """Undo `mount_rootfs`.  Idempotent.

    Raises:
        KernelRefusedError: the kernel refused.
    """
    if _libc.umount2(os.fsencode(target), _MNT_DETACH) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOENT):  # not mounted, not there
            raise KernelRefusedError(f"{target} stays mounted: {os.strerror(code)}")
