"""``python -m tests.bench.limits``: what the kernel makes of a container's options, as a table.

For every kind of namespace and every limit of control groups: the kernel's own file, read back
while the container runs, and the effect on what runs there.  The test of the same name asserts
that each line holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from meshnet.lab.poll import wait_until
from meshnet.lab.topology import Lab
from tests.netns.containers import (
    FOREVER,
    busybox_layer,
    cgroup_of,
    client,
    detached,
    load_image,
    make_rootfs,
)
from tests.netns.mesh import meshnet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from meshnet.lab.host import LabHost

KINDS = ("pid", "mnt", "uts", "ipc", "net", "cgroup")
SHARED_KINDS = ("pid", "uts", "ipc", "net")
"""Those that ``host`` and ``container:NAME`` are for."""
_HOG = "while :; do :; done"
_TELL = """
echo pid $$; echo uts $(hostname); echo ipc $(cat /proc/sys/kernel/msgmax)
echo net $(ls /sys/class/net); echo cgroup $(grep -v :name= /proc/self/cgroup | head -n1)
echo mnt $(grep ' / / ' /proc/self/mountinfo | head -n1)
echo told; trap 'exit 9' TERM; sleep 9999 & wait
"""
_GATE = 'trap go=1 USR1; until [ -n "$go" ]; do sleep 0.05; done'
_QUEUE_BYTES = 4242
_PERIODS = 20
_CLOSE = 0.05
_WAIT_S = 30.0


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        what: the option, or the kind of namespace.
        file: where the kernel says it.
        value: what it says.
        effect: what was seen of it.
        holds: whether value and effect are what was asked for.
    """

    what: str
    file: str
    value: str
    effect: str
    holds: bool


def namespaces(host: LabHost, rootfs: Path) -> Iterator[Row]:
    """Each kind of its own, shared with the host, and with another container."""
    tell = ("--", "sh", "-c", _TELL)
    own = detached(host, rootfs, "--name", "own", *tell)
    # A setting that belongs to the IPC namespace, changed in that of the first container alone.
    script = f"echo {_QUEUE_BYTES} >/proc/sys/kernel/msgmax"
    host.run(["nsenter", f"--ipc=/proc/{own['pid']}/ns/ipc", "sh", "-c", script])
    made = {"own": own}
    for name, word in (("host", "host"), ("other", "container:own")):
        options = [f for kind in SHARED_KINDS for f in (f"--{kind}", word)]
        made[name] = detached(host, rootfs, "--name", name, *options, *tell)
    made["apart"] = detached(host, rootfs, "--name", "apart", *tell)
    links = {
        name: {kind: os.readlink(f"/proc/{d['pid']}/ns/{kind}") for kind in KINDS}
        for name, d in made.items()
    }
    hosts = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS}
    hosts["net"] = f"net:[{host.netns_path.stat().st_ino}]"
    told = {name: _told(host, name) for name in made}
    hostname, host_links = socket.gethostname(), host.run(["ls", "/sys/class/net"]).stdout.split()
    effects = {
        "pid": (
            f"first process is {told['own']['pid']}; with the host's it is {told['host']['pid']}",
            told["own"]["pid"] == "1"
            and told["host"]["pid"] == str(made["host"]["pid"])
            and told["other"]["pid"] != "1",
        ),
        "uts": (
            f"host name {told['own']['uts']}; with the host's {told['host']['uts']}",
            told["own"]["uts"] == told["other"]["uts"] == own["id"]
            and told["host"]["uts"] == hostname,
        ),
        "ipc": (
            f"kernel.msgmax {_QUEUE_BYTES} set in one is not seen in others",
            told["other"]["ipc"] == str(_QUEUE_BYTES)
            and str(_QUEUE_BYTES) not in (told["host"]["ipc"], told["apart"]["ipc"]),
        ),
        "net": (
            f"links {told['own']['net']}; with the host's {told['host']['net']}",
            told["own"]["net"] == told["other"]["net"] == "lo"
            and sorted(told["host"]["net"].split()) == sorted(host_links),
        ),
        "mnt": (
            "its root is an overlay mount",
            all("overlay" in t["mnt"] for t in told.values()),
        ),
        "cgroup": (
            f"sees its own group as {told['own']['cgroup']}",
            all(t["cgroup"].endswith(":/") for t in told.values()),
        ),
    }  # fmt: skip
    for kind in KINDS:
        mine, theirs = links["own"][kind], hosts[kind]
        holds = len({mine, theirs, links["apart"][kind]}) == 3
        if kind in SHARED_KINDS:
            holds &= links["host"][kind] == theirs and links["other"][kind] == mine
        else:
            holds &= len({mine, theirs, links["host"][kind], links["other"][kind]}) == 4
        effect, seen = effects[kind]
        value = f"{mine}, host {theirs}"
        yield Row(f"namespace {kind}", f"/proc/PID/ns/{kind}", value, effect, holds and seen)
    _remove(host, *made)


