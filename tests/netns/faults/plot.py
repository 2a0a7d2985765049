"""``python -m tests.netns.faults.plot SOAK.json PICTURE.png``: draws what a soak's gauges said.

Needs matplotlib (the extra ``bench``), which nothing else does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_PANELS = {
    "memory, MiB": (("RSS KiB",), 1024),
    "descriptors": (("descriptors",), 1),
    "threads": (("threads",), 1),
    "kernel objects": (
        ("links", "addresses", "routes", "nexthops", "neighbours", "FDB entries"),
        1,
    ),
    "nftables: elements and rules": (("nftables, elements and rules",), 1),
    "keys in etcd": (("keys",), 1),
}
"""By title, the ends of the names of its series, and how many of their unit are one of its."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 2:
        print("usage: python -m tests.netns.faults.plot SOAK.json PICTURE.png", file=sys.stderr)
        return 2
    _draw(json.loads(Path(given[0]).read_text()), Path(given[1]))
    return 0


def _draw(document: dict[str, Any], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    picture, grid = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axes, (title, (ends, unit)) in zip(grid.flat, _PANELS.items(), strict=True):
        for name, points in sorted(document["series"].items()):
            if not name.endswith(ends) or not points:
                continue
            minutes = [at / 60 for at, _ in points]
            axes.plot(minutes, [value / unit for _, value in points], linewidth=0.9, label=name)
        axes.set(title=title, xlabel="minutes")
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=5, ncols=2)
    machine = document["machine"]
    # Less than what was asked for, if an invariant broke.
    lasted = max(points[-1][0] for points in document["series"].values() if points) / 60
    picture.suptitle(
        f"{lasted:.1f} minutes of faults and churn: {len(document['steps'])} steps, "
        f"{document['sent']:,} datagrams, {document['lost']} lost on paths that nothing cut, "
        f"{document['misdelivered']} misdelivered ({machine['cpus']} cores, "
        f"Linux {machine['kernel'].partition('-')[0]}, Python {machine['python']})",
        fontsize=10,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(file, dpi=100)
    plt.close(picture)


if __name__ == "__main__":
    sys.exit(main())
