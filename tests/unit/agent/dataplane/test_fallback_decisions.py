"""Which peers are in fallback: decided from probes that a simulated world answers."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from meshnet.model import HostId, NetworkName
from meshnet_agent.dataplane.fallback import Fallback, Pair, ProbeKind

PROD = NetworkName("prod")
H2, H3 = (PROD, HostId("h2")), (PROD, HostId("h3"))
Answers = Callable[[Pair, ProbeKind], bool]
TICK_S, RTT_S = 0.1, 0.002


class World:
    """Ticks as the agent does; `answers` says what becomes of a probe."""

    def __init__(self, *pairs: Pair) -> None:
        self.now = 100.0
        self.paths = Fallback(1000, self.now)
        self.paths.follow(set(pairs), self.now)
        self.answers: Answers = lambda _pair, _kind: True
        self.moves: list[tuple[float, Pair]] = []
        self.sent: list[tuple[float, Pair, ProbeKind]] = []
        self._pending: list[int] = []

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            for number in self._pending:
                self.paths.answered(number, RTT_S * 1000, self.now)
            self._pending = []
            for probe in self.paths.due(self.now):
                self.sent.append((self.now, probe.pair, probe.kind))
                if self.answers(probe.pair, probe.kind):
                    self._pending.append(probe.id)
            self.moves += [(self.now, pair) for pair in self.paths.settle(self.now)]
            self.now += TICK_S


def vxlan_dead(*dead: Pair) -> Answers:
    return lambda pair, kind: pair not in dead or kind is ProbeKind.FALLBACK


@pytest.mark.parametrize("phase", [i / 7 for i in range(7)])
def test_a_pair_whose_port_is_blocked_falls_within_five_seconds_and_no_other(phase: float) -> None:
    world = World(H2, H3)
    world.run(20 + phase)
    assert world.moves == []
    assert not [kind for _, _, kind in world.sent if kind is ProbeKind.FALLBACK]
    blocked_at, world.answers = world.now, vxlan_dead(H2)
    world.run(60)
    ((moved_at, pair),) = world.moves
    assert pair == H2
    assert 1 < moved_at - blocked_at < 4
    assert world.paths.fallen == {H2}
    assert "not answered" in world.paths.falls[H2].why


def test_full_packets_that_get_lost_are_reason_enough() -> None:
    world = World(H2)
    world.answers = lambda _pair, kind: kind is not ProbeKind.FULL
    world.run(8)
    assert world.paths.fallen == {H2}
    assert "full MTU" in world.paths.falls[H2].why


def test_back_after_ten_healthy_seconds_then_sixty() -> None:
    world = World(H2)
    for healthy_s in (10, 60, 60):
        world.answers = vxlan_dead(H2)
        world.run(10)
        assert world.paths.fallen == {H2}
        since, world.answers = world.now, lambda _pair, _kind: True
        world.run(healthy_s + 5)
        assert not world.paths.fallen
        assert healthy_s <= world.moves[-1][0] - since < healthy_s + 2
    world.run(400)
    world.answers = vxlan_dead(H2)
    world.run(10)
    world.answers = lambda _pair, _kind: True
    world.run(15)
    assert not world.paths.fallen
    assert len(world.moves) == 8


def test_one_loss_begins_the_ten_seconds_again() -> None:
    world = World(H2)
    world.answers = vxlan_dead(H2)
    world.run(10)
    for _ in range(5):
        world.answers = lambda _pair, _kind: True
        world.run(8)
        world.answers = vxlan_dead(H2)
        world.run(1.5)
    assert world.paths.fallen == {H2}
    assert len(world.moves) == 1


def test_who_answers_neither_kind_stays_where_it_is() -> None:
    world = World(H2, H3)
    world.answers = lambda pair, _kind: pair != H2
    world.run(600)
    assert world.moves == []
    # It costs no more than a peer that answers, except for the fallback's probes.
    late = [pair for at, pair, kind in world.sent if at > 200 and kind is ProbeKind.SMALL]
    assert late.count(H2) == pytest.approx(late.count(H3), rel=0.1)
    # It comes back with VXLAN blocked.
    world.answers = vxlan_dead(H2)
    world.run(10)
    assert world.paths.fallen == {H2}
    # In fallback it dies, and stays there too.
    world.answers = lambda pair, _kind: pair != H2
    world.run(300)
    assert world.paths.fallen == {H2}


def test_a_fallback_that_dies_while_vxlan_answers_is_left_at_once() -> None:
    world = World(H2)
    world.answers = vxlan_dead(H2)
    world.run(10)
    world.answers = lambda _pair, kind: kind is not ProbeKind.FALLBACK
    world.run(9)
    assert world.paths.fallen == frozenset()


@pytest.mark.parametrize("seed", range(5))
def test_a_fifth_of_all_probes_lost_makes_nothing_flap(seed: int) -> None:
    chance = random.Random(seed)
    world = World(H2, H3)
    world.answers = lambda _pair, _kind: chance.random() >= 0.2
    world.run(1800)
    # It may go into fallback, seldom; then it stays there.
    assert len(world.moves) <= 2


def test_what_was_in_fallback_before_a_restart_is_so_after_it() -> None:
    world = World()
    world.paths.adopt([H2], world.now)
    world.paths.follow({H2, H3}, world.now)
    world.answers = vxlan_dead(H2)
    world.run(60)
    assert world.moves == []
    assert world.paths.fallen == {H2}
    world.paths.follow({H3}, world.now)
    assert world.paths.fallen == frozenset()


def test_many_peers_are_probed_in_turn_with_a_hundred_probes_a_second() -> None:
    pairs = [(PROD, HostId(f"h{i}")) for i in range(1000)]
    world = World(*pairs)
    world.run(100)
    counts = [0] * 100
    by_pair = dict.fromkeys(pairs, 0)
    for at, pair, _ in world.sent:
        counts[int(at - 100)] += 1
        by_pair[pair] += 1
    assert max(counts) <= 205  # the burst at start, and a second's worth
    assert len(world.sent) <= 10_200
    assert min(by_pair.values()) >= 6
    assert max(by_pair.values()) <= 12
    # A pair whose port is blocked is found within a turn and a little.
    world.answers = vxlan_dead(pairs[500])
    world.run(30)
    assert world.paths.fallen == {pairs[500]}
    # Fifty dead hosts must not make it forget the rest.
    dead = set(pairs[:50])
    world.answers = lambda pair, _kind: pair not in dead
    world.run(90)
    world.answers = lambda pair, kind: pair not in dead and (pair != pairs[999] or kind > 1)
    world.run(45)
    assert pairs[999] in world.paths.fallen


def test_statistics() -> None:
    world = World(H2, H3)
    world.run(10)
    found = world.paths.statistics(PROD)
    assert found.sent >= 36
    assert (found.lost, found.rtt_p50_ms, found.rtt_max_ms) == (0, 2.0, 2.0)
    assert world.paths.statistics(NetworkName("other")).rtt_p50_ms is None
    assert world.paths.pair_of(7) is None
    world.paths.answered(7, 1.0, world.now)  # of nothing that was asked


def test_a_network_that_is_made_again_begins_to_count_anew() -> None:
    world = World(H2)
    world.answers = lambda _pair, _kind: False
    world.run(20)
    assert world.paths.report(world.now).statistics
    world.paths.follow(set(), world.now)
    assert not world.paths.report(world.now).statistics
