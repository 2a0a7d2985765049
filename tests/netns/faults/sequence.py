"""Seeded random faults, one or two at once, one after another."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from tests.netns.faults.catalogue import faults_for
from tests.netns.faults.programs import BUILD_DIR
from tests.netns.faults.stage import Stage, Step, announce, new_lab

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from tests.netns.faults.fault import Fault

_PAIRS_OF_TEN = 4
"""How many of ten steps have two faults at once, if there are two that can be."""
_RANKS = (
    (
        "etcd killed",
        "etcd stopped",
        "etcd frozen",
        "etcd slow",
        "etcd member lost",
        "etcd quorum lost",
        "etcd leader moved",
    ),
    ("underlay link down", "one-way loss", "partition", "packets duplicated"),
    ("kernel object removed", "kernel object changed", "kernel object duplicated"),
    ("agent killed", "agent stopped", "agent frozen"),
)
"""Faults that can be combined with those of other groups; what an earlier group breaks is mended
first.  All others need agents or an etcd that answer, to happen or to end."""


@dataclass(slots=True)
class SequenceReport:
    """What became of a sequence; `broken` is empty if all held."""

    seed: int
    hosts: int
    etcd_members: int
    seconds: float = 0.0
    steps: list[Step] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """What must not have been, as sentences."""
        return [sentence for step in self.steps for sentence in step.broken]


def may_combine(one: Fault, other: Fault) -> bool:
    """Whether two faults can happen at once, each to end as if it were alone."""
    ranks = {_rank(one), _rank(other)}
    return len(ranks) == 2 and None not in ranks


def run_sequence(
    seed: int,
    length: int = 10,
    hosts: int = 3,
    etcd_members: int = 1,
    *,
    only: Collection[str] = (),
    stage: Stage | None = None,
    say: Callable[[str], None] = announce,
) -> SequenceReport:
    """Have so many faults happen, as a seed wants it, until something is broken.

    Args:
        length: how many faults.
        only: names of those to choose from; all by default.
        stage: a mesh that is whole, of so many hosts and members of etcd; a new one by default.
        say: called with a line for each step.
    """
    if stage is None:
        with Stage(new_lab(hosts, etcd_members)) as made:
            return run_sequence(seed, length, hosts, etcd_members, only=only, stage=made, say=say)
    rng = Random(seed)
    known = faults_for(stage.mesh)
    faults = {name: known[name] for name in known if not only or name in only}
    report = SequenceReport(seed, hosts, etcd_members)
    say(f"seed {seed}: {length} faults, {hosts} hosts, etcd of {etcd_members}")
    began, left = time.monotonic(), length
    while left and not report.broken:
        chosen = choose(faults, rng, left)
        step = stage.step(chosen, rng)
        report.steps.append(step)
        left -= len(chosen)
        say(f"seed {seed}: {describe(step)}")
    report.seconds = time.monotonic() - began
    if report.broken:
        directory = BUILD_DIR / str(seed)
        stage.keep(directory, report.steps)
        for sentence in report.broken:
            say(f"seed {seed}: BROKEN: {sentence}")
        say(f"seed {seed}: see {directory}")
    return report


def choose(faults: Mapping[str, Fault], rng: Random, most: int) -> Sequence[Fault]:
    """One fault, or two at once; what needs what the other breaks comes last."""
    names = sorted(faults)
    first = faults[rng.choice(names)]
    pair = rng.randrange(10) < _PAIRS_OF_TEN
    others = [faults[name] for name in names if may_combine(first, faults[name])]
    if not pair or most < 2 or not others:
        return [first]
    return sorted((first, rng.choice(others)), key=lambda fault: _rank(fault) or 0)


def describe(step: Step) -> str:
    """A step in a line."""
    verdict = step.verdict
    what = " + ".join(step.what) or " + ".join(step.faults)
    return (
        f"{what}: whole in {step.whole_s:.2f} s, lost {verdict.lost} "
        f"({verdict.lost_on_cut} on cut paths, {verdict.starved} to this machine's queues)"
        f"{f', {verdict.leaked} leaked' if verdict.leaked else ''}"
    )


def _rank(fault: Fault) -> int | None:
    """Which of the groups a fault is of; None: of none."""
    return next((rank for rank, names in enumerate(_RANKS) if fault.name in names), None)
