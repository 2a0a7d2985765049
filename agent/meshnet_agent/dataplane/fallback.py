"""Which peers are in fallback, decided from probes (docs/design/fallback.md).

::

                     6 VXLAN probes of one size lost in a row, and the fallback answers
          ┌─ VXLAN ────────────────────────────────────────────────────────────────► fallback ─┐
          └────◄──── VXLAN answered for 10 s without loss; after another fall soon, 60 s ──────┘

A *round* is a small probe and one of full size by VXLAN, and, for a peer whose last round was not
answered or that is in fallback, one of full size by the fallback.  Rounds are a second apart, or
further with many peers, since there is a bound on probes a second; after one that is not answered
they are 0.3 s apart.  A peer that answers neither stays where it is, and after some such
rounds costs no more than others.

Pure: time is an argument; knows no socket and no trio.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from enum import IntEnum
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from meshnet.model import HostId, NetworkName

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

Pair = tuple[NetworkName, HostId]

RATE_PER_S = 100.0
"""Probes of all networks together, with a burst of as many."""
ROUND_S, FAST_S, TIMEOUT_S = 1.0, 0.3, 1.0
DEAD_PROBES = 6
"""With a fifth of all probes lost six in a row are lost once in 16,000 rounds."""
ALIVE_PROBES = 3
"""Answers in a row, and no loss since, that a tunnel must have given to be moved to."""
GIVE_UP_PROBES = 15
HEALTHY_S, HEALTHY_LONGER_S, AGAIN_S = 10.0, 60.0, 300.0
HEALTHY_PROBES = 5


class ProbeKind(IntEnum):
    """What a probe probes."""

    SMALL = 0
    FULL = 1
    FALLBACK = 2


class Probe(NamedTuple):
    """A probe to be sent now."""

    id: int
    pair: Pair
    kind: ProbeKind


@dataclass(frozen=True, slots=True)
class Fall:
    """That a peer is in fallback.

    Attributes:
        healthy_s: how long VXLAN must answer before it is used again.
    """

    since: float
    why: str
    healthy_s: float = HEALTHY_S


class Statistics(NamedTuple):
    """Of a network's VXLAN probes: since start, and round trips of the last small ones."""

    sent: int
    lost: int
    rtt_p50_ms: float | None
    rtt_max_ms: float | None


@dataclass(slots=True)
class _Stream:
    """Probes of one kind to one peer: how many in a row were lost, and answered."""

    lost: int = 0
    answered: int = 0
    rtt_ms: float | None = None


@dataclass(slots=True)
class _Peer:
    """A peer; `waiting`: VXLAN probes of the last round that are not answered."""

    due_at: float
    sent_at: float = 0.0
    waiting: int = 0
    good_since: float | None = None
    fell_at: float | None = None
    streams: tuple[_Stream, _Stream, _Stream] = field(
        default_factory=lambda: (_Stream(), _Stream(), _Stream())
    )


class _Sent(NamedTuple):
    pair: Pair
    kind: ProbeKind
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackReport:
    """What the probes found.

    Attributes:
        falls: peers in fallback.
        now: the time that `Fall.since` counts in.
        statistics: of networks whose peers were probed.
    """

    falls: Mapping[Pair, Fall]
    now: float
    statistics: Mapping[NetworkName, Statistics]

    def of(self, network: NetworkName) -> Statistics:
        """What the probes of one network came to."""
        return self.statistics.get(network, Statistics(0, 0, None, None))


