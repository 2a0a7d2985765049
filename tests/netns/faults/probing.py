"""The traffic matrix: datagrams between all endpoints of a network, and what became of each.

One ``probe`` runs in each endpoint's namespace.  Here their books are put together: a loss is a gap
in what a receiver has, with the times its sender gave the datagrams around it; or, at the end, what
a sender sent and its receiver has not got though it had time to.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from meshnet.lab.poll import wait_until
from tests.netns.faults.evidence import Loss, Stray
from tests.netns.faults.programs import GoneError, Program

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.netns.faults.evidence import Endpoint

PORT = 7001
FOREIGN_EVERY = 16
"""To endpoints of other networks a datagram each so many rounds."""
_SETTLE_S = 1.0
"""How long a datagram may be on its way before it counts as lost."""


class PathId(NamedTuple):
    """One way of datagrams, by endpoints' ids."""

    source: int
    target: int
    version: int


class _Gap(NamedTuple):
    packets: int
    before_ns: int
    after_ns: int


class Book(NamedTuple):
    """What the probers say at one time.

    Attributes:
        sent: by path, how many were sent and when the last of them was.
        received: by path, the sequence number that comes next, and when the last that came was
            sent.
    """

    sent: dict[PathId, tuple[int, int]]
    received: dict[PathId, tuple[int, int]]


