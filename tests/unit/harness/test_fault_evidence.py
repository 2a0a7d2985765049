"""What the fault harness excuses, and what it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from tests.netns.faults.evidence import Cut, Endpoint, Evidence, Loss, Stray, StreamEvent, judge
from tests.netns.faults.mesh import Member

if TYPE_CHECKING:
    from meshnet.lab.host import LabContainer

PERIOD = 1_000_000
SECOND = 1_000_000_000
NOBODY = cast("LabContainer", None)


def endpoint(id_: int, host: str, address: str, network_id: int = 1) -> Endpoint:
    member = Member(host, "red", NOBODY, {})
    return Endpoint(id_, member, network_id, {4: address}, 0)


ONE, TWO = endpoint(1, "h1", "10.42.0.2"), endpoint(2, "h2", "10.42.1.2")
BOTH = {1: ONE, 2: TWO}


def loss(from_s: float, to_s: float, count: int = 100) -> Evidence:
    return Evidence([Loss(ONE, TWO, 4, count, int(from_s * SECOND), int(to_s * SECOND))])


def cut(from_s: float, to_s: float, host: str = "h1") -> Cut:
    return Cut(
        lambda source, target: host in (source.host, target.host),
        int(from_s * SECOND),
        int(to_s * SECOND),
    )


@pytest.mark.parametrize(
    ("cuts", "lost"),
    [
        ([], 100),
        ([cut(0, 9)], 0),
        ([cut(0, 9, "h3")], 100),
        ([cut(2, 4)], 0),
        ([cut(2.5, 4)], 25),
        ([cut(2, 3)], 50),
        ([cut(2, 3), cut(3, 4)], 0),
        ([cut(3, 4), cut(2, 2.5)], 25),
        ([cut(5, 9)], 100),
    ],
)
def test_only_what_was_sent_during_a_cut_is_excused(cuts: list[Cut], lost: int) -> None:
    verdict = judge(loss(2, 4), cuts, BOTH, PERIOD)
    assert abs(verdict.lost - lost) <= 1  # the edges of a cut are known to a few periods
    assert verdict.lost + verdict.lost_on_cut == 100
    assert bool(verdict.violations) == bool(lost)


def test_what_this_machine_dropped_is_told_apart() -> None:
    evidence = loss(2, 4)
    evidence.machine_drops, evidence.overruns = 20, 10
    verdict = judge(evidence, [], BOTH, PERIOD)
    assert (verdict.lost, verdict.starved, verdict.overruns) == (70, 30, 10)
    assert verdict.violations
    evidence.machine_drops = 100
    assert judge(evidence, [], BOTH, PERIOD).violations == []


def test_a_datagram_for_the_former_owner_of_an_address_is_late_and_not_astray() -> None:
    former, other = endpoint(3, "h2", "10.42.1.2"), endpoint(4, "h2", "10.42.1.9")
    known = {**BOTH, 3: former, 4: other}
    seen = Evidence(strays=[Stray(TWO, 1, 1, 3, 4, 2 * SECOND, 2 * SECOND)])
    assert judge(seen, [], known, PERIOD).misdelivered == 1  # its owner is there
    former.ended_ns = 3 * SECOND
    assert judge(seen, [], known, PERIOD).misdelivered == 1  # was still there
    former.ended_ns = SECOND
    verdict = judge(seen, [], known, PERIOD)
    assert (verdict.misdelivered, verdict.late, verdict.violations) == (0, 1, [])
    other.ended_ns = SECOND
    for stray in (
        Stray(TWO, 1, 1, 4, 4, 2 * SECOND, 2 * SECOND),  # had another address
        Stray(TWO, 7, 1, 3, 4, 2 * SECOND, 2 * SECOND),  # comes from another network
        Stray(TWO, 1, 1, 99, 4, 2 * SECOND, 2 * SECOND),  # never was there
    ):
        assert judge(Evidence(strays=[stray]), [cut(0, 9)], known, PERIOD).misdelivered == 1


def test_a_fault_may_open_the_way_to_another_network_but_to_nobody_else() -> None:
    other = endpoint(5, "h2", "10.43.1.2", network_id=2)
    known = {**BOTH, 5: other}
    opened = Cut(lambda _one, _two: False, SECOND, 3 * SECOND, lambda one, _two: one.host == "h1")
    for sent_s, meant, cuts, leaked in (
        (2, 5, [opened], True),
        (2, 5, [], False),
        (4, 5, [opened], False),  # the way is closed again
        (2, 2, [opened], False),  # for another endpoint
    ):
        stray = Stray(other, 1, 1, meant, 4, sent_s * SECOND, sent_s * SECOND)
        verdict = judge(Evidence(strays=[stray]), cuts, known, PERIOD)
        assert (verdict.leaked, verdict.misdelivered) == (int(leaked), int(not leaked))


def test_streams_may_break_and_pause_on_cut_paths_only_and_be_corrupt_on_none() -> None:
    def events(what: str) -> Evidence:
        return Evidence(events=[StreamEvent(ONE, TWO, what, 3 * SECOND, 4 * SECOND)])

    for what in ("broke", "paused"):
        assert judge(events(what), [], BOTH, PERIOD).violations
        assert judge(events(what), [cut(0, 2)], BOTH, PERIOD).violations
        assert judge(events(what), [cut(2, 3.5, "h2")], BOTH, PERIOD).violations == []
    assert judge(events("corrupt"), [cut(0, 9)], BOTH, PERIOD).violations
