"""Hosts of a simulated mesh that change all the time, at a rate; one seed gives one sequence."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bench.simulated import SimulatedHost, SimulatedMesh

_FIRST_MOVE = 500_000
"""Underlay numbers from here on are for hosts that move; those below have been given at birth."""


class Join(NamedTuple):
    """A host that joined, and when its put began."""

    at: float
    host: SimulatedHost


class Changes:
    """Makes random changes, one transaction each.

    Every second change keeps the number of hosts about what it was: joins, of which every other one
    takes a subnet that was free before, and leaves.  The others are moves to another underlay
    address, exchanges of subnets between two hosts, and subnets that pass to a new host.

    Attributes:
        count: changes so far.
        joins: those of them that were joins.
        written: moment after each, and its revision.
    """

    def __init__(self, mesh: SimulatedMesh, seed: int) -> None:
        self.count = 0
        self.joins: list[Join] = []
        self.written: list[tuple[float, int]] = []
        self._mesh = mesh
        self._random = random.Random(seed)
        self._numbers = list(mesh.hosts)
        self._target = len(self._numbers)
        self._freed: list[int] = []
        self._moves = 0
        self._kinds: list[tuple[Callable[[], None], int]] = [
            (self._join_or_leave, 50),
            (self._move, 30),
            (self._swap, 10),
            (self._inherit, 10),
        ]

    def run(self, seconds: float, rate: float) -> float:
        """Make so many changes a second for so long; returns the rate that was reached."""
        began = time.monotonic()
        kinds, weights = zip(*self._kinds, strict=True)
        while (elapsed := time.monotonic() - began) < seconds:
            early_s = self.count / rate - elapsed
            if early_s > 0:
                time.sleep(early_s)
            self._random.choices(kinds, weights)[0]()
            self.count += 1
            self.written.append((time.monotonic(), self._mesh.gateway.revision))
        return self.count / (time.monotonic() - began)

    def _pick(self) -> int:
        return self._random.randrange(len(self._numbers))

    def _take(self) -> SimulatedHost:
        """A random host, of which nothing is remembered here any more."""
        index = self._pick()
        number, self._numbers[index] = self._numbers[index], self._numbers[-1]
        self._numbers.pop()
        return self._mesh.hosts[number]

    def _join_or_leave(self) -> None:
        if len(self._numbers) > self._target:
            gone = self._take()
            self._mesh.remove([gone])
            self._freed.append(gone.subnet)
            return
        (host,) = self._mesh.new_hosts(1)
        if self._freed and self._random.random() < 0.5:
            host = host._replace(subnet=self._freed.pop(0))
        self.joins.append(Join(time.monotonic(), host))
        self._mesh.add([host])
        self._numbers.append(host.number)

    def _move(self) -> None:
        self._moves += 1
        host = self._mesh.hosts[self._numbers[self._pick()]]
        self._mesh.move(host, _FIRST_MOVE + self._moves)

    def _swap(self) -> None:
        one, other = (self._mesh.hosts[self._numbers[self._pick()]] for _ in range(2))
        if one != other:
            self._mesh.swap(one, other)

    def _inherit(self) -> None:
        self._numbers.append(self._mesh.inherit(self._take()).number)
