"""``python -m tests.bench [NAME…]``: run benchmarks, print a table with the bounds."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.common import Measure, Run, render_table, to_document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.common import Benchmark

NAMES = ("programming", "attach", "throughput")
"""Modules of this package, each with a `Benchmark` named ``run``."""
LONG_NAMES = ("scale", "busy", "convergence", "churn", "outage", "datapath", "published", "run")
"""Further ones, run when they are named: they take minutes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status says whether they ran, not whether they were fast."""
    every = (*NAMES, *LONG_NAMES)
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of {', '.join(every)}")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too")
    parser.add_argument("--rounds", metavar="N", type=int, help="rounds, instead of each's own")
    parser.add_argument("--hosts", metavar="N", type=int, nargs="+", default=(), help="mesh sizes")
    parser.add_argument("--seconds", metavar="S", type=float, help="how long to change hosts")
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.names) - set(every)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose of {', '.join(every)}")
    if os.geteuid() != 0:
        parser.error("benchmarks make network namespaces, which needs root: use sudo")
    results: list[tuple[str, Measure]] = []
    try:
        for name in parsed.names or NAMES:
            benchmark: Benchmark = importlib.import_module(f"tests.bench.{name}").run
            run = Run(name, parsed.rounds, tuple(parsed.hosts), parsed.seconds)
            run.say("starts")
            results += [(name, measure) for measure in benchmark(run)]
            run.say("done")
    finally:  # what was measured before one failed is not lost
        print(render_table(results))
        if parsed.json is not None:
            document = json.dumps(to_document(results), indent=2, ensure_ascii=False)
            parsed.json.write_text(f"{document}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
