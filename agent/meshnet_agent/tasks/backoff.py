"""Pauses between attempts: longer after each failure, and out of step with other agents."""

from __future__ import annotations

import random


class Backoff:
    """The pauses of one task that retries something.

    Args:
        first_s: upper bound of the first pause, in seconds; it doubles with every failure.
        last_s: upper bound of all pauses, in seconds.
    """

    def __init__(self, first_s: float, last_s: float) -> None:
        self._first_s = first_s
        self._last_s = last_s
        self._next_s = first_s

    @property
    def longest_s(self) -> float:
        """Upper bound of the next pause, in seconds."""
        return self._next_s

    def reset(self) -> None:
        """Note a success: the pauses start from the first one again."""
        self._next_s = self._first_s

    def failed(self) -> float:
        """Note a failure; returns how many seconds to wait before the next attempt.

        The pause is random, from half of its upper bound to all of it.  Otherwise agents that lost
        etcd at the same instant would all come back at the same instant.
        """
        longest_s = self._next_s
        self._next_s = min(self._last_s, longest_s * 2)
        return longest_s * random.uniform(0.5, 1.0)
