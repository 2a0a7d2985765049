"""What a container uses, read from its cgroup's files (v1 and v2) and its links' counters."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from meshnet.errors import KernelRefusedError

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Usage:
    """Counters since the container's start; times in seconds.

    Attributes:
        memory_limit_bytes: None: no limit.
        throttled_s: how long it was held back by its CPU limit, in `throttled` periods.
    """

    cpu_s: float
    throttled: int
    throttled_s: float
    memory_bytes: int
    memory_limit_bytes: int | None
    pids: int
    rx_bytes: int
    tx_bytes: int


def read_usage(pid: int) -> Usage:
    """Usage of the container whose first process this is; what cannot be read counts as 0."""
    paths = _paths(pid)
    rx, tx = _traffic(pid)
    if "" in paths and (paths[""] / "memory.current").exists():
        unified = paths[""]
        cpu = _table(unified / "cpu.stat")
        return Usage(
            cpu.get("usage_usec", 0) / 1e6,
            cpu.get("nr_throttled", 0),
            cpu.get("throttled_usec", 0) / 1e6,
            _number(unified / "memory.current"),
            _number(unified / "memory.max") or None,
            _number(unified / "pids.current"),
            rx,
            tx,
        )
    nowhere = Path("/nonexistent")
    cpu = _table(paths.get("cpu", nowhere) / "cpu.stat")
    memory = paths.get("memory", nowhere)
    limit = _number(memory / "memory.limit_in_bytes")
    return Usage(
        _number(paths.get("cpuacct", nowhere) / "cpuacct.usage") / 1e9,
        cpu.get("nr_throttled", 0),
        cpu.get("throttled_time", 0) / 1e9,
        _number(memory / "memory.usage_in_bytes"),
        limit if limit < 1 << 60 else None,
        _number(paths.get("pids", nowhere) / "pids.current"),
        rx,
        tx,
    )


def accounts_swap() -> bool:
    """Whether the kernel can limit a container's swap: ``memory.memsw.*``, of v2 ``memory.swap.*``.

    Some kernels do so only with ``swapaccount=1`` on their command line.
    """
    if (_ROOT / "memory" / "memory.memsw.limit_in_bytes").exists():
        return True
    # The root of v2 has no such file; its children have.
    return any(True for _ in _ROOT.glob("*/memory.swap.max"))


def has_unified_io() -> bool:
    """Whether disks are shared by cgroups v2, not by the v1 controller ``blkio``."""
    return not (_ROOT / "blkio").is_dir()


def set_blkio_weight(pid: int, weight: int) -> None:
    """Set the share of disks of a process's cgroup v1.

    Not left to the OCI runtime: crun knows only the scheduler cfq, which Linux 5.0 removed.

    Raises:
        KernelRefusedError: no scheduler of this kernel has weights.
    """
    cgroup = _paths(pid).get("blkio", _ROOT / "blkio")
    for name in ("blkio.bfq.weight", "blkio.weight"):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            # Not created where the kernel has none.
            with open(os.open(cgroup / name, os.O_WRONLY | os.O_CLOEXEC), "w") as file:
                file.write(str(weight))
            return
    raise KernelRefusedError(
        f"--blkio-weight {weight} cannot be set: no disk scheduler of this kernel has weights (bfq "
        "has, if it is built in); leave the option out"
    )


def _paths(pid: int) -> dict[str, Path]:
    """Directories of a process's cgroup, by controller; that of v2 under the empty name."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                found[controller] = _ROOT / controllers / path.lstrip("/")
    return found


def _number(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return 0


def _table(path: Path) -> dict[str, int]:
    with contextlib.suppress(OSError):
        rows = (line.split() for line in path.read_text().splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2}
    return {}


def _traffic(pid: int) -> tuple[int, int]:
    rx = tx = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]:
            name, _, counters = line.partition(":")
            if name.strip() != "lo":
                fields = counters.split()
                rx, tx = rx + int(fields[0]), tx + int(fields[8])
    return rx, tx