def limits(host: LabHost, rootfs: Path) -> Iterator[Row]:
    """Each limit of control groups; what holds it back is in the container, too."""
    for measure in (_cpus, _cpu_shares, _memory, _memory_reservation, _pids, _blkio):
        yield from measure(host, rootfs)


def _cpus(host: LabHost, rootfs: Path) -> Iterator[Row]:
    pid = _start(host, rootfs, "hog", "--cpus", "0.5", script=_HOG)
    file, value = _read(pid, "cpu", "cpu.cfs_quota_us", "cpu.max")
    with _preferred(cgroup_of(pid, "cpu").parent):
        rate = wait_until(_held_rate(pid), _WAIT_S, "the limit alone holds it back, for 2 s") or 0
    yield Row(
        "--cpus 0.5",
        file,
        value,
        f"a loop that never waits had {rate:.3f} CPU",
        value in ("50000", "50000 100000") and abs(rate / 0.5 - 1) < _CLOSE,
    )
    _remove(host, "hog")


def _cpu_shares(host: LabHost, rootfs: Path) -> Iterator[Row]:
    cpu = str(max(os.sched_getaffinity(0)))
    pids = [
        _start(
            host, rootfs, name, "--cpuset-cpus", cpu, "--cpu-shares", shares, script=_HOG
        )
        for name, shares in (("much", "1536"), ("little", "512"))
    ]  # fmt: skip
    file, value = _read(pids[1], "cpu", "cpu.shares", "cpu.weight")
    before = [_cpu_s(pid) for pid in pids]

    def used() -> list[float] | None:
        found = [_cpu_s(pid) - at for pid, at in zip(pids, before, strict=True)]
        return found if sum(found) > 1 else None

    with _preferred(cgroup_of(pids[0], "cpu").parent):
        much, little = wait_until(used, _WAIT_S, "both used a second of the CPU") or (0, 1)
    yield Row(
        "--cpu-shares 512",
        file,
        value,
        f"one with 1536 on the same CPU had {much / little:.2f} times its time",
        value in ("512", "20", "59") and 2.5 < much / little < 3.5,
    )
    file, value = _read(pids[1], "cpuset", "cpuset.cpus", "cpuset.cpus")
    status = Path(f"/proc/{pids[1]}/status").read_text()
    allowed = next(line.split()[1] for line in status.splitlines() if "Cpus_allowed_list" in line)
    yield Row(
        f"--cpuset-cpus {cpu}",
        file,
        value,
        f"the kernel runs it on CPU {allowed} only",
        value == allowed == cpu,
    )
    _remove(host, "much", "little")


