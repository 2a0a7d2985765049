"""``meshnet run`` beside ``docker run`` and ``podman run``, in the same rounds.

::

    h1, h2   hosts of meshnet, a network of mode vxlan     meshnet run --net prod
    docker   dockerd, its default network (a bridge)       docker run
    podman   its default network (a bridge)                podman run

One image, a tree with busybox alone, imported into all three; the same OCI runtime below; limits,
capabilities and the filter of system calls are each one's defaults.  What counts is the whole
process of the client as a user starts it.  A fresh container each time, on a network:

- ``run --rm … true``: until the command's status is there, and the container is gone;
- ``run --detach … sleep``: until it runs;
- ``exec … true``: in that one.

Beside them the bare interpreter: no client in Python can be faster.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.lab.topology import Lab
from tests.bench.common import (
    Measure,
    at_most,
    client_environment,
    median_of,
    median_ratio,
    percentile,
)
from tests.bench.docker import LIMITS, open_docker
from tests.bench.native import NotAvailableError, find
from tests.bench.podman import open_podman
from tests.images import Layout
from tests.netns.mesh import create_network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.lab.host import LabHost
    from tests.bench.common import Run

ROUNDS = 20
_NETWORK, _IMAGE = "prod", "busybox"
_APPLETS = ("sh", "true", "sleep")
_KINDS = ("run --rm", "run --detach", "exec")
_AIM = 0.25
_TIMEOUT_S = 60.0
_NOTHING = "the interpreter alone"


@dataclass(frozen=True, slots=True)
class Engine:
    """What runs containers, and how its client is called.

    Attributes:
        options: of ``run``.
        remove: words that remove a container that runs, at once.
    """

    name: str
    client: Sequence[str]
    options: Sequence[str]
    env: dict[str, str]
    remove: Sequence[str] = ("rm", "--force")

    def call(self, *words: str) -> float:
        """Run the client; returns milliseconds from its start to its end.

        Raises:
            RuntimeError: it failed; the text has what it printed.
        """
        return _time_ms([*self.client, *words], self.env)


def run(run: Run) -> list[Measure]:
    """See the module."""
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    nothing: list[float] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mnbench-")))
        lab = stack.enter_context(Lab(f"bench{os.getpid()}", hosts=2))
        run.say("one image into three engines")
        engines = _open_engines(lab, directory, stack)
        for engine in engines:  # the first container of each finds out what it has
            _round(engine, "warm")
        rounds = run.rounds or ROUNDS
        for number in range(rounds):
            for engine in engines[:: (-1) ** number]:
                for kind, spent_ms in _round(engine, f"c{number}").items():
                    spent[kind, engine.name].append(spent_ms)
            nothing.append(_time_ms([sys.executable, "-c", "pass"], dict(os.environ)))
            values = ", ".join(f"{e.name} {spent['run --rm', e.name][-1]:.0f}" for e in engines)
            run.say(f"round {number + 1} of {rounds}: run --rm took {values} ms")
    ours, *peers = (engine.name for engine in engines)
    return [
        *(
            median_ratio(
                f"{kind}: {ours} by {peer}",
                spent[kind, ours],
                spent[kind, peer],
                at_most(_AIM) if (kind, peer) == ("run --rm", "docker") else None,
            )
            for kind, peer in itertools.product(_KINDS, peers)
        ),
        *(
            measure
            for kind, engine in itertools.product(_KINDS, (ours, *peers))
            for measure in (
                median_of(f"{kind}: {engine}", spent[kind, engine], "ms"),
                Measure(f"{kind}: {engine}, p90", percentile(spent[kind, engine], 90), "ms"),
            )
        ),
        median_of(_NOTHING, nothing, "ms"),
    ]


def _round(engine: Engine, name: str) -> dict[str, float]:
    """One of each kind."""
    place = [*engine.options, _IMAGE]
    spent = {
        "run --rm": engine.call("run", "--rm", *place, "/bin/true"),
        "run --detach": engine.call(
            "run", "--detach", "--name", name, *place, "/bin/sleep", "1000"
        ),
        "exec": engine.call("exec", name, "/bin/true"),
    }
    engine.call(*engine.remove, name)
    return spent


def _open_engines(lab: Lab, directory: Path, stack: ExitStack) -> list[Engine]:
    tree = _make_tree(directory)
    create_network(lab, _NETWORK, "--subnet", "10.42.0.0/16", "--mode", "vxlan")
    docker_host, podman_host = (lab.add_host(name, agent=False) for name in ("docker", "podman"))
    engines = [_open_ours(lab.hosts[0], directory, tree)]
    docker = stack.enter_context(open_docker(docker_host, directory / "docker", storage="overlay2"))
    docker.call("import", str(tree), _IMAGE)
    engines.append(Engine("docker", docker.argv, LIMITS, dict(os.environ)))
    podman = stack.enter_context(open_podman(podman_host, directory / "podman"))
    podman.call("import", str(tree), _IMAGE)
    options = (*LIMITS, *podman.run_options)
    remove = ("rm", "--force", "--time", "0")  # else it waits for SIGTERM to be obeyed
    engines.append(Engine("podman", podman.argv, options, dict(os.environ), remove))
    return engines


def _open_ours(host: LabHost, directory: Path, tree: Path) -> Engine:
    script = Path(sys.executable).with_name("meshnet")
    if not script.exists():
        raise NotAvailableError(f"{script} is not there: install the project")
    argv = (sys.executable, str(script))
    engine = Engine("meshnet", argv, ("--net", _NETWORK), client_environment(host))
    layout = directory / "layout.tar"
    layout.write_bytes(Layout().add("", tree.read_bytes()).tar())
    engine.call("image", "load", "--name", _IMAGE, str(layout))
    return engine


def _make_tree(directory: Path) -> Path:
    """A tar of a file system with busybox alone."""
    root, archive = directory / "tree", directory / "tree.tar"
    (root / "bin").mkdir(parents=True)
    shutil.copy(find("busybox"), root / "bin" / "busybox")
    for name in _APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    with tarfile.open(archive, "w") as tar:
        tar.add(root, arcname=".")
    return archive


def _time_ms(argv: Sequence[str], env: dict[str, str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(
        argv,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    spent_ms = (time.perf_counter() - started) * 1000
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: status {done.returncode}: {done.stderr.strip()}")
    return spent_ms
