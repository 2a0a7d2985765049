"""``python -m tests.bench.plot RESULTS.json PICTURE.png``: draws what `tests.bench.scale` found.

Also prints them as the tables of docs/design/scale.md.

Left: times against the number of hosts, both axes logarithmic, the peer beside; what grows with the
hosts rises as the dotted line does.  Right: what a start is made of.  Needs matplotlib (the extra
``bench``), which nothing else does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.start import STAGES

if TYPE_CHECKING:
    from collections.abc import Sequence

_LINES = {
    "start to in sync": ("start of the agent to in sync", 1.0, "o-"),
    "passes that wrote": ("programming, whole passes", 1.0, "s-"),
    "by ip and bridge -batch": ("programming by ip and bridge -batch", 1.0, "x--"),
    "idle pass, CPU": ("CPU of a pass with nothing to do", 1.0, "d-"),
    "500 hosts join at once": ("500 hosts join at once", 1000.0, "v-"),
    "one host joins, median": ("one host joins", 1000.0, "^-"),
}
"""By measure: its label, how many of its unit are a second, and its style."""
_UNTOLD = "passes (not told apart)"

Figures = dict[int, dict[str, float | None]]
"""By number of hosts, the measures' values by name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 2:
        print("usage: python -m tests.bench.plot RESULTS.json PICTURE.png", file=sys.stderr)
        return 2
    document = json.loads(Path(given[0]).read_text())
    figures = read_figures(document)
    if not figures:
        print(f"{given[0]} has no results of the benchmark 'scale': run it first", file=sys.stderr)
        return 1
    _draw(figures, document["machine"], Path(given[1]))
    print(to_markdown(document))
    return 0


def read_figures(document: dict[str, Any]) -> Figures:
    """The measures of ``scale`` by number of hosts, fewest first."""
    figures: Figures = {}
    for result in document["results"]:
        size, found, name = result["name"].partition(": ")
        digits = size.replace(",", "")
        if result["benchmark"] == "scale" and found and digits.isdigit():
            figures.setdefault(int(digits), {})[name.removeprefix("… ")] = result["value"]
    return dict(sorted(figures.items()))


def to_markdown(document: dict[str, Any]) -> str:
    """The measures of ``scale`` with a column a size, and those of the other benchmarks."""
    results = [r for r in document["results"] if r["value"] is not None]
    sizes = list(read_figures(document))
    rows: dict[str, dict[int, str]] = {}
    others = []
    for result in results:
        size, _, name = result["name"].partition(": ")
        digits = size.replace(",", "")
        if digits.isdigit():
            rows.setdefault(name, {})[int(digits)] = _cell(result)
        else:
            others.append(f"| {result['benchmark']}: {result['name']} | {_cell(result)} |")
    head = " | ".join(f"{size:,} hosts" for size in sizes)
    return "\n".join(
        (
            f"| one agent among | {head} |",
            "| --- |" + " --- |" * len(sizes),
            *(f"| {n} | {' | '.join(row.get(s, '-') for s in sizes)} |" for n, row in rows.items()),
            "",
            "| what | measured |",
            "| --- | --- |",
            *others,
        )
    )


def _cell(result: dict[str, Any]) -> str:
    value = result["value"]
    text = f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
    bound = f" ({result['bound']})" if result["bound"] else ""
    return f"{text} {result['unit']}".rstrip() + bound


def _draw(figures: Figures, machine: dict[str, Any], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    picture, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    _draw_lines(left, figures)
    _draw_stages(right, figures)
    picture.suptitle(
        f"One agent, hosts simulated in etcd ({machine['cpus']} cores, "
        f"Linux {machine['kernel'].partition('-')[0]}, Python {machine['python']})",
        fontsize=10,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(file, dpi=110)
    plt.close(picture)


def _draw_lines(axes: Any, figures: Figures) -> None:  # noqa: ANN401
    for name, (label, unit, style) in _LINES.items():
        points = [(size, found.get(name)) for size, found in figures.items()]
        known = [(size, value / unit) for size, value in points if value]
        if known:
            axes.plot(*zip(*known, strict=True), style, label=label)
    sizes = list(figures)
    start = figures[sizes[0]].get("passes that wrote") or 0.1
    axes.plot(sizes, [start * n / sizes[0] for n in sizes], "k:", linewidth=1, label="∝ hosts")
    axes.set(xscale="log", yscale="log", xlabel="hosts", ylabel="seconds")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)


def _draw_stages(axes: Any, figures: Figures) -> None:  # noqa: ANN401
    names = [f"{size:,}" for size in figures]
    below = [0.0] * len(names)
    for stage in (*STAGES[:-1], _UNTOLD, STAGES[-1]):
        heights = [_stage(found, stage) for found in figures.values()]
        if any(heights):
            axes.bar(names, heights, 0.6, bottom=below, label=stage)
            below = [b + h for b, h in zip(below, heights, strict=True)]
    axes.set(xlabel="hosts", ylabel="seconds from the process's start to in sync")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(fontsize=8)


def _stage(found: dict[str, float | None], stage: str) -> float:
    if stage == _UNTOLD:
        told = found.get("apply") is not None
        return 0.0 if told else found.get("passes that wrote") or 0.0
    return max(0.0, found.get(stage) or 0.0)


if __name__ == "__main__":
    sys.exit(main())
