"""A fault mesh with traffic across it, one step of faults on it, and what is kept of a failure."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import pytest

from meshnet.errors import MeshnetError
from meshnet.lab.poll import wait_until
from meshnet.lab.topology import Lab
from tests.netns.faults.evidence import Cut, Verdict
from tests.netns.faults.invariants import wait_whole
from tests.netns.faults.mesh import AGENT_ARGS, make_mesh
from tests.netns.faults.traffic import PERIOD_US, Traffic

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from random import Random
    from types import TracebackType
    from typing import Self

    from tests.netns.faults.fault import Fault, Injected

FLOWING_S = 10.0
"""How long after the mesh is whole datagrams and streams may take to arrive on every path."""
WHATEVER = (Exception, pytest.fail.Exception)
"""What a step may raise: faults use pytest's assertions, whose errors are no `Exception`."""
_counter = itertools.count(1)
_DUMPS = (
    "ip -d address",
    "ip -d route show table all",
    "ip -6 -d route show table all",
    "ip nexthop",
    "ip -s neighbour",
    "bridge -d fdb",
    "nft list ruleset",
    "ss -tunap",
    "meshnet status --json",
    "meshnet hosts --json",
    "meshnet endpoint ls --json",
)


@dataclass(slots=True)
class Step:
    """What became of one step.

    Attributes:
        faults: their names.
        what: what was done, to whom.
        whole_s: seconds from the beginning of healing until every invariant held.
        verdict: of the traffic from the step's beginning to its end.
        broken: what must not be, as sentences.
    """

    faults: list[str]
    what: list[str] = field(default_factory=list)
    whole_s: float = 0.0
    verdict: Verdict = field(default_factory=Verdict)
    broken: list[str] = field(default_factory=list)


def announce(line: str) -> None:
    """Print a line, at once."""
    print(line, flush=True)


def end_in_order() -> None:
    """Have SIGTERM end this program as an exception, so that its lab is taken down."""

    def end(number: int, _frame: object) -> None:
        # A second one, as a whole process group gets, must not end the taking down.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def new_lab(hosts: int = 3, etcd_members: int = 1) -> Lab:
    """A lab for a stage, not up."""
    return Lab(
        f"f{os.getpid()}x{next(_counter)}",
        hosts=hosts,
        agent_args=AGENT_ARGS,
        etcd_members=etcd_members,
    )


def _ends(logs: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Which file each log is, and how long."""
    found = {}
    for log in logs:
        status = log.stat()
        found[log] = status.st_ino, status.st_size
    return found


class Stage:
    """A mesh that faults happen to, up while this is entered.

    Args:
        lab: one that is not up.

    Attributes:
        mesh: the mesh.
        traffic: what runs across it.
    """

    def __init__(self, lab: Lab, period_us: int = PERIOD_US) -> None:
        self.lab = lab
        self._period_us = period_us

    def __enter__(self) -> Self:
        self.lab.up()
        try:
            self.mesh = make_mesh(self.lab)
            self.traffic = Traffic(self.mesh, self._period_us)
            self.traffic.follow()
            wait_whole(self.mesh, FLOWING_S)
            self.settle()
        except BaseException:
            self.lab.down()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.traffic.stop()
        finally:
            self.lab.down()

    def settle(self) -> None:
        """Wait until traffic arrives on all paths.

        Raises:
            TimeoutError: it does not.
        """
        self.traffic.follow()
        self.traffic.wait_flowing(FLOWING_S)
        self.traffic.wait_streams(FLOWING_S)

    def step(self, faults: Sequence[Fault], rng: Random) -> Step:
        """Have faults happen at once, end them, and judge what was seen meanwhile.

        The mesh is whole after it, unless something was broken.
        """
        step = Step([fault.name for fault in faults])
        cuts: list[Cut] = []
        try:
            self._run(step, faults, rng, cuts)
        except WHATEVER as exc:
            # Whatever it is, the sequence ends, and its evidence is kept.
            step.broken += [f"{type(exc).__name__}: {exc}", traceback.format_exc()]
        now_ns = time.monotonic_ns()
        step.verdict = self.traffic.judge([replace(cut, to_ns=cut.to_ns or now_ns) for cut in cuts])
        step.broken += step.verdict.violations
        return step

    def _run(self, step: Step, faults: Sequence[Fault], rng: Random, cuts: list[Cut]) -> None:
        happened: list[Injected] = []
        before = _ends(host.log_path for host in self.lab.hosts)
        for fault in faults:
            from_ns = time.monotonic_ns()
            injected = fault.inject(self.mesh, rng)
            happened.append(injected)
            cuts.append(Cut(injected.cuts, from_ns, 0, injected.opens))
            step.what.append(injected.what)
        self.traffic.follow()
        end = time.monotonic() + max(injected.lasts_s for injected in happened)
        wait_until(lambda: time.monotonic() >= end, 2 * end, "the faults have lasted")
        healing = time.monotonic()
        # The first one is what the others may need: see `sequence.may_combine`.
        for injected in happened:
            injected.heal()
        self.traffic.follow()
        wait_whole(self.mesh, max(injected.whole_within_s for injected in happened))
        step.whole_s = time.monotonic() - healing
        to_ns = time.monotonic_ns()
        cuts[:] = [replace(cut, to_ns=to_ns) for cut in cuts]
        self.settle()
        step.broken += self._check_logs(before, happened)

    def _check_logs(
        self, before: Mapping[Path, tuple[int, int]], happened: Sequence[Injected]
    ) -> list[str]:
        """What agents must have said since, or must not."""
        said = ""
        for log, (file, _) in _ends(host.log_path for host in self.lab.hosts).items():
            known, size = before.get(log, (0, 0))
            said += log.read_bytes()[size if file == known else 0 :].decode()
        sentences = ["an agent's log has a traceback"] if "Traceback" in said else []
        # Two at once may hide each other.
        if len(happened) == 1 and not re.search(happened[0].says, said):
            sentences.append(f"{happened[0].what}: no agent says {happened[0].says!r}")
        return sentences

    def keep(self, directory: Path, steps: Sequence[Step]) -> None:
        """Write down everything that may show what went wrong."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        document = [asdict(step) for step in steps]
        (directory / "steps.json").write_text(json.dumps(document, indent=1))
        for log in self.lab.base_dir.rglob("*.log"):
            name = "-".join(log.relative_to(self.lab.base_dir).parts)
            shutil.copy(log, directory / name)
        for host in self.lab.hosts:
            with (directory / f"{host.name}.txt").open("w") as file:
                for command in _DUMPS:
                    try:
                        done = host.run(command.split(), check=False, timeout=20)
                        said = f"{done.stdout}{done.stderr}"
                    except subprocess.TimeoutExpired as exc:
                        said = str(exc)  # that may be what went wrong
                    file.write(f"# {command}\n{said}\n")
        try:
            (directory / "etcd.txt").write_text(self.lab.etcd.ctl("get", "", "--prefix"))
        except MeshnetError as exc:
            (directory / "etcd.txt").write_text(f"{exc}\n")
