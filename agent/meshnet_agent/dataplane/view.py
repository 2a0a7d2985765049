"""What the data plane last did, for the parts that depend on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from meshnet_agent.dataplane.pass_values import PassResult


class DataplaneView(Protocol):
    """The results of passes."""

    @property
    def result(self) -> PassResult:
        """The result of the last pass that could run."""
        ...

    async def wait_for_pass(self) -> None:
        """Wait until the next pass over everything has ended."""
        ...

    async def settle(self) -> None:
        """Ask for a pass over everything that begins after this call, and wait for its end.

        Raises:
            KernelRefusedError: it could not run, or the kernel refused a change of the firewall;
                the reconciler retries both.  Or the agent is stopping, and no more passes come.
        """
        ...


class PassListener(Protocol):
    """A part that is told when a pass over everything has ended."""

    def passed(self, result: PassResult) -> None:
        """A pass over everything ended with `result`.  Returns at once."""
        ...