class Fallback:
    """What is known of the tunnels to all peers.

    Args:
        first_id: of the first probe; a number nobody can guess.

    Attributes:
        falls: peers in fallback.
    """

    def __init__(self, first_id: int, now: float) -> None:
        self.falls: dict[Pair, Fall] = {}
        self._peers: dict[Pair, _Peer] = {}
        self._due: list[tuple[float, Pair]] = []
        self._sent: dict[int, _Sent] = {}
        self._next_id = first_id
        self._allowance, self._allowed_at = RATE_PER_S, now
        self._counts: dict[NetworkName, list[int]] = {}
        self._news: set[Pair] = set()

    @property
    def fallen(self) -> frozenset[Pair]:
        """Peers in fallback."""
        return frozenset(self.falls)

    @property
    def round_s(self) -> float:
        """Seconds between two rounds to a peer that answers."""
        return max(ROUND_S, 2 * len(self._peers) / (0.9 * RATE_PER_S))

    def adopt(self, pairs: Iterable[Pair], now: float) -> None:
        """Take over peers that are in fallback since before this agent started."""
        for pair in pairs:
            self.falls[pair] = Fall(now, "it was so when this agent started")

    def follow(self, pairs: Collection[Pair], now: float) -> None:
        """Probe these peers, and no others."""
        for pair in self._peers.keys() - pairs:
            del self._peers[pair]
        for pair in self.falls.keys() - pairs:
            del self.falls[pair]
        for pair in sorted(pairs - self._peers.keys()):
            # Spread over a round, whatever order they come in.
            part = (len(self._peers) * 0.618034) % 1
            self._peers[pair] = _Peer(0.0)
            self._schedule(pair, now + part * ROUND_S)

    def due(self, now: float) -> list[Probe]:
        """The probes to send now, as far as there may be."""
        passed_s = now - self._allowed_at
        self._allowance = min(RATE_PER_S, self._allowance + passed_s * RATE_PER_S)
        self._allowed_at = now
        probes: list[Probe] = []
        while self._due and self._due[0][0] <= now and self._allowance >= len(ProbeKind):
            due_at, pair = heapq.heappop(self._due)
            peer = self._peers.get(pair)
            if peer is None or peer.due_at != due_at:
                continue  # gone, or scheduled anew
            kinds = [ProbeKind.SMALL, ProbeKind.FULL]
            if peer.waiting or pair in self.falls:
                kinds.append(ProbeKind.FALLBACK)
            self._allowance -= len(kinds)
            probes += [self._send(pair, kind, now) for kind in kinds]
            peer.sent_at, peer.waiting = now, 2
            self._schedule(pair, now + (FAST_S if self._is_in_doubt(pair) else self.round_s))
        return probes

    def _send(self, pair: Pair, kind: ProbeKind, now: float) -> Probe:
        self._next_id += 1
        self._sent[self._next_id] = _Sent(pair, kind, now)
        if kind is not ProbeKind.FALLBACK:
            self._counts.setdefault(pair[0], [0, 0])[0] += 1
        return Probe(self._next_id, pair, kind)

    def _is_in_doubt(self, pair: Pair) -> bool:
        """Whether to be quick about finding out."""
        small, full, _ = self._peers[pair].streams
        return pair not in self.falls and max(small.lost, full.lost) < GIVE_UP_PROBES

    def _schedule(self, pair: Pair, at: float) -> None:
        self._peers[pair].due_at = at
        heapq.heappush(self._due, (at, pair))

    def waits_for(self, network: NetworkName) -> bool:
        """Whether a probe of a network is not answered."""
        return any(sent.pair[0] == network for sent in self._sent.values())

    def pair_of(self, probe_id: int) -> Pair | None:
        """Whom a probe that is not answered went to."""
        sent = self._sent.get(probe_id)
        return sent.pair if sent is not None else None

    def answered(self, probe_id: int, rtt_ms: float, now: float) -> None:
        """A probe was answered; one that is not waited for (any more) is none."""
        sent = self._sent.pop(probe_id, None)
        peer = self._peers.get(sent.pair) if sent is not None else None
        if sent is None or peer is None:
            return
        self._news.add(sent.pair)
        stream = peer.streams[sent.kind]
        stream.lost, stream.answered, stream.rtt_ms = 0, stream.answered + 1, rtt_ms
        if sent.kind is ProbeKind.FALLBACK:
            return
        if peer.good_since is None:
            peer.good_since = now
        if sent.at == peer.sent_at:
            peer.waiting -= 1
            if not peer.waiting:
                self._schedule(sent.pair, sent.at + self.round_s)

    def settle(self, now: float) -> set[HostId]:
        """Count what was not answered in time, and decide.

        Returns:
            Hosts whose packets leave by the other tunnel from now on.
        """
        for number, sent in list(self._sent.items()):
            if sent.at + TIMEOUT_S > now:
                break  # later ones were sent later
            del self._sent[number]
            self._lose(sent)
        moved = set()
        news, self._news = self._news, set()
        for pair in news:
            peer, fall = self._peers.get(pair), self.falls.get(pair)
            if peer is None:
                continue
            if fall is None:
                why = self._why_fall(peer)
                if why is not None:
                    self._fall(pair, peer, why, now)
                    moved.add(pair[1])
            elif self._is_healthy(peer, fall, now):
                del self.falls[pair]
                moved.add(pair[1])
        return moved

    def _lose(self, sent: _Sent) -> None:
        peer = self._peers.get(sent.pair)
        if peer is None:
            return
        self._news.add(sent.pair)
        stream = peer.streams[sent.kind]
        stream.lost, stream.answered = stream.lost + 1, 0
        if sent.kind is not ProbeKind.FALLBACK:
            self._counts[sent.pair[0]][1] += 1
            peer.good_since = None

    def _fall(self, pair: Pair, peer: _Peer, why: str, now: float) -> None:
        again = peer.fell_at is not None and now - peer.fell_at < AGAIN_S
        peer.fell_at = now
        self.falls[pair] = Fall(now, why, HEALTHY_LONGER_S if again else HEALTHY_S)

    @staticmethod
    def _why_fall(peer: _Peer) -> str | None:
        small, full, fallback = peer.streams
        if max(small.lost, full.lost) < DEAD_PROBES:
            return None
        if fallback.lost or fallback.answered < ALIVE_PROBES:
            return None
        if small.lost >= DEAD_PROBES:
            return "VXLAN probes are not answered, the fallback's are"
        return "VXLAN probes of full MTU are not answered, the fallback's are"

    @staticmethod
    def _is_healthy(peer: _Peer, fall: Fall, now: float) -> bool:
        small, full, fallback = peer.streams
        answered = min(small.answered, full.answered)
        if fallback.lost >= DEAD_PROBES and answered >= ALIVE_PROBES:
            return True  # the fallback is what is dead
        return (
            peer.good_since is not None
            and now - peer.good_since >= fall.healthy_s
            and answered >= HEALTHY_PROBES
        )

    def report(self, now: float) -> FallbackReport:
        """Who is in fallback, and what the probes came to."""
        return FallbackReport(
            falls=dict(self.falls),
            now=now,
            statistics={network: self.statistics(network) for network in self._counts},
        )

    def statistics(self, network: NetworkName) -> Statistics:
        """What the probes of one network came to."""
        sent, lost = self._counts.get(network, (0, 0))
        rtts = [
            rtt
            for pair, peer in self._peers.items()
            if pair[0] == network and (rtt := peer.streams[ProbeKind.SMALL].rtt_ms) is not None
        ]
        if not rtts:
            return Statistics(sent, lost, None, None)
        return Statistics(sent, lost, round(median(rtts), 3), round(max(rtts), 3))
