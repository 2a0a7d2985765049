"""Waiting for something to become true, with a deadline: the only sleep of the lab and its tests.

May import only the standard library.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_FIRST_INTERVAL_S = 0.002
_LONGEST_INTERVAL_S = 0.05


def wait_until(predicate: Callable[[], T], deadline_s: float, what: str) -> T:
    """Call `predicate` until what it returns is true, and return that.

    The pause between two calls grows from 2 ms to 50 ms: quick things are seen at once, and a long
    wait costs little.  `predicate` is called at least once, and once more at the deadline.

    Args:
        predicate: what to ask; its exceptions pass through.
        deadline_s: seconds to wait at most, not counting the last call's own time.
        what: the awaited event, for the error message: "etcd answers".

    Raises:
        TimeoutError: it did not become true in time; the message has `what`.
    """
    deadline = time.monotonic() + deadline_s
    interval_s = _FIRST_INTERVAL_S
    while True:
        # The clock is read before the call, so that the last call comes after the deadline, however
        # long this process was kept off the CPU in between.
        late = time.monotonic() >= deadline
        value = predicate()
        if value:
            return value
        if late:
            raise TimeoutError(f"not within {deadline_s:g} s: {what}")
        time.sleep(max(0.0, min(interval_s, deadline - time.monotonic())))
        interval_s = min(interval_s * 2, _LONGEST_INTERVAL_S)
