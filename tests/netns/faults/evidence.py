"""Judges what traffic saw: what no fault excuses.  Pure: times and books are arguments.

All times are nanoseconds of CLOCK_MONOTONIC, which every namespace of a machine shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.netns.faults.fault import cuts_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tests.netns.faults.mesh import Member

_SLACK_PERIODS = 3
"""A loss is known as precisely as packets follow each other."""


@dataclass(slots=True, eq=False)
class Endpoint:
    """One incarnation of an endpoint.

    Attributes:
        id: never given again.
        network_id: of its network's incarnation.
        addresses: by IP version.
        began_ns: when it was first sent to.
        ended_ns: when it was last known to be there, if it is gone.
    """

    id: int
    member: Member
    network_id: int
    addresses: dict[int, str]
    began_ns: int
    ended_ns: int | None = None

    def __str__(self) -> str:
        return f"{self.member.host}/{self.member.network}#{self.id}"


@dataclass(frozen=True, slots=True)
class Loss:
    """Datagrams that were sent one after another and did not arrive.

    Attributes:
        before_ns: when the last one before them was sent.
        after_ns: when the first one after them was sent; or the last of themselves.
    """

    source: Endpoint
    target: Endpoint
    version: int
    count: int
    before_ns: int
    after_ns: int


@dataclass(frozen=True, slots=True)
class Stray:
    """A datagram at an endpoint that it was not for.

    Attributes:
        receiver: where it came.
        network_id: of its sender's network.
        source: id of its sender.
        destination: id of whom it was for.
    """

    receiver: Endpoint
    network_id: int
    source: int
    destination: int
    version: int
    sent_ns: int
    received_ns: int

    def is_late(self, endpoints: Mapping[int, Endpoint]) -> bool:
        """Whether it was for the former owner of its receiver's address, who was gone by then."""
        meant = endpoints.get(self.destination)
        return (
            meant is not None
            and meant.ended_ns is not None
            and meant.ended_ns <= self.received_ns
            and meant.network_id == self.network_id == self.receiver.network_id
            and meant.addresses.get(self.version) == self.receiver.addresses.get(self.version)
        )


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """Something that became of a TCP stream.

    Attributes:
        what: ``broke``, ``paused`` or ``corrupt``.
        detail: for people.
    """

    source: Endpoint
    target: Endpoint
    what: str
    from_ns: int
    to_ns: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Cut:
    """A time in which packets of some paths may be lost.

    Attributes:
        opens: between which endpoints of different networks packets may get through meanwhile.
    """

    cuts: Callable[[Member, Member], bool]
    from_ns: int
    to_ns: int
    opens: Callable[[Member, Member], bool] = cuts_nothing


@dataclass(slots=True)
class Verdict:
    """What was seen in a time, judged.

    Attributes:
        lost: datagrams lost on paths that nothing cut.
        lost_on_cut: datagrams lost on paths that a fault cut meanwhile.
        starved: those of `lost` for which this machine's own queues account; not in `lost`.
        overruns: datagrams that a prober had no room for; not in `lost`.
        misdelivered: datagrams that came where they must not.
        leaked: datagrams that came to another network while a fault had opened the way.
        late: datagrams for a former owner of an address.
        violations: what must not happen and did, as sentences.
    """

    lost: int = 0
    lost_on_cut: int = 0
    starved: int = 0
    overruns: int = 0
    misdelivered: int = 0
    leaked: int = 0
    late: int = 0
    violations: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Evidence:
    """What traffic saw in a time.

    Attributes:
        machine_drops: packets that the kernel's per-CPU queues dropped, of this whole machine.
        overruns: datagrams that probers' sockets had no room for.
    """

    losses: list[Loss] = field(default_factory=list)
    strays: list[Stray] = field(default_factory=list)
    events: list[StreamEvent] = field(default_factory=list)
    machine_drops: int = 0
    overruns: int = 0


def judge(
    evidence: Evidence, cuts: Sequence[Cut], endpoints: Mapping[int, Endpoint], period_ns: int
) -> Verdict:
    """Say what of the evidence no cut excuses.

    Losses that queues of this machine or buffers of the probers account for are not losses of the
    network.  They are counted apart, and only as many as there were overruns.

    Args:
        endpoints: all there ever were, by id.
        period_ns: time between two datagrams of a path.
    """
    verdict = Verdict(overruns=evidence.overruns)
    allowance = evidence.machine_drops + evidence.overruns
    for loss in evidence.losses:
        count = _count_outside(loss, cuts, period_ns)
        verdict.lost_on_cut += loss.count - count
        forgiven = min(count, allowance)
        allowance -= forgiven
        verdict.starved += forgiven
        verdict.lost += count - forgiven
        if count > forgiven:
            length_ms = (loss.after_ns - loss.before_ns) / 1e6
            verdict.violations.append(
                f"{count} datagrams (IPv{loss.version}) from {loss.source} to {loss.target} were "
                f"lost within {length_ms:.0f} ms after {loss.before_ns / 1e9:.3f} s, on a path "
                "that nothing cut"
            )
    for stray in evidence.strays:
        if stray.is_late(endpoints):
            verdict.late += 1
            continue
        if _is_leak(stray, cuts, endpoints):
            verdict.leaked += 1
            continue
        verdict.misdelivered += 1
        meant = endpoints.get(stray.destination, stray.destination)
        verdict.violations.append(
            f"a datagram (IPv{stray.version}) from {endpoints.get(stray.source, stray.source)} to "
            f"{meant} was delivered to {stray.receiver} at {stray.received_ns / 1e9:.3f} s"
        )
    verdict.violations += _judge_events(evidence.events, cuts, period_ns)
    return verdict


def _is_leak(stray: Stray, cuts: Sequence[Cut], endpoints: Mapping[int, Endpoint]) -> bool:
    """Whether a fault had opened the way that a datagram took, to whom it was for."""
    source = endpoints.get(stray.source)
    return (
        source is not None
        and stray.destination == stray.receiver.id
        and any(
            cut.opens(source.member, stray.receiver.member)
            and cut.from_ns <= stray.sent_ns <= cut.to_ns
            for cut in cuts
        )
    )


def _judge_events(
    events: Iterable[StreamEvent], cuts: Sequence[Cut], period_ns: int
) -> Iterable[str]:
    for event in events:
        source, target = event.source.member, event.target.member
        excused = any(
            (cut.cuts(source, target) or cut.cuts(target, source))
            and cut.from_ns - period_ns <= event.to_ns
            and event.from_ns <= cut.to_ns + period_ns
            for cut in cuts
        )
        if event.what == "corrupt" or not excused:
            yield (
                f"the TCP stream from {event.source} to {event.target} {event.what} at "
                f"{event.from_ns / 1e9:.3f} s ({event.detail}), on a path that nothing cut"
            )


def _count_outside(loss: Loss, cuts: Sequence[Cut], period_ns: int) -> int:
    """How many of a loss's datagrams were sent while nothing cut their path."""
    source, target = loss.source.member, loss.target.member
    slack_ns = _SLACK_PERIODS * period_ns
    at = loss.before_ns
    outside_ns = 0
    for cut in sorted(cuts, key=lambda cut: cut.from_ns):
        if not cut.cuts(source, target) or cut.to_ns + slack_ns <= at:
            continue
        outside_ns += max(0, min(cut.from_ns - slack_ns, loss.after_ns) - at)
        at = max(at, cut.to_ns + slack_ns)
    outside_ns += max(0, loss.after_ns - at)
    return math.ceil(loss.count * outside_ns / max(1, loss.after_ns - loss.before_ns))
