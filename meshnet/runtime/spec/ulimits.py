"""Resource limits of a process, ``--ulimit NAME=SOFT[:HARD]`` (setrlimit(2)).

Names and values are Docker's; -1 means unlimited.  Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from meshnet.errors import UsageError

ULIMITS = (
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile",
    "nproc", "rss", "rtprio", "rttime", "sigpending", "stack",
)  # fmt: skip
UNLIMITED = (1 << 64) - 1
"""RLIM_INFINITY."""
_ULIMIT = re.compile(r"([a-z]+)=(-1|\d{1,19})(?::(-1|\d{1,19}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Ulimit:
    """One limit: what counts, and how far the process may raise it itself."""

    name: str
    soft: int
    hard: int


def parse_ulimit(text: str) -> Ulimit:
    """``nofile=512:1024``; one number is both.

    Raises:
        UsageError: anything else.
    """
    found = _ULIMIT.fullmatch(text)
    if found is None or found[1] not in ULIMITS:
        raise UsageError(
            f"ulimit {text!r} is not usable: give NAME=SOFT[:HARD], NAME one of "
            + ", ".join(ULIMITS)
        )
    soft, hard = (UNLIMITED if n == "-1" else int(n) for n in (found[2], found[3] or found[2]))
    if soft > hard:
        raise UsageError(f"ulimit {text!r}: the soft limit is above the hard one: lower it")
    return Ulimit(found[1], soft, hard)