def _memory(host: LabHost, rootfs: Path) -> Iterator[Row]:
    script = f"{_GATE}; head -c 8m /dev/zero | tail -c 8m >/dev/null; echo $?; exec tail /dev/zero"
    pid = _start(host, rootfs, "eater", "--memory", "32m", script=script)
    file, value = _read(pid, "memory", "memory.limit_in_bytes", "memory.max")
    status, printed = _let_go(host, "eater")
    yield Row(
        "--memory 32m",
        file,
        value,
        f"8 MiB fit; what takes all there is was killed: status {status}",
        value == str(32 << 20) and printed == ["0"] and status == 137,
    )
    _remove(host, "eater")


def _memory_reservation(host: LabHost, rootfs: Path) -> Iterator[Row]:
    pid = _start(host, rootfs, "soft", "--memory-reservation", "16m", script=FOREVER)
    file, value = _read(pid, "memory", "memory.soft_limit_in_bytes", "memory.low")
    yield Row(
        "--memory-reservation 16m",
        file,
        value,
        "none until the host itself is short of memory: not shown",
        value == str(16 << 20),
    )
    _remove(host, "soft")


def _pids(host: LabHost, rootfs: Path) -> Iterator[Row]:
    script = f"{_GATE}; for i in $(seq 20); do sleep 1000 & echo $i; done; wait"
    pid = _start(host, rootfs, "forks", "--pids-limit", "10", script=script)
    file, value = _read(pid, "pids", "pids.max", "pids.max")
    status, printed = _let_go(host, "forks")
    yield Row(
        "--pids-limit 10",
        file,
        value,
        f"a shell had {len(printed)} children, then fork failed: status {status}",
        value == "10" and len(printed) == 9 and status == 2,
    )
    _remove(host, "forks")


def _blkio(host: LabHost, rootfs: Path) -> Iterator[Row]:
    pid = _start(host, rootfs, "disk", "--blkio-weight", "300", script=FOREVER)
    group = cgroup_of(pid, "blkio")
    names = ("blkio.weight", "blkio.bfq.weight", "io.bfq.weight", "io.weight")
    name = next(name for name in names if (group / name).exists())
    value = (group / name).read_text().strip()
    yield Row(
        "--blkio-weight 300",
        name,
        value,
        "that of the disk's scheduler; only bfq has one: not shown",
        value.removeprefix("default ") in ("300", "2929"),
    )
    _remove(host, "disk")


def copy_on_write(host: LabHost, rootfs: Path, archive: Path) -> Iterator[Row]:
    """Two containers of one image: what each writes is its own, what they read is there once."""
    load_image(host, archive, "cow:1", busybox_layer(rootfs))
    script = f"echo $0 >/mine; cat /mine /bin/closed; echo $0 >>/bin/closed; echo told; {FOREVER}"
    names = ("one", "two")
    before = _tree_bytes(host.state_dir / "images")
    written = {}
    for name in names:
        client(host, "run", "-d", "--name", name, "cow:1", "sh", "-c", script, name)
        wait_until(lambda: "told" in client(host, "logs", name), _WAIT_S, "it wrote")  # noqa: B023
        upper = Path(json.loads(client(host, "inspect", name))["log"]).with_name("upper")
        files = {f.relative_to(upper) for f in upper.rglob("*") if f.is_file()}
        written[name] = sum((upper / f).stat().st_size for f in files)
    busybox = (rootfs / "bin/busybox").stat().st_size
    grown = _tree_bytes(host.state_dir / "images") - before
    logs = [client(host, "logs", name).splitlines() for name in names]
    yield Row(
        "overlayfs, two containers of one image",
        "STATE/containers/ID/upper",
        f"{written['one']} and {written['two']} bytes; the image's {before} are there once",
        "neither sees what the other wrote",
        grown == 0
        and before > busybox
        and all(size < 100 for size in written.values())
        and logs == [[name, "#!/bin/sh", "told"] for name in names],
    )
    _remove(host, *names)


