"""``python -m tests.bench.plot_datapath RESULTS.json PICTURE.png``: `tests.bench.datapath` drawn.

A bar is the median over the rounds, the line on it reaches from the least to the most.  Needs
matplotlib (the extra ``bench``), which nothing else does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench.datapath import CPU_EIGHT, CPU_ONE, EIGHT, ONE, PING, SMALL, UNITS

if TYPE_CHECKING:
    from collections.abc import Sequence

_PANELS = (
    ("bulk TCP", (ONE, EIGHT)),
    ("small packets", (SMALL,)),
    ("round trip", (PING,)),
    ("CPU for a gigabyte", (CPU_ONE, CPU_EIGHT)),
)
_HEIGHT = 0.8


class Figure(NamedTuple):
    """A median, and the least and the most of what it was made of."""

    value: float
    least: float
    most: float


Figures = dict[str, dict[str, Figure]]
"""By what is measured, then by path."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 2:
        usage = "usage: python -m tests.bench.plot_datapath RESULTS.json PICTURE.png"
        print(usage, file=sys.stderr)
        return 2
    document = json.loads(Path(given[0]).read_text())
    figures = read_figures(document)
    if not all(figures.values()):
        text = f"{given[0]} has no results of the benchmark 'datapath': run it first"
        print(text, file=sys.stderr)
        return 1
    _draw(figures, document["machine"], Path(given[1]))
    return 0


def read_figures(document: dict[str, Any]) -> Figures:
    """What ``datapath`` measured, ratios left out, in the order of its paths."""
    figures: Figures = {what: {} for what in UNITS}
    for result in document["results"]:
        path, _, what = result["name"].partition(": ")
        if result["benchmark"] == "datapath" and what in figures and result["unit"] == UNITS[what]:
            samples = result["samples"]
            figures[what][path] = Figure(result["value"], min(samples), max(samples))
    return figures


def _draw(figures: Figures, machine: dict[str, Any], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    picture, panels = plt.subplots(
        1, len(_PANELS), figsize=(13, 0.45 * len(figures[ONE]) + 1.6), layout="constrained"
    )
    for number, (axes, (title, measured)) in enumerate(zip(panels, _PANELS, strict=True)):
        _draw_bars(axes, {what: figures[what] for what in measured})
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(UNITS[measured[0]])
        if number:
            axes.set_yticklabels([])
    picture.suptitle(
        f"Between containers on two hosts, all on one machine ({machine['cpus']} cores, "
        f"Linux {machine['kernel'].partition('-')[0]})",
        fontsize=10,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(file, dpi=110)
    plt.close(picture)


def _draw_bars(axes: Any, measured: Figures) -> None:  # noqa: ANN401
    height = _HEIGHT / len(measured)
    for number, (what, by_path) in enumerate(measured.items()):
        found = list(by_path.values())
        values = [figure.value for figure in found]
        places = [place + (number + 0.5) * height for place in range(len(found))]
        label = what.partition(", ")[2] or None
        bars = axes.barh(
            places,
            values,
            height,
            label=label,
            xerr=[[f.value - f.least for f in found], [f.most - f.value for f in found]],
            error_kw={"elinewidth": 0.8, "ecolor": "0.35"},
        )
        axes.bar_label(bars, [f" {value:,.3g}" for value in values], fontsize=7)
    paths = list(next(iter(measured.values())))
    axes.set_yticks([place + _HEIGHT / 2 for place in range(len(paths))], paths)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(visible=True, axis="x", alpha=0.3)
    if len(measured) > 1:
        axes.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
