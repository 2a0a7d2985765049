"""``meshnet attach``: how long the agent takes, and the whole process.

One host with one network; every attach is to a fresh container, which is detached and ended after.
The process is the installed console script under this interpreter.  Beside it, in turn, what any
Python program costs: the interpreter with nothing to do, and with the modules of sockets, JSON and
argument parsing that the client cannot do without.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.lab.topology import Lab
from tests.bench.common import Measure, at_most, client_environment, percentile
from tests.netns.mesh import create_network

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from meshnet.lab.host import LabHost
    from tests.bench.common import Run

ATTACHES = 200
_EVERY = 50
_NETWORK = "prod"
_LIBRARIES = "import argparse, json, socket"


def run(run: Run) -> list[Measure]:
    """See the module."""
    agent_ms: list[float] = []
    process_ms: list[float] = []
    detach_ms: list[float] = []
    nothing_ms: list[float] = []
    libraries_ms: list[float] = []
    count = run.rounds * _EVERY if run.rounds else ATTACHES
    with _host() as host:
        meshnet = _Client(host)
        for number in range(1, count + 1):
            container = host.spawn_container()
            target = [str(container.pid), "--net", _NETWORK, "--json"]
            spent_ms, output = meshnet.run(["attach", *target])
            process_ms.append(spent_ms)
            agent_ms.append(float(json.loads(output)["agent_ms"]))
            detach_ms.append(meshnet.run(["detach", *target])[0])
            container.end()
            if number % 10 == 0:
                nothing_ms.append(_time_ms([sys.executable, "-c", "pass"])[0])
                libraries_ms.append(_time_ms([sys.executable, "-c", _LIBRARIES])[0])
            if number % _EVERY == 0:
                run.say(f"{number} of {count} attached; the last took {spent_ms:.0f} ms")
    return [
        *_p50_p99("agent's own time", agent_ms, 5),
        *_p50_p99("meshnet attach, process", process_ms, 80),
        *_p50_p99("meshnet detach, process", detach_ms, None),
        Measure("python -c pass, p50", percentile(nothing_ms, 50), "ms"),
        Measure("python with the libraries, p50", percentile(libraries_ms, 50), "ms"),
    ]


def _p50_p99(name: str, values: Sequence[float], limit_ms: float | None) -> list[Measure]:
    bound = at_most(limit_ms) if limit_ms is not None else None
    return [
        Measure(f"{name}, p50", percentile(values, 50), "ms", bound, tuple(values)),
        Measure(f"{name}, p99", percentile(values, 99), "ms"),
    ]


class _Client:
    """Runs the console script against a host's agent, without entering the host's namespace."""

    def __init__(self, host: LabHost) -> None:
        self._argv = [sys.executable, str(Path(sys.executable).with_name("meshnet"))]
        self._env = client_environment(host)

    def run(self, arguments: Sequence[str]) -> tuple[float, str]:
        """Run the client; return milliseconds from spawn to exit, and its output."""
        return _time_ms([*self._argv, *arguments], self._env)


def _time_ms(argv: Sequence[str], env: dict[str, str] | None = None) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
    )
    return (time.perf_counter() - started) * 1000, done.stdout


@contextlib.contextmanager
def _host() -> Iterator[LabHost]:
    lab = Lab(f"bench{os.getpid()}", hosts=1)
    try:
        lab.up()
        create_network(lab, _NETWORK, "--subnet", "10.42.0.0/16", "--mode", "vxlan")
        yield lab.hosts[0]
    finally:
        lab.down()
