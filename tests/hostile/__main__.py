"""``python -m tests.hostile``: every campaign in turn, for ``--minutes`` in all."""

from __future__ import annotations

import argparse
import secrets
import sys

import structlog
import trio
from trio.testing import MockClock

from tests.hostile.campaign import keep, run_for
from tests.hostile.campaigns import CAMPAIGNS


def _drop(*_: object) -> structlog.typing.EventDict:
    """A structlog processor: what the agent says of hostile input is not looked at here."""
    raise structlog.DropEvent


def main() -> int:
    """Run; the exit status is 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--keep", action="store_true", help="add what finds something to corpus/")
    parser.add_argument("campaigns", nargs="*", help=f"of {', '.join(c.name for c in CAMPAIGNS)}")
    options = parser.parse_args()
    structlog.configure(processors=[_drop])
    chosen = [c for c in CAMPAIGNS if not options.campaigns or c.name in options.campaigns]
    print(f"seed {options.seed}, {options.minutes:g} minutes")
    found = 0
    for campaign in chosen:
        # A clock that jumps: what waits in the agent for seconds costs none.
        outcome = trio.run(
            run_for,
            campaign,
            options.seed,
            options.minutes * 60 / len(chosen),
            clock=MockClock(autojump_threshold=0),
        )
        words = ", ".join(f"{count} {word}" for word, count in sorted(outcome.became.items()))
        print(
            f"{campaign.name:14} {outcome.became.total() + len(outcome.found):8} inputs: {words}; "
            f"slowest {outcome.slowest_s * 1000:.0f} ms; {len(outcome.found)} findings",
            flush=True,
        )
        for data, what in outcome.found.items():
            where = keep(campaign, data) if options.keep else repr(data[:200])
            print(f"    {what}\n      {where}")
        found += len(outcome.found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
