"""Takes over the links that networks want (`Backend.takeover_bridge`), and gives them back later.

A link is given back when its network is gone.  Links are dealt with one after the other.  Processes
that outlive this agent do the work (`meshnet.kernel.takeover`), and confirm or undo it by
themselves.  A takeover that failed, or that somebody took apart, is retried after `_RETRY_S` and no
sooner, so that the host's link does not flap.  Stopping the agent gives nothing back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import structlog
import trio

from meshnet.backends.table import backend_of
from meshnet.errors import ConflictError, MeshnetError
from meshnet.plan import plan_takeovers
from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.backends import Underlay
    from meshnet.model import IpAddress, MeshSnapshot, Network, NetworkName
    from meshnet_agent.dataplane.dirty import Dirty
    from meshnet_agent.dataplane.pass_values import PassResult
    from meshnet_agent.mesh.view import MeshView

_log = structlog.get_logger()
_RETRY_S = 300.0
_GIVE_BACK_AGAIN_S = (0.5, 60.0)
"""Pauses before another attempt to give a link back: while its endpoints are being removed, and
after an error."""


class TakeoverRunner(Protocol):
    """Takes links over: `meshnet.kernel.takeover.process.TakeoverProcesses`, or a fake."""

    def bridges(self) -> list[str]:
        """The bridges that have taken over a link, or were about to."""
        ...

    async def standing(self) -> dict[str, str]:
        """The takeovers that are complete and confirmed: link by bridge."""
        ...

    async def take_over(self, bridge: str, parent: str, gateways: Sequence[IpAddress]) -> None:
        """Put a bridge in the place of a link, or leave everything as it was.

        Raises:
            MeshnetError: it did not succeed, and was undone.
        """
        ...

    async def give_back(self, bridge: str) -> None:
        """Move everything that a bridge has back to its link.

        Raises:
            ConflictError: endpoints are still attached to the bridge.
            MeshnetError: it did not succeed.
        """
        ...


class _Try(NamedTuple):
    """The last attempt for a bridge: for which network, and when."""

    network: Network
    at: float


class Takeovers:
    """This host's takeovers.

    Args:
        dirty: marked when `states` changed.

    Attributes:
        states: by network, why its parent is not taken over; "" if it is (`LocalView.takeovers`).
    """

    def __init__(self, runner: TakeoverRunner, mesh: MeshView, dirty: Dirty) -> None:
        self.states: dict[NetworkName, str] = {}
        self._runner = runner
        self._mesh = mesh
        self._dirty = dirty
        self._underlay: Underlay | None = None
        self._tries: dict[str, _Try] = {}
        self._complaints: dict[str, str] = {}
        self._look = Flag()
        self._again_at = float("inf")

    def passed(self, result: PassResult) -> None:
        """See `PassListener`: links may have come or gone."""
        self._underlay = result.underlay
        self._look.set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over and give back.  Never returns; started once existing takeovers are known."""
        standing = await self._runner.standing()
        for network in self._mesh.snapshot.networks.values():
            bridge = backend_of(network).takeover_bridge(network)
            if bridge is not None and standing.get(bridge) == network.parent:
                self.states[network.name] = ""
        task_status.started()
        while True:
            with trio.move_on_at(self._again_at):
                await self._look.wait()
            self._again_at = float("inf")
            snapshot, underlay = self._mesh.snapshot, self._underlay
            if underlay is None:
                continue
            wanted = plan_takeovers(snapshot, underlay)
            named = {backend_of(n).takeover_bridge(n) for n in snapshot.networks.values()}
            try:
                standing = await self._runner.standing()
                # An unreadable value may be the network that a bridge belongs to.
                if not snapshot.holes:
                    for bridge in set(self._runner.bridges()) - named:
                        await self._give_back(bridge)
            except MeshnetError as error:
                self._complain("", str(error))
                self._again_in(_RETRY_S)
                continue
            self._forget(snapshot)
            for bridge, network in wanted.items():
                await self._bring(bridge, network, standing)

    async def _bring(self, bridge: str, network: Network, standing: dict[str, str]) -> None:
        """Have a network's parent taken over, unless that was tried not long ago."""
        parent = network.parent or ""
        if standing.get(bridge) == parent:
            self._set(network, "")
            return
        tried = self._tries.get(bridge)
        if tried is not None and tried.network == network:
            due = tried.at + _RETRY_S
            if trio.current_time() < due:
                if not self.states.get(network.name):
                    self._set(
                        network,
                        f"somebody took link {parent} out of bridge {bridge}, or removed the "
                        f"bridge: the agent tries again within {_RETRY_S:.0f} s; to have it do so "
                        "at once, restart the agent",
                    )
                self._again_at = min(self._again_at, due)
                return
        self._tries[bridge] = _Try(network, trio.current_time())
        if self.states.pop(network.name, None) is not None:
            self._dirty.mark_all()
        started = trio.current_time()
        try:
            await self._runner.take_over(bridge, parent, network.gateways)
        except MeshnetError as error:
            self._set(network, f"link {parent} is not taken over: {error}")
            self._again_in(_RETRY_S)
        else:
            seconds = round(trio.current_time() - started, 3)
            _log.info("link taken over", link=parent, bridge=bridge, seconds=seconds)
            self._set(network, "")

    async def _give_back(self, bridge: str) -> None:
        """Give a link back whose network is gone, once its endpoints are."""
        try:
            await self._runner.give_back(bridge)
        except ConflictError as error:
            self._complain(bridge, str(error))
            self._again_in(_GIVE_BACK_AGAIN_S[0])
        except MeshnetError as error:
            self._complain(bridge, str(error))
            self._again_in(_GIVE_BACK_AGAIN_S[1])
        else:
            _log.info("link given back", bridge=bridge)
            self._tries.pop(bridge, None)
            self._complaints.pop(bridge, None)
            self._dirty.mark_all()

    def _set(self, network: Network, state: str) -> None:
        if self.states.get(network.name) == state:
            return
        self.states[network.name] = state
        if state:
            _log.error("network not bridged", network=network.name, reason=state)
        self._dirty.mark_all()

    def _forget(self, snapshot: MeshSnapshot) -> None:
        for name in self.states.keys() - snapshot.networks.keys():
            del self.states[name]

    def _complain(self, bridge: str, reason: str) -> None:
        if self._complaints.get(bridge) != reason:
            self._complaints[bridge] = reason
            _log.error("takeover failed", bridge=bridge, reason=reason)

    def _again_in(self, seconds: float) -> None:
        self._again_at = min(self._again_at, trio.current_time() + seconds)