def _start(host: LabHost, rootfs: Path, name: str, *options: str, script: str) -> int:
    made = detached(host, rootfs, "--name", name, *options, "--", "sh", "-c", script)
    return int(made["pid"])


def _remove(host: LabHost, *names: str) -> None:
    for name in names:
        client(host, "rm", "--force", name)


def _told(host: LabHost, name: str) -> dict[str, str]:
    def told() -> dict[str, str] | None:
        lines = client(host, "logs", name).splitlines()
        if lines[-1:] != ["told"]:
            return None
        return {word: text for word, _, text in (line.partition(" ") for line in lines)}

    return wait_until(told, _WAIT_S, f"container {name} told what it sees") or {}


def _let_go(host: LabHost, name: str) -> tuple[int, list[str]]:
    """Let a script go on at its gate; returns its status and what it printed."""
    pid = meshnet(host, "inspect", name)["pid"]

    def is_at_gate() -> bool:
        # Process 1 of a namespace gets no signal that it does not catch yet.
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        return caught is not None and bool(int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1)

    wait_until(is_at_gate, _WAIT_S, f"container {name} is at its gate")
    client(host, "kill", "--signal", "USR1", name)
    status = int(client(host, "wait", name))
    return status, client(host, "logs", name).split()


def _read(pid: int, controller: str, name: str, name_v2: str) -> tuple[str, str]:
    """A file of a cgroup, by its name in v1 or else in v2: the name and what it says."""
    group = cgroup_of(pid, controller)
    file = group / name if (group / name).exists() else group / name_v2
    return file.name, file.read_text().strip()


def _cpu_s(pid: int) -> float:
    file = cgroup_of(pid, "cpuacct") / "cpuacct.usage"
    if file.exists():
        return int(file.read_text()) / 1e9
    return _cpu_stat(pid)["usage_usec"] / 1e6


def _cpu_stat(pid: int) -> dict[str, int]:
    lines = (cgroup_of(pid, "cpu") / "cpu.stat").read_text().splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


@contextlib.contextmanager
def _preferred(group: Path) -> Iterator[None]:
    """Let a group have the CPU before the rest of the machine: what is busy besides counts not."""
    file, most = group / "cpu.shares", "262144"
    if not file.exists():
        file, most = group / "cpu.weight", "10000"
    before = file.read_text()
    file.write_text(most)
    try:
        yield
    finally:
        file.write_text(before)


def _held_rate(pid: int) -> Callable[[], float | None]:
    """How many CPUs' time a cgroup had, over periods in which the limit alone held it back.

    Where other programs took the CPU away from it, the limit is not what is seen: then the next
    periods are looked at.
    """

    def mark() -> tuple[float, float, dict[str, int]]:
        return time.monotonic(), _cpu_s(pid), _cpu_stat(pid)

    begin = mark()

    def look() -> float | None:
        nonlocal begin
        end = mark()
        periods, held = (end[2][k] - begin[2][k] for k in ("nr_periods", "nr_throttled"))
        if periods < _PERIODS:
            return None
        rate = (end[1] - begin[1]) / (end[0] - begin[0])
        begin = end
        return rate if held >= periods - 1 else None

    return look


def _tree_bytes(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())


def render(rows: Iterable[Row]) -> str:
    """As a table of Markdown."""
    lines = [
        "| what | the kernel's file | its value | effect | |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.what} | `{r.file}` | {r.value} | {r.effect} | {'holds' if r.holds else 'MISSED'} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Print the table; the exit status says whether all of it holds."""
    with tempfile.TemporaryDirectory() as name, Lab(f"bench{os.getpid()}", hosts=1) as lab:
        directory, host = Path(name), lab.hosts[0]
        (directory / "rootfs").mkdir()
        rootfs = make_rootfs(directory / "rootfs")
        rows = [
            *namespaces(host, rootfs),
            *limits(host, rootfs),
            *copy_on_write(host, rootfs, directory / "image.tar"),
        ]
    print(render(rows))
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
