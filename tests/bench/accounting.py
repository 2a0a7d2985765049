"""CPU time of a measurement, told apart from what else the machine does.

What a packet costs is spent in the programs at both ends, in the tunnel's processes, and in the
kernel's own threads, which go on where the others left (``ksoftirqd``).  An interrupt's work is
booked on whatever it interrupts: where other programs run, a little of it is lost to them.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_KTHREADD = "2"
_NETWORK_THREADS = "ksoftirqd/"


class Cpu(NamedTuple):
    """CPU seconds at one moment.

    Attributes:
        at: when, in seconds.
        own: of the named processes, of our children that have ended, and of the kernel's threads.
        machine: of everything.
    """

    at: float
    own: float
    machine: float


class Used(NamedTuple):
    """CPU between two moments.

    Attributes:
        own_s: the measurement's seconds.
        others: how many CPUs everything else kept busy, 1.0 is one.
    """

    own_s: float
    others: float


class Accounts:
    """Reads CPU times, again and again for the same processes."""

    def __init__(self, pids: Iterable[int]) -> None:
        """Take the processes at both ends and the tunnel's; children that are waited for count."""
        self._pids = [*pids, *_kernel_threads()]

    def read(self) -> Cpu:
        """The times now."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = sum(_process_s(pid) for pid in self._pids) + children.ru_utime + children.ru_stime
        return Cpu(time.monotonic(), own, _machine_s())

    def since(self, before: Cpu) -> Used:
        """What was used since an earlier reading."""
        now = self.read()
        own_s = now.own - before.own
        # Ticks of 10 ms, booked at different moments: a little less than nothing is nothing.
        others_s = max(0.0, now.machine - before.machine - own_s)
        return Used(own_s, others_s / (now.at - before.at))


def _kernel_threads() -> list[int]:
    found = []
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            name, fields = _stat(int(entry.name))
            if name.startswith(_NETWORK_THREADS) and fields[1] == _KTHREADD:
                found.append(int(entry.name))
    return found


def _process_s(pid: int) -> float:
    _, fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS  # utime, stime: proc(5)


def _stat(pid: int) -> tuple[str, list[str]]:
    """A process's name and the fields after it; zeros if it is gone."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "", ["0"] * 13
    head, _, tail = text.rpartition(")")
    return head.partition("(")[2], tail.split()


def _machine_s() -> float:
    """All CPUs' time that was neither idle nor waiting nor stolen by the hypervisor."""
    fields = (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq = (int(field) for field in fields[:7])
    return (user + nice + system + irq + softirq) / _TICKS
