"""Faults of the wall clock: nothing waits by it, so they must have no effect."""

from __future__ import annotations

import contextlib
import os
import re
import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from tests.netns.faults.fault import Injected
from tests.netns.faults.mesh import TTL_S
from tests.netns.faults.programs import compile_library
from tests.netns.mesh import meshnet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from random import Random

    from meshnet.lab.host import LabHost
    from tests.netns.faults.mesh import FaultMesh

_JUMPS_S = (-315_360_000, -3_600, -TTL_S, TTL_S, 3_600, 315_360_000)
"""Ten years, an hour, and what a time server corrects."""
_FREED = re.compile(r"^(\S+) .*endpoint freed, its process ended", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ClockJump:
    """The wall clock of a host's agent jumps, there and back."""

    name: str = "clock jump"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Set the clock under an agent that was started with one that can be set (``clock.c``)."""
        host = mesh.host_to_end(rng)
        file = host.state_dir.with_name("clock")
        _set(file, 0)
        host.stop_agent()
        with _preloaded(file):
            host.start_agent()
        jump_s = rng.choice(_JUMPS_S)
        _set(file, jump_s)
        _assert_that_it_works(host, rng.choice(sorted({m.network for m in mesh.members})), jump_s)
        return Injected(
            f"clock of {host.name} jumped by {jump_s} s",
            partial(_set, file, 0),
            rng.uniform(0.5, 2) * TTL_S,
        )


def _set(file: Path, jump_s: int) -> None:
    """In place: the file is mapped."""
    with open(file, "r+b" if file.exists() else "wb") as opened:
        opened.write(struct.pack("q", jump_s * 10**9))


@contextlib.contextmanager
def _preloaded(file: Path) -> Iterator[None]:
    """Give processes that are started in the block their own clock."""
    more = {"LD_PRELOAD": str(compile_library("clock")), "FAULT_CLOCK": str(file)}
    os.environ |= more
    try:
        yield
    finally:
        for name in more:
            del os.environ[name]


def _assert_that_it_works(host: LabHost, network: str, jump_s: int) -> None:
    """An endpoint comes and goes, and the log says that it is another time."""
    before = len(host.log_path.read_text())
    container = host.spawn_container()
    meshnet(host, "attach", container.pid, "--net", network)
    container.end()

    def freed() -> list[str]:
        return _FREED.findall(host.log_path.read_text()[before:])

    wait_until(lambda: bool(freed()), 10, "the endpoint is freed")
    shown = datetime.fromisoformat(freed()[0])
    away = shown - datetime.now(UTC) - timedelta(seconds=jump_s)
    assert abs(away) < timedelta(seconds=TTL_S / 2), f"{shown} after a jump by {jump_s} s"
