"""What an agent takes over, and when: once, never in a loop, and back as the network ends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import trio

from meshnet.errors import ConflictError, KernelRefusedError, PolicyRefusedError
from meshnet.model import MeshSnapshot
from meshnet.modes import Mode
from meshnet_agent.dataplane.pass_values import PassResult
from meshnet_agent.dataplane.takeovers import Takeovers
from tests.unit.mesh import CountedDirty, MemoryTakeovers
from tests.values import make_network, make_snapshot, make_underlay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from meshnet.backends import Underlay

LAN = make_network("lan", ("10.9.0.0/16",), 9, mode=Mode.UNDERLAY_BRIDGE, parent="eth0")
RETRY_S = 300


@dataclass
class Host:
    """A host's takeovers, and the world around them."""

    runner: MemoryTakeovers = field(default_factory=MemoryTakeovers)
    snapshot: MeshSnapshot = field(default_factory=lambda: make_snapshot([LAN], 1))
    underlay: Underlay | None = field(default_factory=make_underlay)

    def __post_init__(self) -> None:
        self.dirty = CountedDirty()
        self.takeovers = Takeovers(self.runner, self, self.dirty)

    # As its mesh (`MeshView`).
    connected = True

    async def check_store(self) -> None:
        await trio.lowlevel.checkpoint()

    @property
    def state(self) -> str | None:
        return self.takeovers.states.get(LAN.name)

    async def look(self, after_s: float = 2) -> None:
        """Raise the flag and let things happen."""
        self.takeovers.passed(PassResult(underlay=self.underlay))
        await trio.sleep(after_s)


@pytest.fixture
async def host(autojump_clock: MockClock) -> AsyncIterator[Host]:
    """One whose store names a network, and that has taken nothing."""
    made = Host()
    async with trio.open_nursery() as nursery:
        await nursery.start(made.takeovers.run)
        yield made
        nursery.cancel_scope.cancel()


async def test_taken_when_a_network_appears_and_given_back_when_it_goes(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.look(0.1)
    assert (host.state, host.runner.asked) == (None, ["take mnp9"])
    await host.look()
    assert host.state == ""
    assert host.dirty.count == 1
    for _ in range(3):
        await host.look()
    assert host.runner.asked == ["take mnp9"]
    host.snapshot = MeshSnapshot()
    await host.look()
    assert host.runner.asked == ["take mnp9", "return mnp9"]
    assert host.takeovers.states == {}


async def test_nothing_happens_before_the_kernel_was_looked_at(
    autojump_clock: MockClock, host: Host
) -> None:
    host.underlay = None
    await host.look()
    assert host.runner.asked == []


async def test_a_failure_is_shown_and_tried_again_much_later(
    autojump_clock: MockClock, host: Host
) -> None:
    host.runner.failure = PolicyRefusedError("gateway silent")
    for _ in range(20):
        await host.look()
    assert host.runner.asked == ["take mnp9"]
    assert "gateway silent" in (host.state or "")
    await trio.sleep(RETRY_S)
    assert host.runner.asked == ["take mnp9"] * 2
    host.runner.failure = None
    await trio.sleep(RETRY_S)
    assert host.runner.asked == ["take mnp9"] * 3
    assert host.state == ""


async def test_a_network_made_anew_is_tried_at_once(autojump_clock: MockClock, host: Host) -> None:
    host.runner.failure = PolicyRefusedError("gateway silent")
    await host.look()
    host.runner.failure = None
    host.snapshot = make_snapshot([replace(LAN, mtu_bytes=1400)], 1)
    await host.look()
    assert host.state == ""


async def test_what_stands_at_the_start_is_recognised(autojump_clock: MockClock) -> None:
    host = Host(runner=MemoryTakeovers(taken={"mnp9": "eth0"}))
    async with trio.open_nursery() as nursery:
        await nursery.start(host.takeovers.run)
        assert host.state == ""
        await host.look()
        nursery.cancel_scope.cancel()
    assert host.runner.asked == []


async def test_what_is_taken_apart_is_mended_but_not_over_and_over(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.look()
    host.runner.taken.clear()
    await host.look()
    assert "somebody took link eth0 out of bridge mnp9" in (host.state or "")
    assert host.runner.asked == ["take mnp9"]
    await trio.sleep(RETRY_S)
    assert host.runner.asked == ["take mnp9"] * 2
    assert host.state == ""


async def test_while_the_store_has_holes_nothing_is_given_back(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.look()
    host.snapshot = MeshSnapshot(holes=frozenset({"/meshnet/v1/networks/lan"}))
    await host.look(1000)
    assert host.runner.asked == ["take mnp9"]
    host.snapshot = MeshSnapshot()
    await host.look()
    assert host.runner.asked == ["take mnp9", "return mnp9"]


@pytest.mark.parametrize(
    ("error", "pause_s"), [(ConflictError("endpoints"), 1), (KernelRefusedError("no"), 61)]
)
async def test_giving_back_is_tried_until_it_is_done(
    autojump_clock: MockClock, host: Host, error: ConflictError | KernelRefusedError, pause_s: float
) -> None:
    await host.look()
    host.snapshot = MeshSnapshot()
    host.runner.return_failure = error
    await host.look(0.6)
    assert host.runner.asked == ["take mnp9", "return mnp9"]
    await trio.sleep(pause_s)
    assert host.runner.asked == ["take mnp9", "return mnp9", "return mnp9"]
    host.runner.return_failure = None
    await trio.sleep(pause_s)
    assert host.runner.taken == {}
