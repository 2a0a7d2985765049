"""When a soak's gauge is flat."""

from __future__ import annotations

from tests.netns.faults.gauges import drifts


def line(start: float, end: float, seconds: int = 400) -> list[tuple[float, float]]:
    """One that rises evenly."""
    return [(at, start + (end - start) * at / seconds) for at in range(seconds)]


def test_what_grows_is_told_and_what_does_not_is_not() -> None:
    series = {
        "h1: agent, RSS KiB": line(60_000, 90_000),
        "h2: agent, RSS KiB": line(60_000, 62_000),
        "h1: kernel, routes": line(30, 90),
        "h2: kernel, routes": line(90, 30),
        "etcd: etcd, keys": line(20, 21),
    }
    found = drifts(series, 400)
    assert [sentence.partition(" grew")[0] for sentence in found] == [
        "h1: agent, RSS KiB",
        "h1: kernel, routes",
    ]


def test_growth_in_the_first_quarter_is_no_growth() -> None:
    points = [(float(at), 20.0 if at < 100 else 200.0) for at in range(400)]
    assert drifts({"h1: agent, descriptors": points}, 400) == []
    points = [(float(at), 20.0 if at < 300 else 200.0) for at in range(400)]
    assert drifts({"h1: agent, descriptors": points}, 400) != []


def test_a_host_that_came_for_a_visit_is_passed_over() -> None:
    visit = [(at, value) for at, value in line(10, 99) if 150 <= at < 160 or at > 380]
    series = {"h1: kernel, routes": line(30, 30), "h4: kernel, routes": visit}
    assert drifts(series, 400) == []


def test_what_is_of_visitors_only_is_passed_over() -> None:
    starting = [(150.0, 3.0), (160.0, 4.0), (350.0, 12.0), (390.0, 14.0)]
    series = {"h1: kernel, routes": line(30, 30), "h1: VTEP, descriptors": starting}
    assert drifts(series, 400) == []
    seldom = [(at, value) for at, value in line(10, 99) if at % 5 == 0]
    assert drifts(series | {"etcd: etcd, keys": seldom}, 400) != []
