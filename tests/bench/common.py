"""What benchmarks share: results and their bounds, statistics, scratch namespaces.

A benchmark is a function that takes a `Run` and returns measures.  It compares with its peer in
alternating rounds and keeps medians: the machines it runs on are shared and noisy.  Nothing here
fails because something was slow.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from meshnet.lab.commands import Children, Namespace
from meshnet.lab.netns import add_netns, delete_netns, ip_batch, netns_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from meshnet.lab.host import LabHost

_counter = itertools.count()


@dataclass(frozen=True, slots=True)
class Bound:
    """What a value must hold.

    Attributes:
        most: whether `limit` is the largest good value, else it is the smallest.
    """

    limit: float
    most: bool

    def __str__(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.limit:g}"

    def holds(self, value: float) -> bool:
        """Whether a value is within the bound."""
        return value <= self.limit if self.most else value >= self.limit


def at_most(limit: float) -> Bound:
    """A bound from above."""
    return Bound(limit, most=True)


def at_least(limit: float) -> Bound:
    """A bound from below."""
    return Bound(limit, most=False)


@dataclass(frozen=True, slots=True)
class Measure:
    """One line of the result.

    Attributes:
        value: NaN if the measurement is inconclusive.
        unit: "×" for a ratio against the peer.
        samples: the values `value` was made of, if they are few enough to look at.
    """

    name: str
    value: float
    unit: str
    bound: Bound | None = None
    samples: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        """Whether the bound holds, in a word; nothing without one."""
        if self.bound is None or math.isnan(self.value):
            return ""
        return "holds" if self.bound.holds(self.value) else "MISSED"


@dataclass(frozen=True, slots=True)
class Run:
    """How a benchmark is to run.

    Attributes:
        rounds: alternating rounds; None: the benchmark's own number.
        sizes: numbers of hosts, for those that take one or more; empty: the benchmark's own.
        seconds: how long to go on, for those that do; None: the benchmark's own.
    """

    name: str
    rounds: int | None = None
    sizes: tuple[int, ...] = ()
    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Report progress on standard error."""
        print(f"{time.monotonic() - self.started:6.1f}s {self.name}: {text}", file=sys.stderr)


class Benchmark(Protocol):
    """A benchmark."""

    def __call__(self, run: Run) -> list[Measure]:
        """Run it; leaves nothing behind."""
        ...


def median_of(name: str, values: Sequence[float], unit: str, bound: Bound | None = None) -> Measure:
    """The median of values, as a line."""
    return Measure(name, statistics.median(values), unit, bound, tuple(values))


def median_ratio(
    name: str, ours: Sequence[float], peers: Sequence[float], bound: Bound | None = None
) -> Measure:
    """The median of the ratios of each round: what made a round slow made it so for both."""
    ratios = [a / b for a, b in zip(ours, peers, strict=True)]
    return median_of(name, ratios, "×", bound)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def client_environment(host: LabHost) -> dict[str, str]:
    """For the installed client against a host's agent; it need not enter the host's namespace.

    Its modules are compiled once, as pip does when it installs them: not each time they are run.
    """
    environment = {**os.environ, "MESHNET_SOCKET": str(host.socket_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


class Scratch:
    """Namespaces of a benchmark's own, by names that nobody else uses."""

    def __init__(self) -> None:
        self._prefix = f"mnbench{os.getpid()}x{next(_counter)}"
        self._made: list[str] = []
        self._children = Children()

    def name_of(self, part: str) -> str:
        """The full name of the namespace `part`."""
        return f"{self._prefix}-{part}"

    def add(self, *parts: str) -> None:
        """Make namespaces, each with its ``lo`` up."""
        names = [self.name_of(part) for part in parts]
        self._made += names
        add_netns(names)
        for part in parts:
            self.ip(part, ["link set lo up"])

    def ip(self, part: str, commands: Sequence[str]) -> None:
        """Run ip(8) commands in a namespace."""
        ip_batch(commands, netns=self.name_of(part))

    def namespace(self, part: str) -> Namespace:
        """A namespace to run commands in."""
        return Namespace(netns_path(self.name_of(part)), self._children)

    def remove(self) -> None:
        """End what was started in them, and remove them."""
        for ref in self._children.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(ref.pid, 15)
        self._children.reap_all()
        delete_netns(self._made)
        self._made.clear()


@contextlib.contextmanager
def scratch() -> Iterator[Scratch]:
    """Scratch namespaces while the block runs."""
    made = Scratch()
    try:
        yield made
    finally:
        made.remove()


def render_table(results: Sequence[tuple[str, Measure]]) -> str:
    """All results, with the bound beside each."""
    rows = [("BENCHMARK", "WHAT", "MEASURED", "BOUND", "")]
    for bench, measure in results:
        known = not math.isnan(measure.value)
        value = f"{measure.value:,.3f} {measure.unit}".rstrip() if known else "-"
        bound = str(measure.bound) if measure.bound is not None else ""
        rows.append((bench, measure.name, value, bound, measure.verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i == 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def to_document(results: Sequence[tuple[str, Measure]]) -> dict[str, object]:
    """All results for a JSON file, and what they were measured on."""
    system = os.uname()
    return {
        "machine": {
            "kernel": system.release,
            "arch": system.machine,
            "cpus": os.cpu_count(),
            "python": sys.version.partition(" ")[0],
        },
        "results": [
            {
                "benchmark": bench,
                "name": measure.name,
                "value": _number(measure.value),
                "unit": measure.unit,
                "bound": str(measure.bound) if measure.bound is not None else None,
                "holds": measure.bound.holds(measure.value) if measure.bound is not None else None,
                "samples": [_number(sample) for sample in measure.samples],
            }
            for bench, measure in results
        ],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
