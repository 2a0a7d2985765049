"""``python -m tests.netns.faults``: sequences of faults, and a table of what they came to.

A sequence is replayed with ``--seed N`` and the other options it had.
"""

from __future__ import annotations

import argparse
import json
import secrets
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from tests.netns.faults.catalogue import FAULTS
from tests.netns.faults.programs import BUILD_DIR
from tests.netns.faults.sequence import SequenceReport, run_sequence
from tests.netns.faults.stage import Stage, end_in_order, new_lab
from tests.netns.faults.traffic import PERIOD_US

if TYPE_CHECKING:
    from collections.abc import Iterable

_SEQUENCES_A_STAGE = 10
"""Number of sequences after which a new lab is made."""


def main() -> int:
    """Run; the exit status is 1 if anything was broken."""
    options = _parse()
    end_in_order()
    seed = secrets.randbits(31) if options.seed is None else options.seed
    if options.jobs > 1:
        return _run_jobs(options, seed)
    results = options.results or BUILD_DIR / f"run-{seed}.jsonl"
    broken = _run(options, seed, results)
    if options.results is None:
        print(to_markdown(results))
    return 1 if broken else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.netns.faults", description=__doc__)
    parser.add_argument("--seed", type=int, help="of the first sequence; the next has the next")
    parser.add_argument("--count", type=int, default=1, help="sequences")
    parser.add_argument("--minutes", type=float, help="begin no sequence after so many")
    parser.add_argument("--length", type=int, default=10, help="faults of a sequence")
    parser.add_argument("--faults", default="", help="names of those to choose from, with commas")
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument(
        "--etcd-members", type=int, choices=(0, 1, 3), default=1, help="0: 1 and 3 in turn"
    )
    parser.add_argument(
        "--probe-ms", type=float, default=PERIOD_US / 1000, help="between two datagrams of a path"
    )
    parser.add_argument("--jobs", type=int, default=1, help="sequences at the same time")
    parser.add_argument(
        "--stride", type=int, default=1, help="from one sequence's seed to the next"
    )
    parser.add_argument("--results", type=Path, help="a file of JSON lines to append to")
    options = parser.parse_args()
    options.only = [name for name in options.faults.split(",") if name]
    unknown = [name for name in options.only if name not in FAULTS]
    if unknown:
        parser.error(f"no fault is named {', '.join(unknown)}: there are {', '.join(FAULTS)}")
    return options


def _run_jobs(options: argparse.Namespace, seed: int) -> int:
    """Run sequences in several processes, each its own seeds; returns the exit status."""
    results = options.results or BUILD_DIR / f"run-{seed}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    children = []
    for job in range(options.jobs):
        count = len(range(job, options.count, options.jobs))
        argv = [sys.executable, "-m", "tests.netns.faults", "--seed", str(seed + job)]
        argv += ["--stride", str(options.jobs), "--count", str(count)]
        argv += ["--length", str(options.length), "--faults", options.faults]
        argv += ["--hosts", str(options.hosts), "--etcd-members", str(options.etcd_members)]
        argv += ["--probe-ms", str(options.probe_ms), "--results", str(results)]
        if options.minutes is not None:
            argv += ["--minutes", str(options.minutes)]
        children.append(subprocess.Popen(argv))
    try:
        statuses = [child.wait() for child in children]
    except KeyboardInterrupt:
        # The processes got the signal, too, and take their labs down.
        statuses = [child.wait() for child in children]
    except SystemExit:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()
        raise
    print(to_markdown(results))
    return 1 if any(statuses) else 0


def _run(options: argparse.Namespace, seed: int, results: Path) -> int:
    """Run sequences one after another; returns how many were broken."""
    results.parent.mkdir(parents=True, exist_ok=True)
    end = float("inf") if options.minutes is None else time.monotonic() + options.minutes * 60
    stage: Stage | None = None
    played = broken = 0
    members = options.etcd_members or 1
    try:
        for number in range(options.count):
            if time.monotonic() >= end:
                break
            if stage is None:
                lab = new_lab(options.hosts, members)
                stage = Stage(lab, round(options.probe_ms * 1000)).__enter__()
                played = 0
            report = run_sequence(
                seed + number * options.stride,
                options.length,
                options.hosts,
                members,
                only=options.only,
                stage=stage,
            )
            _append(results, report)
            played += 1
            broken += bool(report.broken)
            if report.broken or played == _SEQUENCES_A_STAGE:
                stage.__exit__(None, None, None)
                stage = None
                members = options.etcd_members or 4 - members
    finally:
        if stage is not None:
            stage.__exit__(None, None, None)
    return broken


def _append(results: Path, report: SequenceReport) -> None:
    with results.open("a") as file:
        file.write(json.dumps({**asdict(report), "broken": report.broken}) + "\n")


def to_markdown(results: Path) -> str:
    """Make the table: for each fault, what it cost and how long until all was whole."""
    documents = [json.loads(line) for line in results.read_text().splitlines()]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        for step in document["steps"]:
            by_name.setdefault(" + ".join(step["faults"]), []).append(step)
    broken = [document["seed"] for document in documents if document["broken"]]
    faults = sum(len(step["faults"]) for document in documents for step in document["steps"])
    seconds = sum(document["seconds"] for document in documents)
    return "\n".join(
        (
            f"{len(documents)} sequences, {faults} faults, {seconds / 60:.0f} minutes; "
            f"broken: {len(broken)}{''.join(f' {seed}' for seed in broken)}",
            "",
            "| fault | times | broken | lost on paths it does not cut | on those it cuts | "
            "seconds until whole: median | 90% | most |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *(_row(name, by_name[name]) for name in sorted(by_name, key=_alone_first)),
        )
    )


def _alone_first(name: str) -> tuple[bool, str]:
    return (" + " in name, name)


def _row(name: str, steps: list[dict[str, Any]]) -> str:
    lost = sum(step["verdict"]["lost"] for step in steps)
    cut = sum(step["verdict"]["lost_on_cut"] for step in steps)
    whole = [step["whole_s"] for step in steps if not step["broken"]]
    cells = [name, len(steps), len(steps) - len(whole), lost, cut, *_spread(whole)]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _spread(values: Iterable[float]) -> list[str]:
    """Median, nine tenths, and most."""
    found = sorted(values)
    if not found:
        return ["-"] * 3
    tenths = quantiles(found, n=10, method="inclusive") if len(found) > 1 else found * 9
    return [f"{value:.1f}" for value in (tenths[4], tenths[8], found[-1])]


if __name__ == "__main__":
    sys.exit(main())
