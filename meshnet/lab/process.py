"""Processes of the lab: identified without doubt, found by namespace, ended through a pidfd.

The kernel reuses process ids.  With its start time (field 22 of ``/proc/PID/stat``, proc(5)) an id
names one process for ever, even to another program hours later.  Signals go through a pidfd that
was opened *before* the start time was compared, so that they cannot reach another process.
Zombies count as gone: whoever started them reaps them.

May import only the standard library, `meshnet.errors` and `meshnet.system.proc`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError
from meshnet.system.proc import Stat, read_stat

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

_PROC = Path("/proc")
_DEAD_STATES = "ZX"
_TCP_LISTEN = "0A"  # TCP_LISTEN of linux/tcp_states.h, as in /proc/net/tcp
_KILL_DEADLINE_S = 10.0

NetnsId = tuple[int, int]
"""Device and inode number of a network namespace: equal for two processes if they share it."""


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """One process for ever: its id and when it started.

    Attributes:
        pid: process id in our PID namespace.
        start_time: clock ticks after boot.
    """

    pid: int
    start_time: int

    def is_alive(self) -> bool:
        """Tell whether it still runs (a zombie does not)."""
        stat = _read_living(self.pid)
        return stat is not None and stat.start_ticks == self.start_time


def identify(pid: int) -> ProcessRef:
    """Name the running process, or our own unreaped child, that has `pid` now.

    Raises:
        ProcessLookupError: the process does not exist.
    """
    # A child that has ended already is a zombie until we reap it, so its pid is still its own.
    stat = read_stat(pid)
    if stat is None:
        raise ProcessLookupError(f"process {pid} does not exist")
    return ProcessRef(pid, stat.start_ticks)


def netns_id(path: Path) -> NetnsId | None:
    """Identify the network namespace behind `path` (``/run/netns/x``, ``/proc/1/ns/net``).

    Returns:
        None if there is nothing at `path` or its process is gone.  For a file that is not a
        namespace (a half-made one) an id that no process has.
    """
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_dev, stat.st_ino)


def process_netns_id(pid: int) -> NetnsId | None:
    """Identify the network namespace of a process; None if it is gone (or a zombie)."""
    return netns_id(_PROC / str(pid) / "ns" / "net")


def own_netns_id() -> NetnsId:
    """Identify the network namespace of the calling thread."""
    stat = (_PROC / "thread-self" / "ns" / "net").stat()
    return (stat.st_dev, stat.st_ino)


def is_listening(pid: int, port: int) -> bool:
    """Tell whether a TCP socket listens on `port` in the network namespace of a process."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (_PROC / str(pid) / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        # proc(5): the local address ends with the port in hexadecimal; the fourth field is the
        # state.
        rows = [line.split() for line in lines]
        if any(row[1].endswith(f":{port:04X}") and row[3] == _TCP_LISTEN for row in rows):
            return True
    return False


def find_in_namespaces(namespaces: Collection[NetnsId]) -> set[ProcessRef]:
    """Find every running process whose network namespace is one of `namespaces`, except us.

    Our own namespace and that of process 1 are left out, whatever `namespaces` says: the caller is
    about to kill what it finds.
    """
    wanted = set(namespaces) - {own_netns_id(), process_netns_id(1)}
    found = set()
    for pid in _pids():
        if pid == os.getpid():
            continue
        # Read the start time first: if another process gets the pid before the namespace is read,
        # pid and start time name a process that is gone, and no signal reaches the new one.
        stat = _read_living(pid)
        if stat is not None and process_netns_id(pid) in wanted:
            found.add(ProcessRef(pid, stat.start_ticks))
    return found


def with_descendants(refs: Iterable[ProcessRef]) -> set[ProcessRef]:
    """Return those of `refs` that run, with their children, and so on; never ourselves.

    A container that an agent or a shell on a lab host started lives in another network namespace:
    only its parents show that it belongs to the lab.
    """
    stats = {pid: stat for pid in _pids() if (stat := _read_living(pid)) is not None}
    children: dict[int, list[int]] = {}
    for pid, stat in stats.items():
        children.setdefault(stat.parent_pid, []).append(pid)
    pending = [
        ref.pid for ref in refs if ref.pid in stats and stats[ref.pid].start_ticks == ref.start_time
    ]
    family: set[int] = set()
    while pending:
        pid = pending.pop()
        if pid not in family and pid != os.getpid():
            family.add(pid)
            pending.extend(children.get(pid, []))
    return {ProcessRef(pid, stats[pid].start_ticks) for pid in family}


def end_processes(refs: Iterable[ProcessRef], *, deadline_s: float) -> None:
    """End processes: SIGTERM to all, and SIGKILL to those that are left after `deadline_s`.

    A stopped process is continued, so that it can act on SIGTERM.  Processes that are gone already
    are skipped.  On return none runs; children of ours are zombies until they are reaped.

    Args:
        refs: the processes; nothing else is ever signalled.
        deadline_s: seconds that they get to end in order, all together; 0 kills at once.

    Raises:
        KernelRefusedError: some survived SIGKILL (they hang in the kernel).
    """
    with contextlib.ExitStack() as stack:
        pidfds: dict[int, ProcessRef] = {}
        for ref in refs:
            pidfd = _open_pidfd(ref)
            if pidfd is not None:
                stack.callback(os.close, pidfd)
                pidfds[pidfd] = ref
        left = set(pidfds)
        if deadline_s > 0:
            _signal(left, signal.SIGTERM)
            _signal(left, signal.SIGCONT)
            left = _wait(left, deadline_s)
        _signal(left, signal.SIGKILL)
        left = _wait(left, _KILL_DEADLINE_S)
        if left:
            pids = ", ".join(sorted(str(pidfds[pidfd].pid) for pidfd in left))
            raise KernelRefusedError(
                f"process {pids} survived SIGKILL: see /proc/PID/wchan for where it hangs"
            )


def _open_pidfd(ref: ProcessRef) -> int | None:
    try:
        pidfd = os.pidfd_open(ref.pid)
    except ProcessLookupError:
        return None
    if ref.is_alive():
        return pidfd
    os.close(pidfd)
    return None


def _signal(pidfds: Iterable[int], number: signal.Signals) -> None:
    for pidfd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)


def _wait(pidfds: Iterable[int], deadline_s: float) -> set[int]:
    """Wait until all have ended; return those that have not within `deadline_s`."""
    left = set(pidfds)
    # A pidfd becomes readable when its process ends (pidfd_open(2)), whoever its parent is.
    poller = select.poll()
    for pidfd in left:
        poller.register(pidfd, select.POLLIN)
    deadline = time.monotonic() + deadline_s
    while left:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            break
        for pidfd, _ in poller.poll(remaining_s * 1000):
            poller.unregister(pidfd)
            left.discard(pidfd)
    return left


def _pids() -> Iterator[int]:
    for name in os.listdir(_PROC):
        if name.isdigit():
            yield int(name)


def _read_living(pid: int) -> Stat | None:
    stat = read_stat(pid)
    return stat if stat is not None and stat.state not in _DEAD_STATES else None
