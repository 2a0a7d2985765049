"""The reconciler: when to run which pass (`meshnet_agent.dataplane.passes`), and with what result.

A pass over everything runs when something asked for it (networks, this host's part in them, or the
kernel changed), at every resync, and while operations are refused.  Hosts that changed are gathered
in a set, never in a queue, and taken from it in batches; each batch costs a pass over its hosts
only.  All passes run in the kernel's thread, so that the event loop stays free.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import KernelRefusedError, MeshnetError
from meshnet.tables import Table
from meshnet_agent.dataplane.pass_values import PassResult
from meshnet_agent.dataplane.passes import Passes
from meshnet_agent.tasks.backoff import Backoff
from meshnet_agent.tasks.broadcast import Broadcast

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.kernel import Kernel
    from meshnet_agent.dataplane.dirty import Dirty
    from meshnet_agent.dataplane.inputs import PassInputs
    from meshnet_agent.dataplane.view import PassListener
    from meshnet_agent.tasks.right_of_way import RightOfWay
    from meshnet_agent.tasks.worker import Worker

_log = structlog.get_logger()
_PAUSE_S, _REST_S = 0.02, 1.0
"""Longest rest after any pass, and between two passes over everything.  Up to that, the rest is as
long as the pass was, so that a burst of events becomes one pass."""
_TRIFLE_S = 0.001
"""After a pass this short, a rest would cost more than it saves."""
_RETRY_S = (0.5, 30.0)
"""Upper bounds of the first and of the longest pause before failed operations are retried."""
_BATCH_HOSTS = 100
_LOGGED_FAILURES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PassesReport:
    """The results of passes (see the attributes of `Reconciler`)."""

    result: PassResult = field(default_factory=PassResult)
    blocked: str | None = None
    in_sync: bool = True
    pending: int = 0
    passes: int = 0
    full_passes: int = 0
    writes: int = 0


class Reconciler:
    """Runs passes: `meshnet_agent.dataplane.view.DataplaneView`.

    Attributes:
        result: of the last pass that could run.
        blocked: why the last pass could not run at all; None if it ran.
        passes: how many passes ran since start.
        full_passes: how many of them looked at everything.
        writes: operations of all passes since start.

    Args:
        inputs: gathers what passes work on.
        dirty: says what the next pass has to look at.
        right_of_way: the reconciler gives way before a pass over some hosts.
        resync_s: longest time between two passes over everything; a random tenth more or less
            spreads agents out.
    """

    def __init__(
        self,
        worker: Worker[Kernel],
        inputs: PassInputs,
        dirty: Dirty,
        right_of_way: RightOfWay,
        resync_s: float,
    ) -> None:
        self.result = PassResult()
        self.passes = 0
        self.full_passes = 0
        self.writes = 0
        self.blocked: str | None = None
        self._worker = worker
        self._inputs = inputs
        self._dirty = dirty
        self._right_of_way = right_of_way
        self._resync_s = resync_s
        self._listeners: list[PassListener] = []
        self._runner = Passes()
        self._running = False
        self._passed = Broadcast()
        self._begun = self._ended = 0
        self._tried = Broadcast()
        self._over = False
        self._backoff = Backoff(*_RETRY_S)
        self._resync_at = self._rested_at = 0.0

    def tell(self, *listeners: PassListener) -> None:
        """Tell parts of every pass over everything from now on, in this order."""
        self._listeners += listeners

    @property
    def in_sync(self) -> bool:
        """Whether the last pass left nothing to do and nothing has happened since."""
        return bool(self.passes and self.blocked is None and not self.pending)

    @property
    def pending(self) -> int:
        """Work that is left: operations of the running pass, or one for a pass that is due, hosts
        that changed, and operations that failed and wait to be tried again."""
        due = max(self._runner.progress.left, self._running or self._dirty.everything)
        return due + self._dirty.hosts + len(self.result.failures)

    def report(self) -> PassesReport:
        """The results of passes so far."""
        return PassesReport(
            result=self.result,
            blocked=self.blocked,
            in_sync=self.in_sync,
            pending=self.pending,
            passes=self.passes,
            full_passes=self.full_passes,
            writes=self.writes,
        )

    async def wait_for_pass(self) -> None:
        """See `DataplaneView`."""
        await self._passed.wait()

    async def settle(self) -> None:
        """See `DataplaneView`."""
        self._dirty.mark_all()
        next_one = self._begun + 1
        while self._ended < next_one:
            if self._over:
                raise KernelRefusedError("no pass can run on this host: its agent is stopping")
            await self._tried.wait()
        if self.blocked is not None:
            raise KernelRefusedError(f"no pass can run on this host: {self.blocked}")
        for failure in self.result.failures:
            if failure.op.table in (Table.FIREWALL, Table.ELEMENT):
                raise KernelRefusedError(f"the firewall cannot be changed: {failure}")

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run passes.  Never returns; started after the first pass that could run.

        Failed operations are retried with growing pauses, and so is a pass that could not run at
        all (such as when the underlay address is gone).
        """
        try:
            await self._run_passes(task_status)
        finally:
            # Wake those who wait for a pass that will not come: clean-up of a container that ended
            # is shielded, and once kept an agent from stopping.
            self._over = True
            self._tried.send()

    async def _run_passes(self, task_status: trio.TaskStatus[None]) -> None:
        started = False
        while True:
            next_expiry_at = trio.current_time() + self._inputs.next_expiry_s()
            with trio.move_on_at(min(self._all_at, next_expiry_at)):
                await self._dirty.wait()
            if trio.current_time() >= self._all_at:
                await self._pass_over_all()
                self._plan_next()
                if self.passes and not started:
                    started = True
                    task_status.started()
            else:
                await self._right_of_way.give()
                await self._pass_over_some()
                if self.result.failures:
                    self._resync_at = min(
                        self._resync_at, trio.current_time() + self._backoff.longest_s
                    )
            if self.result.seconds > _TRIFLE_S:
                await trio.sleep(min(_PAUSE_S, self.result.seconds))

    @property
    def _all_at(self) -> float:
        """When to look at everything: at the resync, or after the rest if it was asked for."""
        if self._dirty.everything:
            return min(self._resync_at, self._rested_at)
        return self._resync_at

    def _plan_next(self) -> None:
        """After a pass over everything: set when the next one is due, if asked for and if not."""
        now = trio.current_time()
        if self.blocked is None and not self.result.failures:
            self._backoff.reset()
            wait_s = self._resync_s * random.uniform(0.9, 1.1)
        else:
            wait_s = min(self._resync_s, self._backoff.failed())
        self._resync_at = now + wait_s
        # A program that changes our objects all the time must cost half a processor at most.  No
        # rest after links changed: routes that the kernel dropped with them are missing.
        self._rested_at = now + (0 if self.result.again else min(_REST_S, self.result.seconds))

    async def _pass_over_all(self) -> None:
        self._dirty.clear_all()
        self._begun += 1
        given = self._inputs.gather()
        result = await self._run(lambda kernel: self._runner.run_all(kernel, given))
        self._ended = self._begun
        self._tried.send()
        if result is None:
            return
        self.full_passes += 1
        if self.result.again:
            self._dirty.mark_all()
        for listener in self._listeners:
            listener.passed(self.result)
        self._passed.send()

    async def _pass_over_some(self) -> None:
        given = self._inputs.gather_part(self._dirty.clear_some(_BATCH_HOSTS))
        if given is None:
            return
        if await self._run(lambda kernel: self._runner.run_part(kernel, given)) is None:
            self._dirty.mark_all()

    async def _run(self, work: Callable[[Kernel], PassResult | None]) -> PassResult | None:
        """Run a pass in the kernel's thread; None: it could not run, or gave up."""
        self._running = True
        before = {(f.op.table, f.op.key, f.reason) for f in self.result.failures}
        try:
            result = await self._worker.run(work)
        except (MeshnetError, OSError) as error:
            # The underlay's address is gone, nft is missing, or a dump was cut short.  The kernel
            # stays as it is, and by the next pass somebody may have put it right.
            if str(error) != self.blocked:
                _log.error("pass not possible", reason=str(error))
            self.blocked = str(error)
            return None
        finally:
            self._running = False
        if result is None:
            return None
        self.result = result
        self.blocked = None
        self.passes += 1
        self.writes += result.writes
        new = [f for f in result.failures if (f.op.table, f.op.key, f.reason) not in before]
        for failure in new[:_LOGGED_FAILURES]:
            _log.error("kernel refused", operation=str(failure.op), reason=failure.reason)
        if len(new) > _LOGGED_FAILURES:
            _log.error("kernel refused more", operations=len(new) - _LOGGED_FAILURES)
        if result.writes:
            log = _log.info if result.scope == "all" else _log.debug
            log(
                "kernel programmed",
                scope=result.scope,
                operations=result.writes,
                failed=len(result.failures),
                seconds=round(result.seconds, 4),
                **{stage: round(s, 4) for stage, s in asdict(result.stages).items()},
            )
        return result