class Matrix:
    """The probers of all endpoints.

    Attributes:
        sent: datagrams, in all.
        strays: what came where it must not; emptied by who reads them.
    """

    def __init__(self, period_us: int) -> None:
        self._period_us = period_us
        self._probers: dict[int, tuple[Endpoint, Program]] = {}
        self._gaps: dict[PathId, dict[int, _Gap]] = {}
        self._tails: dict[PathId, tuple[int, _Gap]] = {}
        self._told: dict[tuple[PathId, int], int] = {}
        self._overruns: dict[int, int] = {}
        self._unsent: dict[int, int] = {}
        self._collected_ns = 0
        self.sent = 0
        self._sent: dict[PathId, int] = {}
        self.strays: list[Stray] = []

    @property
    def overruns(self) -> int:
        """Datagrams that probers had no room for, in all."""
        return sum(self._overruns.values())

    @property
    def unsent(self) -> int:
        """Datagrams that probers could not send for want of memory, in all."""
        return sum(self._unsent.values())

    def add(self, newcomer: Endpoint) -> None:
        """Start to probe from and to an endpoint."""
        program = Program(
            newcomer.member.container,
            "probe",
            *(newcomer.id, newcomer.network_id, PORT, self._period_us, FOREIGN_EVERY),
        )
        self._probers[newcomer.id] = (newcomer, program)
        others = [found for found, _ in self._probers.values() if found is not newcomer]
        program.ask(*(line for other in others for line in _target_lines(newcomer, other)))
        for other in others:
            self._ask(other.id, *_target_lines(other, newcomer))

    def remove(self, gone: Endpoint) -> None:
        """End to probe from and to an endpoint."""
        _, program = self._probers.pop(gone.id)
        for id_ in list(self._probers):
            self._ask(id_, f"del {gone.id}", f"forget {gone.id}")
        program.stop()
        for path in [path for path in self._sent if gone.id in path[:2]]:
            del self._sent[path]
            self._tails.pop(path, None)

    def stop(self) -> None:
        """End all."""
        for _, program in self._probers.values():
            program.stop()

    def paths(self) -> Iterable[PathId]:
        """All ways on which datagrams must arrive."""
        endpoints = [endpoint for endpoint, _ in self._probers.values()]
        for source in endpoints:
            for target in endpoints:
                if source is not target and source.network_id == target.network_id:
                    for version in source.addresses.keys() & target.addresses.keys():
                        yield PathId(source.id, target.id, version)

    def read(self) -> Book:
        """Ask all probers."""
        book = Book({}, {})
        for id_, (endpoint, _) in list(self._probers.items()):
            answers = self._ask(id_, f"snapshot {self._collected_ns}")
            if answers:
                self._enter(endpoint, answers[0], book)
        return book

    def collect(self) -> None:
        """Bring `losses` up to date: all that was sent before this call has arrived or is lost."""
        before = self.read()
        book = before

        def missing() -> dict[PathId, tuple[int, _Gap]]:
            found = {}
            for path, (sent, last_ns) in before.sent.items():
                come, come_ns = book.received.get(path, (0, 0))
                if come < sent:
                    found[path] = (come, _Gap(sent - come, come_ns, last_ns))
            return found

        def settled() -> bool:
            nonlocal book
            book = self.read()
            return not missing()

        try:
            wait_until(settled, _SETTLE_S, "all that was sent arrives")
        except TimeoutError:
            self._tails = missing()
        else:
            self._tails = {}
        # What comes late may still change gaps that are this young.
        self._collected_ns = time.monotonic_ns() - 2 * int(_SETTLE_S * 1e9)

    def new_losses(self, endpoints: dict[int, Endpoint], expected: dict[PathId, int]) -> list[Loss]:
        """Losses that `collect` has found and that were not told before.

        Args:
            expected: since when datagrams of a path must arrive; those of others need not.
        """
        found = []
        for path in {*self._gaps, *self._tails} & expected.keys():
            gaps = dict([self._tails[path]]) if path in self._tails else {}
            gaps |= self._gaps.get(path, {})
            for first, gap in gaps.items():
                # More may have been lost at the end of a path since that was told.
                packets = gap.packets - self._told.get((path, first), 0)
                if packets > 0 and gap.before_ns >= expected[path]:
                    self._told[path, first] = gap.packets
                    source, target = endpoints[path.source], endpoints[path.target]
                    found.append(
                        Loss(source, target, path.version, packets, gap.before_ns, gap.after_ns)
                    )
        self._forget()
        return sorted(found, key=lambda loss: loss.before_ns)

    def _forget(self) -> None:
        """Forget losses that are told and that no prober will speak of again."""
        for path, gaps in list(self._gaps.items()):
            for first in [f for f, gap in gaps.items() if gap.after_ns < self._collected_ns]:
                del gaps[first]
                self._told.pop((path, first), None)
            if not gaps:
                del self._gaps[path]

    def _ask(self, id_: int, *lines: str) -> list[dict[str, Any]]:
        """Ask one; nothing if it has ended, which is for others to notice."""
        try:
            return self._probers[id_][1].ask(*lines)
        except GoneError:
            return []

    def _enter(self, endpoint: Endpoint, answer: dict[str, Any], book: Book) -> None:
        for id_, version, foreign, sent, _first_ns, last_ns, _errors in answer["targets"]:
            path = PathId(endpoint.id, id_, version)
            self.sent += sent - self._sent.get(path, 0)
            self._sent[path] = sent
            if not foreign:
                book.sent[path] = (sent, last_ns)
        for id_, version, _received, following, _first_ns, last_ns, _, _, gaps in answer["sources"]:
            path = PathId(id_, endpoint.id, version)
            book.received[path] = (following, last_ns)
            # The prober's own list is the newer one, for all that it still has.
            known = {
                first: gap
                for first, gap in self._gaps.get(path, {}).items()
                if gap.after_ns < self._collected_ns
            }
            known |= {
                first: _Gap(last - first + 1, before_ns, after_ns)
                for first, last, before_ns, after_ns in gaps
            }
            self._gaps[path] = known
        for network_id, *rest in answer["strays"]:
            self.strays.append(Stray(endpoint, network_id, *rest))
        self._overruns[endpoint.id] = answer["overruns"]
        self._unsent[endpoint.id] = answer["unsent"]


def _target_lines(source: Endpoint, target: Endpoint) -> list[str]:
    kind = "own" if source.network_id == target.network_id else "foreign"
    return [
        f"add {target.id} {version} {address} {kind}"
        for version, address in target.addresses.items()
        if version in source.addresses
    ]
