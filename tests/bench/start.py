"""What an agent's start in a large mesh is made of, read from its log."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.site import Event, Site

PASS_STAGES = ("observe", "dump", "plan", "diff", "apply")
STAGES = ("until listing", "list and decode", "until first pass", *PASS_STAGES, "rest")
UNKNOWN = math.nan
"""A stage that the agent does not tell of."""


class Start(NamedTuple):
    """One start with an empty kernel.

    Attributes:
        seconds: from the process's start until ``status`` said "in sync".
        stages: `STAGES` in seconds, that add up to `seconds`; those of passes are summed over all
            passes that wrote something.
        decode_s: the part of "list and decode" that is this host's own.
        pass_s: all of those passes.
        cpu_s: the agent's CPU time in it.
        rss_mib, peak_mib: the agent's resident set then, and at most until then.
        passes: that it took.
    """

    seconds: float
    stages: dict[str, float]
    decode_s: float
    pass_s: float
    cpu_s: float
    rss_mib: float
    peak_mib: float
    passes: int


def measure_start(site: Site, *options: str) -> Start:
    """Start an agent in a namespace that holds nothing of an earlier one."""
    offset, began = site.log_size(), time.time()
    document, seconds = site.start_agent(*options)
    rss_mib, peak_mib = site.memory_mib()
    cpu_s = site.cpu_s()
    events = site.events(offset)
    stages, pass_s = _stages(events, began, seconds)
    listed = _first(events, "mesh listed")
    return Start(
        seconds=seconds,
        stages=stages,
        decode_s=_seconds(listed, "decode_s"),
        pass_s=pass_s,
        cpu_s=cpu_s,
        rss_mib=rss_mib,
        peak_mib=peak_mib,
        passes=document["kernel"]["passes"],
    )


def _stages(
    events: Sequence[Event], began: float, seconds: float
) -> tuple[dict[str, float], float]:
    listed = _first(events, "mesh listed")
    programmed = [event for event in events if event.name == "kernel programmed"]
    list_s = _seconds(listed, "seconds")
    listed_at = listed.at if listed is not None else UNKNOWN
    stages = {"until listing": listed_at - list_s - began, "list and decode": list_s}
    first = programmed[0] if programmed else None
    first_at = first.at - _seconds(first, "seconds") if first is not None else UNKNOWN
    stages["until first pass"] = first_at - (began if listed is None else listed_at)
    for stage in PASS_STAGES:
        stages[stage] = sum(_seconds(event, f"{stage}_s") for event in programmed)
    pass_s = sum(_seconds(event, "seconds") for event in programmed)
    known = sum(stage for stage in stages.values() if not math.isnan(stage))
    if math.isnan(stages["apply"]):
        known += pass_s
    stages["rest"] = seconds - known
    return stages, pass_s


def _first(events: Sequence[Event], name: str) -> Event | None:
    return next((event for event in events if event.name == name), None)


def _seconds(event: Event | None, field: str) -> float:
    return float(event.fields.get(field, UNKNOWN)) if event is not None else UNKNOWN
