"""Idmapped mounts: a directory that shows each owner N as another id, nothing of it changed.

So an image's layers, which belong to ids 0, 1, … on the disk, are for a container with a user
namespace its own ids', without a chown and without a copy.
Source: mount_setattr(2), "ID-mapped mounts"; Linux 5.12, below overlayfs 5.19.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError, NotFoundError
from meshnet.system import libc
from meshnet.system.proc import mounts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from meshnet.runtime.spec.id_ranges import IdRange

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
# linux/mount.h
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH, _MOUNT_ATTR_IDMAP = 0x1, 0x4, 0x0010_0000
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_REMEDY = "keep it on ext4, xfs, btrfs or another that does, or use --userns host"


class _MountAttr(ctypes.Structure):
    """``struct mount_attr``."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount_idmapped(source: Path, target: Path, namespace: int) -> None:
    """Mount a directory once more, its owners 0, 1, … shown as the ids of a user namespace.

    What is mounted below `source` is not part of it.

    Args:
        namespace: a descriptor (`user_namespace`).

    Raises:
        NotFoundError: the directory is missing.
        KernelRefusedError: its file system or the kernel cannot do it; the message says which.
    """
    try:
        tree = libc.syscall(
            _OPEN_TREE, _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | os.O_CLOEXEC
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{source} is missing: load the image again, or make it") from error
    except OSError as error:
        raise _refused(source, error) from error
    try:
        wanted = _MountAttr(attr_set=_MOUNT_ATTR_IDMAP, userns_fd=namespace)
        call = (tree, b"", _AT_EMPTY_PATH, ctypes.byref(wanted), ctypes.sizeof(wanted))
        try:
            libc.syscall(_MOUNT_SETATTR, *call)
        except OSError as error:
            raise _refused(source, error) from error
        moved = (tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
        try:
            libc.syscall(_MOVE_MOUNT, *moved)
        except OSError as error:
            raise KernelRefusedError(f"{source} stays off {target}: {error.strerror}") from error
    finally:
        os.close(tree)


def _refused(source: Path, error: OSError) -> KernelRefusedError:
    if error.errno == errno.EINVAL:
        return KernelRefusedError(
            f"file system {file_system_of(source)} of {source} cannot map ids: {_REMEDY}"
        )
    if error.errno == errno.ENOSYS:
        return KernelRefusedError(
            f"this kernel cannot map the ids of {source}: it takes Linux 5.19; use --userns host"
        )
    return KernelRefusedError(
        f"the ids of {source} cannot be mapped: {error.strerror}; use --userns host"
    )


def file_system_of(path: Path) -> str:
    """The type of the file system that a path is on, such as ``ext4``; empty: not known."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            with open(f"/proc/self/fdinfo/{fd}") as info:
                number = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
        finally:
            os.close(fd)
        return next((mount.kind for mount in mounts() if mount.id == int(number)), "")
    return ""


@contextlib.contextmanager
def user_namespace(ids: IdRange) -> Iterator[int]:
    """A descriptor of a user namespace whose ids 0, 1, … are those of a range.

    A process may not enter a new one while it has threads, so another does, for a moment.

    Raises:
        KernelRefusedError: the kernel refused, or user namespaces are switched off.
    """
    try:
        child = subprocess.Popen(
            ["unshare", "--user", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
    except OSError as error:
        raise KernelRefusedError(f"unshare cannot be run: {error}: install util-linux") from error
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(b"\n")
        if not child.stdout.read(1):  # it echoes once it is there
            reason = child.stderr.read().decode(errors="replace").strip()
            raise KernelRefusedError(
                f"no user namespace can be made ({reason}): see user.max_user_namespaces in "
                "sysctl(8), or use --userns host"
            )
        try:
            for name in ("uid_map", "gid_map"):
                with open(f"/proc/{child.pid}/{name}", "w") as file:
                    file.write(f"0 {ids.first} {ids.size}\n")
            namespace = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelRefusedError(
                f"ids {ids} cannot be mapped ({error}): choose others, or use --userns host"
            ) from error
    finally:
        for pipe in (child.stdin, child.stdout, child.stderr):
            pipe.close()
        child.kill()
        child.wait()
    try:
        yield namespace
    finally:
        os.close(namespace)
