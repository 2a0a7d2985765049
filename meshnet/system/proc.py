"""What /proc says of processes, mounts and this boot of the machine (proc(5)).

May import only the standard library and `meshnet.errors`: the userspace VTEP and ``meshnet lab
exec`` import it.
"""

from __future__ import annotations

import contextlib
import os
import re
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from meshnet.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stat(NamedTuple):
    """What we need of ``/proc/PID/stat``.

    Attributes:
        state: one letter; Z and X: it has ended.
        start_ticks: when it started, in clock ticks since boot (field 22).  A pid is used again
            and again; with this it names one process of this boot.
    """

    state: str
    parent_pid: int
    start_ticks: int


class Mount(NamedTuple):
    """A mount of the calling process's mount namespace.

    Attributes:
        id: as in ``/proc/self/fdinfo``.
        root: what of the file system is mounted.
        point: where.
        kind: type of the file system, such as ``ext4``.
    """

    id: int
    root: bytes
    point: str
    kind: str


def read_stat(pid: int) -> Stat | None:
    """What a process is; None: there is none with that pid."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything, so fields count from its end.
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Stat(fields[0].decode(), int(fields[1]), int(fields[19]))


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot.

    Raises:
        NotFoundError: there is no such process.
    """
    stat = read_stat(pid)
    if stat is None:
        raise NotFoundError(f"process {pid} does not exist: give the pid of a running process")
    return stat.start_ticks


@cache
def boot_id() -> str:
    """What tells this boot of the machine from all others (random(4)); "" where Linux hides it."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""


def mounts() -> Iterator[Mount]:
    """All mounts, in the order in which they were made."""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            number, _, _, root, point, _ = line.split(b" ", 5)
            # What follows " - " stands after a varying number of optional fields.
            kind = line.rpartition(b" - ")[2].split(b" ", 1)[0]
            yield Mount(
                int(number), _unescaped(root), os.fsdecode(_unescaped(point)), kind.decode()
            )


def _unescaped(path: bytes) -> bytes:
    """proc(5) writes blanks, line feeds and backslashes as three octal digits."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes((int(found[1], 8),)), path)
