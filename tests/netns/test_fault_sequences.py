"""The fault harness sees what it must see, and one short sequence of faults passes."""

from __future__ import annotations

import re
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.faults import probing, streams
from tests.netns.faults.mesh import AGENT_ARGS
from tests.netns.faults.sequence import run_sequence
from tests.netns.faults.stage import Stage
from tests.netns.mesh import address_of
from tests.netns.talk import open_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from meshnet.lab.topology import Lab
    from tests.netns.faults.evidence import Verdict
    from tests.netns.faults.mesh import Member

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
TABLE = "table inet hand"


@pytest.fixture
def stage(make_lab: MakeLab) -> Iterator[Stage]:
    with Stage(make_lab(2, up=False, agent_args=AGENT_ARGS)) as made:
        yield made


def member(stage: Stage, host: str, network: str = "red") -> Member:
    return next(m for m in stage.mesh.members if (m.host, m.network) == (host, network))


def rule(place: Member, hook: str, text: str) -> None:
    """A rule in an endpoint's namespace."""
    place.container.run(["nft", f"{TABLE} {{ chain c {{ type {hook} priority 0; {text}; }}; }}"])


def judge_until(stage: Stage, good: Callable[[Verdict], object]) -> Verdict:
    """Judge again and again until a verdict is as it should be."""
    found: list[Verdict] = []

    def seen() -> bool:
        found.append(stage.traffic.judge())
        return bool(good(found[-1]))

    wait_until(seen, 10, "it is seen")
    return found[-1]


def test_harness_sees_what_goes_wrong(stage: Stage) -> None:
    check_loss(stage)
    check_misdelivery(stage)
    check_streams(stage)


def check_loss(stage: Stage) -> None:
    one, two = member(stage, "h1"), member(stage, "h2")
    assert stage.traffic.judge().violations == []
    assert stage.traffic.sent > 50

    # Every datagram that is lost, and no other.
    text = f"ip saddr {address_of(one.document)} udp dport {probing.PORT}"
    rule(two, "filter hook input", f"{text} numgen inc mod 20 7 counter drop")

    def dropped() -> int:
        listed = two.container.run(["nft", "list", "table", "inet", "hand"]).stdout
        found = re.search(r"packets (\d+)", listed)
        return int(found[1]) if found else 0

    wait_until(lambda: dropped() > 3, 10, "some are dropped")
    two.container.run(["nft", "insert", "rule", "inet", "hand", "c", "accept"])
    count = dropped()
    two.container.run(["nft", "delete", "table", "inet", "hand"])
    verdict = stage.traffic.judge()
    assert verdict.lost == count
    assert len(verdict.violations) == count
    assert all(
        re.search(r"^1 datagrams \(IPv4\) from h1/red#\d+ to h2/red#\d+ were", sentence)
        for sentence in verdict.violations
    )
    assert stage.traffic.judge().violations == []


def check_misdelivery(stage: Stage) -> None:
    one, two = member(stage, "h1"), member(stage, "h2")
    # One that comes to another endpoint of its network.
    other = stage.mesh.add("h2", "red")
    stage.settle()
    there = address_of(other.document)
    text = f"ip daddr {address_of(two.document)} udp dport {probing.PORT}"
    rule(one, "route hook output", f"{text} ip daddr set {there}")
    verdict = judge_until(stage, lambda verdict: verdict.misdelivered)
    one.container.run(["nft", "delete", "table", "inet", "hand"])
    assert any(
        re.search(r"h1/red#\d+ to h2/red#\d+ was delivered to h2/red#\d+", sentence)
        for sentence in verdict.violations
    )

    # One of another network.
    datagram = struct.pack("=IIIIQq", 0x6D6E7072, 999, 1, 1, 0, 0)
    with open_socket(one.container, socket.SOCK_DGRAM, 4) as sender:
        sender.sendto(datagram, (there, probing.PORT))
    assert judge_until(stage, lambda verdict: verdict.misdelivered).violations


def check_streams(stage: Stage) -> None:
    two = member(stage, "h2")
    judge_until(stage, lambda verdict: not verdict.violations)
    # One byte of each block's content: 32 bytes of TCP header and 24 of the block's before it.
    rule(two, "filter hook input", f"tcp dport {streams.PORT} @th,512,8 set 0x5a")
    verdict = judge_until(stage, lambda verdict: "corrupt" in str(verdict.violations))
    assert verdict.lost == verdict.misdelivered == 0
    two.container.run(["nft", "delete", "table", "inet", "hand"])
    stage.traffic.wait_streams(10)
    stage.traffic.judge()
    rule(two, "filter hook input", f"tcp dport {streams.PORT} reject with tcp reset")
    verdict = judge_until(stage, lambda verdict: "broke" in str(verdict.violations))
    assert "corrupt" not in str(verdict.violations)
    two.container.run(["nft", "delete", "table", "inet", "hand"])
    stage.traffic.wait_streams(10)


def test_short_sequence(stage: Stage) -> None:
    said: list[str] = []
    quick = ("agent killed", "kernel object removed", "etcd killed")
    report = run_sequence(7, 3, 2, only=quick, stage=stage, say=said.append)
    assert report.broken == [], "\n".join(said)
    assert sum(len(step.faults) for step in report.steps) == 3
    assert stage.traffic.sent > 1000
