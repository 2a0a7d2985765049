"""Processes: when one started, and which boot that was in, to tell it from all others for ever."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path

from meshnet.errors import NotFoundError


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5), field 22 of stat).

    Raises:
        NotFoundError: there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything, so fields count from its end.
            return int(file.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NotFoundError(
            f"process {pid} does not exist: give the pid of a running process"
        ) from error


@cache
def boot_id() -> str:
    """Of the running kernel: another after every boot (random(4)); "" where Linux hides it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
