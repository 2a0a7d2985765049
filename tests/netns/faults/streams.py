"""TCP streams with checked content between endpoints of a network, each to the next one."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.netns.faults.evidence import StreamEvent
from tests.netns.faults.programs import GoneError, Program

if TYPE_CHECKING:
    from tests.netns.faults.evidence import Endpoint

PORT = 7002
PERIOD_US = 20_000


@dataclass(frozen=True, slots=True)
class _Stream:
    id: int
    source: Endpoint
    target: Endpoint


class Streams:
    """One stream from every endpoint that has another one in its network.

    Attributes:
        events: what became of streams; emptied by who reads them.
    """

    def __init__(self) -> None:
        self._programs: dict[int, tuple[Endpoint, Program]] = {}
        self._streams: dict[int, _Stream] = {}
        self._ids = itertools.count(1)
        self._corrupt: dict[int, int] = {}
        self.events: list[StreamEvent] = []

    def change(self, come: list[Endpoint], gone: list[Endpoint]) -> None:
        """Endpoints have come and gone."""
        for endpoint in gone:
            for stream in list(self._streams.values()):
                if endpoint in (stream.source, stream.target):
                    self._close(stream)
            self._programs.pop(endpoint.id)[1].stop()
        for endpoint in come:
            program = Program(endpoint.member.container, "stream", PORT, PERIOD_US)
            self._programs[endpoint.id] = (endpoint, program)
        # Receivers start before their senders.
        sending = {stream.source.id for stream in self._streams.values()}
        for source, _ in list(self._programs.values()):
            if source.id not in sending:
                self._open(source)

    def stop(self) -> None:
        """End all."""
        for _, program in self._programs.values():
            program.stop()

    def collect(self) -> dict[int, int]:
        """Bring `events` up to date; returns when a block of each stream last arrived."""
        arrived = {}
        for id_ in list(self._programs):
            answers = self._ask(id_, "snapshot")
            for answer in answers:
                for book in (*answer["sent"], *answer["received"]):
                    stream = self._streams.get(book["id"])
                    if stream is not None:
                        self.events += self._events(stream, book)
                for book in answer["received"]:
                    arrived[book["id"]] = book["last_ns"]
        return {id_: arrived.get(id_, 0) for id_ in self._streams}

    def _open(self, source: Endpoint) -> None:
        others = [
            endpoint
            for endpoint, _ in self._programs.values()
            if endpoint.network_id == source.network_id and endpoint is not source
        ]
        if not others:
            return
        target = next((other for other in others if other.id > source.id), others[0])
        stream = _Stream(next(self._ids), source, target)
        versions = sorted(source.addresses.keys() & target.addresses.keys())
        version = versions[stream.id % len(versions)]
        self._streams[stream.id] = stream
        self._ask(source.id, f"open {stream.id} {target.addresses[version]}")

    def _close(self, stream: _Stream) -> None:
        # The sender ends first, as it would otherwise connect again.
        for end in (stream.source, stream.target):
            self._ask(end.id, f"close {stream.id}")
        del self._streams[stream.id]
        self._corrupt.pop(stream.id, None)

    def _ask(self, id_: int, *lines: str) -> list[dict[str, Any]]:
        try:
            return self._programs[id_][1].ask(*lines)
        except GoneError:
            return []

    def _events(self, stream: _Stream, book: dict[str, Any]) -> list[StreamEvent]:
        found = []
        for at_ns, reason in book["breaks"]:
            text = os.strerror(reason) if reason else "the other end closed it"
            found.append(StreamEvent(stream.source, stream.target, "broke", at_ns, at_ns, text))
        for from_ns, to_ns in book["pauses"]:
            text = f"for {(to_ns - from_ns) / 1e9:.2f} s"
            found.append(StreamEvent(stream.source, stream.target, "paused", from_ns, to_ns, text))
        corrupt = book["corrupt"] - self._corrupt.get(stream.id, 0)
        if corrupt > 0:
            self._corrupt[stream.id] = book["corrupt"]
            at_ns = book["corrupt_ns"]
            text = f"{corrupt} blocks are not what was sent"
            found.append(StreamEvent(stream.source, stream.target, "corrupt", at_ns, at_ns, text))
        return found
