"""The data plane as a test wants it: a fake of `meshnet_agent.dataplane.reconciler.Reconciler`."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from meshnet_agent.dataplane.pass_values import PassResult


@dataclass
class FakeDataPlane:
    """Whose last pass was as the test says.

    Attributes:
        dirty: how often a pass was asked for.
    """

    result: PassResult = field(default_factory=PassResult)
    dirty: int = 0

    def mark_dirty(self) -> None:
        """See `meshnet_agent.dataplane.view.DataplaneView`."""
        self.dirty += 1

    async def wait_for_pass(self) -> None:
        """No pass ends but those that are settled for."""
        await trio.sleep_forever()

    async def settle(self) -> None:
        """See `meshnet_agent.dataplane.view.DataplaneView`."""
        self.mark_dirty()
        await trio.lowlevel.checkpoint()
