"""Pauses between tries: longer after each failure, and never in step with other agents."""

from __future__ import annotations

import random


class Backoff:
    """The pauses of one task that tries something again.

    Args:
        first_s: longest first pause; each further one is twice as long.
        last_s: longest pause of all.
    """

    def __init__(self, first_s: float, last_s: float) -> None:
        self._first_s = first_s
        self._last_s = last_s
        self._next_s = first_s

    @property
    def longest_s(self) -> float:
        """The longest that the next pause can be."""
        return self._next_s

    def reset(self) -> None:
        """It went well: the pauses begin anew."""
        self._next_s = self._first_s

    def failed(self) -> float:
        """It failed: how many seconds to wait before the next try.

        At random from half of the pause to all of it.  Agents that lost etcd in one instant would
        otherwise all come back in one instant.
        """
        longest_s = self._next_s
        self._next_s = min(self._last_s, longest_s * 2)
        return longest_s * random.uniform(0.5, 1.0)
