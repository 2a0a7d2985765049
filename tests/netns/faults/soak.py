"""``python -m tests.netns.faults.soak --minutes 20``: faults and churn with traffic on, and gauges.

No fault ends the agent of the first host, so that its gauges are of one life as long as the soak.
Writes what the gauges said to a file of JSON.  The exit status is 1 if an invariant broke or a
gauge is not flat (`tests.netns.faults.gauges.drifts`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tests.netns.faults import churn
from tests.netns.faults.catalogue import FAULTS, faults_for
from tests.netns.faults.gauges import Gauges, drifts
from tests.netns.faults.programs import BUILD_DIR
from tests.netns.faults.sequence import choose, describe
from tests.netns.faults.stage import WHATEVER, Stage, Step, announce, end_in_order, new_lab

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_FAULTS_OF_TEN = 5
"""How many of ten steps are faults.  The others are churn."""
_CHURN_WEIGHTS = {"endpoints": 3, "networks": 1, "hosts": 1}


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.netns.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--faults", default="", help="names of those to choose from, with commas")
    parser.add_argument("--json", type=Path, default=BUILD_DIR.parent / "soak.json")
    options = parser.parse_args()
    chosen = [name for name in options.faults.split(",") if name] or [*FAULTS]
    end_in_order()
    print(f"seed {options.seed}, {options.minutes:g} minutes", flush=True)
    with Stage(new_lab(options.hosts)) as stage, Gauges(stage.lab) as gauges:
        elder = stage.lab.hosts[0]
        stage.mesh.spared, its_pid = elder.name, elder.agent_pid
        steps = soak(stage, options.seed, options.minutes * 60, chosen)
        if elder.agent_pid != its_pid:
            steps[-1].broken.append(f"the agent of {elder.name}, which no fault ends, has ended")
        if any(step.broken for step in steps):
            stage.keep(BUILD_DIR / f"soak-{options.seed}", steps)
        sent = stage.traffic.sent
    grown = drifts(gauges.series, gauges.seconds)
    document = {
        "seed": options.seed,
        "minutes": options.minutes,
        "machine": _machine(),
        "sent": sent,
        "steps": [
            {"faults": step.faults, "what": step.what, "whole_s": step.whole_s} for step in steps
        ],
        "lost": sum(step.verdict.lost for step in steps),
        "misdelivered": sum(step.verdict.misdelivered for step in steps),
        "starved": sum(step.verdict.starved for step in steps),
        "broken": [sentence for step in steps for sentence in step.broken],
        "drifts": grown,
        "series": gauges.series,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document))
    print(summary(document))
    return 1 if document["broken"] or grown else 0


def soak(
    stage: Stage,
    seed: int,
    seconds: float,
    chosen: Collection[str],
    say: Callable[[str], None] = announce,
) -> list[Step]:
    """Faults of these names and churn for so long, or until something is broken."""
    rng = Random(seed)
    steps: list[Step] = []
    end = time.monotonic() + seconds
    possible = faults_for(stage.mesh)
    faults = {name: possible[name] for name in possible if name in chosen}
    while time.monotonic() < end and not (steps and steps[-1].broken):
        if rng.randrange(10) < _FAULTS_OF_TEN:
            step = stage.step(choose(faults, rng, 2), rng)
        else:
            kind = rng.choices([*_CHURN_WEIGHTS], [*_CHURN_WEIGHTS.values()])[0]
            step = _change(stage, kind, rng)
        steps.append(step)
        say(describe(step))
        for sentence in step.broken:
            say(f"BROKEN: {sentence}")
    return steps


def _change(stage: Stage, kind: str, rng: Random) -> Step:
    """One step of churn; nothing may be lost by it."""
    step = Step([f"churn of {kind}"])
    began = time.monotonic()
    try:
        step.what.append(churn.KINDS[kind](stage, rng))
    except WHATEVER as exc:
        step.broken += [f"{type(exc).__name__}: {exc}", traceback.format_exc()]
    step.whole_s = time.monotonic() - began
    step.verdict = stage.traffic.judge()
    step.broken += step.verdict.violations
    return step


def summary(document: dict[str, Any]) -> str:
    """What it came to, in lines."""
    kinds = Counter(name for step in document["steps"] for name in step["faults"])
    return "\n".join(
        (
            f"{len(document['steps'])} steps: {', '.join(f'{n} {k}' for k, n in kinds.items())}",
            f"{document['sent']} datagrams: {document['lost']} lost on paths that nothing cut "
            f"({document['starved']} more to this machine's queues), "
            f"{document['misdelivered']} misdelivered",
            *(f"BROKEN: {sentence}" for sentence in document["broken"]),
            *(f"NOT FLAT: {sentence}" for sentence in document["drifts"]),
        )
    )


def _machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
