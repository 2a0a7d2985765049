"""System calls that Python's standard library lacks, through libc.

May import only the standard library: ``meshnet lab exec`` imports it.  Every function raises
`OSError` when the kernel refuses.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CLONE_NEWNET = 0x4000_0000
"""linux/sched.h."""
MNT_DETACH = 2
"""linux/fs.h: unmount at once also where files are open."""

RESOLVE_IN_ROOT = 0x10
"""linux/openat2.h: absolute paths and links start at the directory, as after chroot(2)."""
_OPENAT2 = 437

_libc = ctypes.CDLL(None, use_errno=True)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.mount.argtypes = (
    *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p),
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.syncfs.argtypes = (ctypes.c_int,)
# Variadic: its arguments have no types here, so the caller gives ints that fit into a C int, bytes
# and pointers.
_libc.syscall.restype = ctypes.c_long


def setns(fd: int, kind: int) -> None:
    """Move the calling thread into a namespace: setns(2), which Python has from 3.12 on.

    Args:
        kind: which one `fd` must be, as `CLONE_NEWNET`.
    """
    _check(_libc.setns(fd, kind))


def mount(source: str, target: str | Path, kind: str, flags: int, options: bytes) -> None:
    """Mount a file system: mount(2)."""
    source_, target_, kind_ = map(os.fsencode, (source, target, kind))
    _check(_libc.mount(source_, target_, kind_, flags, options))


def umount(target: str | Path, flags: int = 0) -> None:
    """Take a mount away: umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags))


def syncfs(fd: int) -> None:
    """Write all of the file system that a descriptor is on to its disk: syncfs(2)."""
    _check(_libc.syncfs(fd))


class _OpenHow(ctypes.Structure):
    """``struct open_how`` of linux/openat2.h."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def openat2(directory_fd: int, path: str, flags: int, resolve: int) -> int:
    """Open a file below a directory: openat2(2), Linux 5.6.

    Args:
        resolve: how links and ``..`` are followed, as `RESOLVE_IN_ROOT`.
    """
    how = _OpenHow(flags, 0, resolve)
    return syscall(_OPENAT2, directory_fd, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))


def syscall(number: int, *arguments: object) -> int:
    """Call the kernel by a number of asm-generic/unistd.h: syscall(2).

    From number 403 on they are the same on all architectures but alpha.

    Args:
        arguments: ints that fit into a C int, bytes, and what ctypes makes.
    """
    return _check(_libc.syscall(number, *arguments))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
