"""An agent that has too few descriptors, or too little memory."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from meshnet.unix_http import HttpConnection
from tests.netns.faults.agent_faults import take_memory
from tests.netns.faults.invariants import wait_whole
from tests.netns.faults.mesh import AGENT_ARGS, make_mesh
from tests.netns.mesh import lossless

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
_MOUNT = Path("/sys/fs/cgroup")
_MOST_BUSY = 0.8
"""Part of the time that an agent without descriptors may run or want to; one that spins always
does."""


def busy_s(pid: int) -> float:
    """How long a process's main thread has run or waited for a CPU: its load, however much of it
    the machine could carry (``fs/proc/base.c``, schedstat)."""
    ran_ns, waited_ns, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
    return (ran_ns + waited_ns) / 1e9


@contextlib.contextmanager
def memory_cgroup(name: str, limit_bytes: int) -> Iterator[Path]:
    """A cgroup of the memory controller, of either version, beside our own processes'."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, own = line.split(":", 2)
        if "memory" in controllers.split(","):
            parent, file = _MOUNT / "memory" / own.lstrip("/"), "memory.limit_in_bytes"
            break
        if number == "0" and (_MOUNT / "cgroup.controllers").exists():
            parent, file = _MOUNT, "memory.max"
            (parent / "cgroup.subtree_control").write_text("+memory")
            break
    else:
        raise AssertionError("no memory controller")
    group = parent / name
    group.mkdir()
    try:
        (group / file).write_text(str(limit_bytes))
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), 10, "the cgroup is empty")
        group.rmdir()


def test_an_agent_without_descriptors_or_memory(make_lab: MakeLab, lab_name: str) -> None:
    mesh = make_mesh(make_lab(2, agent_args=AGENT_ARGS))
    wait_whole(mesh, 15)
    h1 = mesh.lab.host("h1")
    red1, red2, *_ = [m for m in mesh.members if m.network == "red"]
    address = red2.document["address"].partition("/")[0]
    pid = h1.agent_pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with lossless(red1.container, address):
        # Not one more descriptor: no connection, no nft, no file.
        used = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, hard))
        began_s, busy_before_s = time.monotonic(), busy_s(pid)
        clients = [HttpConnection(str(h1.socket_path), 20) for _ in range(20)]
        for connection in clients:
            connection.request("GET", "/healthz")
        h1.run(["ip", "link", "set", "mnb4097", "mtu", "1400"])  # work that it cannot do
        wait_until(lambda: time.monotonic() > began_s + 1.5, 10, "some time passed")
        busy = (busy_s(pid) - busy_before_s) / (time.monotonic() - began_s)
        print(f"without descriptors the agent was busy for {busy:.0%} of the time")
        assert busy < _MOST_BUSY
        for connection in clients:
            # It is served with a descriptor that came free, or told that there is none.
            assert connection.answer().status in (200, 500)
            connection.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        wait_whole(mesh, 40)
        assert h1.agent_pid == pid
        # Little but what it has: requests that do not end take it, and the kernel kills it.
        with memory_cgroup(f"meshnet-test-{lab_name}", 1 << 20) as group:
            (group / "cgroup.procs").write_text(str(pid))
            take_memory(h1)
        assert h1.stop_agent() is None
        h1.start_agent()
        wait_whole(mesh, 15)
