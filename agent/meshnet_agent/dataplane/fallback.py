"""Which peers are in fallback, decided from probes (docs/design/fallback.md).

::

                     6 VXLAN probes of one size lost in a row, and the fallback answers
          ┌─ VXLAN ────────────────────────────────────────────────────────────────► fallback ─┐
          └────◄──── VXLAN answered for 10 s without loss; after another fall soon, 60 s ──────┘

A *round* is a small probe and one of full size by VXLAN.  A peer whose last round was not answered,
or that is in fallback, also gets one of full size by the fallback.  Rounds are one second apart, or
more with many peers, since probes a second are bounded; after a round without an answer they are
0.3 s apart.  A peer that answers neither tunnel stays where it is, and after some such rounds it
costs no more than other peers.

Pure: time is an argument, in seconds of a monotonic clock; imports no socket and no trio.
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
"""Most probes a second, all networks together; a burst may be as large."""
ROUND_S, FAST_S, TIMEOUT_S = 1.0, 0.3, 1.0
DEAD_PROBES = 6
"""So many lost in a row make a tunnel dead.  Where a fifth of all probes is lost, six in a row are
lost once in 16,000 rounds; three in a row would be every few minutes."""
ALIVE_PROBES = 3
"""Answers in a row, and no loss since, before packets may move to a tunnel."""
GIVE_UP_PROBES = 15
"""Lost in a row, after which a peer is no longer probed in quick rounds: it is dead, or its agent
knows no probes."""
HEALTHY_S, HEALTHY_LONGER_S, AGAIN_S = 10.0, 60.0, 300.0
HEALTHY_PROBES = 5


class ProbeKind(IntEnum):
    """The tunnel and the size of a probe."""

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
    """Since when and why a peer is in fallback.

    Attributes:
        since: when it fell, in the caller's time (seconds).
        why: the reason, as ``status`` shows it.
        healthy_s: how many seconds VXLAN must answer before it is used again.
    """

    since: float
    why: str
    healthy_s: float = HEALTHY_S


class Statistics(NamedTuple):
    """A network's VXLAN probes since start, and the last small probes' round trips."""

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
    """One peer.

    Attributes:
        due_at: when its next round is due.
        waiting: how many VXLAN probes of the last round are not answered.
        good_since: when VXLAN began to answer without loss; None: it lost its last probe.
        fell_at: when it fell last, to notice one that falls again soon.
    """

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
        now: the present, on the clock of `Fall.since`.
        statistics: by network, of those whose peers were probed.
    """

    falls: Mapping[Pair, Fall]
    now: float
    statistics: Mapping[NetworkName, Statistics]

    def of(self, network: NetworkName) -> Statistics:
        """The statistics of one network; zeros if none of its peers was probed."""
        return self.statistics.get(network, Statistics(0, 0, None, None))


class Fallback:
    """What is known of the tunnels to all peers.

    Args:
        first_id: where probe ids start; it must be hard to guess, or others could forge answers.
        now: the present, in seconds.

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
        """Take over peers that were in fallback before this agent started."""
        for pair in pairs:
            self.falls[pair] = Fall(now, "it was in fallback when this agent started")

    def follow(self, pairs: Collection[Pair], now: float) -> None:
        """Probe these peers, and no others."""
        for pair in self._peers.keys() - pairs:
            del self._peers[pair]
        for pair in self.falls.keys() - pairs:
            del self.falls[pair]
        # A network that is made again under a name begins with a count of its own.
        for network in self._counts.keys() - {network for network, _ in pairs}:
            del self._counts[network]
        for pair in sorted(pairs - self._peers.keys()):
            # Multiples of the golden ratio spread them evenly over a round, however many there are
            # and however many more come later.
            part = (len(self._peers) * 0.618034) % 1
            self._peers[pair] = _Peer(0.0)
            self._schedule(pair, now + part * ROUND_S)

    def due(self, now: float) -> list[Probe]:
        """The probes to send now, as far as the bound on probes a second allows."""
        passed_s = now - self._allowed_at
        self._allowance = min(RATE_PER_S, self._allowance + passed_s * RATE_PER_S)
        self._allowed_at = now
        probes: list[Probe] = []
        while self._due and self._due[0][0] <= now and self._allowance >= len(ProbeKind):
            due_at, pair = heapq.heappop(self._due)
            peer = self._peers.get(pair)
            if peer is None or peer.due_at != due_at:
                continue  # an old entry of the heap: the peer is gone, or was scheduled again
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
        """Whether to probe quickly, to find out soon."""
        small, full, _ = self._peers[pair].streams
        return pair not in self.falls and max(small.lost, full.lost) < GIVE_UP_PROBES

    def _schedule(self, pair: Pair, at: float) -> None:
        self._peers[pair].due_at = at
        heapq.heappush(self._due, (at, pair))

    def waits_for(self, network: NetworkName) -> bool:
        """Whether any probe of a network waits for an answer."""
        return any(sent.pair[0] == network for sent in self._sent.values())

    def pair_of(self, probe_id: int) -> Pair | None:
        """The peer that a probe went to; None: the probe does not wait for an answer."""
        sent = self._sent.get(probe_id)
        return sent.pair if sent is not None else None

    def answered(self, probe_id: int, rtt_ms: float, now: float) -> None:
        """Note the answer to a probe; ignored if it came too late or belongs to no probe.

        Args:
            probe_id: the probe's `Probe.id`.
            rtt_ms: round-trip time, as the userspace VTEP's process measured it.
            now: the present, in seconds.
        """
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

    def settle(self, now: float) -> set[Pair]:
        """Count probes that were not answered in time as lost, and decide.

        Returns:
            The networks and hosts whose packets leave by the other tunnel from now on.
        """
        for number, sent in list(self._sent.items()):
            if sent.at + TIMEOUT_S > now:
                break  # the dict keeps the order of sending: the rest is younger
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
                    moved.add(pair)
            elif self._is_healthy(peer, fall, now):
                del self.falls[pair]
                moved.add(pair)
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
            return True  # the fallback is the dead one: do not wait to go back
        return (
            peer.good_since is not None
            and now - peer.good_since >= fall.healthy_s
            and answered >= HEALTHY_PROBES
        )

    def report(self, now: float) -> FallbackReport:
        """Which peers are in fallback, and the probes' statistics."""
        return FallbackReport(
            falls=dict(self.falls),
            now=now,
            statistics={network: self.statistics(network) for network in self._counts},
        )

    def statistics(self, network: NetworkName) -> Statistics:
        """The statistics of one network's probes."""
        sent, lost = self._counts.get(network, (0, 0))
        rtts = [
            rtt
            for pair, peer in self._peers.items()
            if pair[0] == network and (rtt := peer.streams[ProbeKind.SMALL].rtt_ms) is not None
        ]
        if not rtts:
            return Statistics(sent, lost, None, None)
        return Statistics(sent, lost, round(median(rtts), 3), round(max(rtts), 3))
