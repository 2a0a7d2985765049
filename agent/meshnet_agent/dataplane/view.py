"""What the data plane last did, for the parts that go by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from meshnet_agent.dataplane.pass_values import PassResult


class DataplaneView(Protocol):
    """What the passes came to."""

    @property
    def result(self) -> PassResult:
        """Of the last pass that could run."""
        ...

    async def wait_for_pass(self) -> None:
        """Wait until the next pass over everything has ended."""
        ...

    async def settle(self) -> None:
        """Have a pass over everything that begins after this call, and wait until it has ended.

        Raises:
            KernelRefusedError: it could not run, or the firewall is not as it should be; both are
                tried again.  Or the agent is stopping, and there are no more passes.
        """
        ...


class PassListener(Protocol):
    """A part that is told when a pass over everything has ended."""

    def passed(self, result: PassResult) -> None:
        """It ended so.  Returns at once."""
        ...
