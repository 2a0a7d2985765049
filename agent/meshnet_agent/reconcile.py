"""The reconciler: the only place that decides what to write to the host's network stack.

A pass is: observe the underlay → dump the kernel → plan from the snapshot → diff → apply, all in
the kernel's thread on values taken beforehand, so that the event loop stays free.  A pass runs when
something raised the flag (the store, the kernel, an endpoint) and at every resync; it always looks
at everything, and with nothing to do it writes nothing.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.backends import NexthopIds
from meshnet.diff import Failure, Table, diff, missing_endpoint_links
from meshnet.errors import MeshnetError
from meshnet.plan import LocalView, NetworkOutcome, plan_mesh
from meshnet_agent.flag import Flag

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from meshnet.backends import Underlay
    from meshnet.kernel import Kernel
    from meshnet.model import IpAddress, MeshSnapshot, NetworkName
    from meshnet_agent.worker import Worker

_log = structlog.get_logger()
_PAUSE_S = 0.02
"""Shortest time between two passes: a burst of events becomes one pass."""
_RETRY_S = (0.5, 30.0)
"""First and last delay before failed operations are tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInput:
    """What a pass works on: values, safe to hand to the kernel's thread."""

    snapshot: MeshSnapshot
    local: LocalView
    underlay_ip: IpAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """How a pass went.

    Attributes:
        missing: names of endpoint links that were not there.
        own_tunnels: names of the VXLAN devices, for the monitor.
        writes: operations carried out or tried.
        again: links were made or changed, which makes the kernel drop what hung on them.
    """

    networks: Mapping[NetworkName, NetworkOutcome] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    missing: frozenset[str] = frozenset()
    underlay: Underlay | None = None
    writes: int = 0
    again: bool = False
    seconds: float = 0.0


def run_pass(kernel: Kernel, ids: NexthopIds, given: PassInput) -> PassResult:
    """One pass, in the kernel's thread.

    Raises:
        MeshnetError: the underlay address is gone.
        OSError: the kernel did not answer.
    """
    started = time.monotonic()
    peers = {h.underlay_ip for h in given.snapshot.hosts.values() if h.id != given.local.host}
    underlay = kernel.observe(given.underlay_ip, None)
    underlay = replace(underlay, paths=kernel.find_paths(peers))
    actual = kernel.dump()
    ids.adopt(actual.nexthops, actual.foreign_nexthop_ids)
    plan = plan_mesh(given.snapshot, given.local, underlay, ids)
    ops = diff(plan.state, actual)
    if given.snapshot.holes:
        # Design decision D5: deletions need a complete snapshot.
        ops = [op for op in ops if op.value is not None or op.key in plan.state.links]
    failures = kernel.apply(ops) if ops else []
    return PassResult(
        networks=plan.networks,
        failures=tuple(failures),
        missing=frozenset(missing_endpoint_links(plan.state, actual)),
        underlay=underlay,
        writes=len(ops),
        again=any(op.table is Table.LINK for op in ops),
        seconds=time.monotonic() - started,
    )


class Reconciler:
    """Runs passes.

    Attributes:
        result: of the last pass that could run.
        blocked: why the last pass could not run at all, or None.
        passes: that ran, since start.
        writes: operations of all passes, since start.

    Args:
        gather: takes the values for a pass.
        on_missing: called with endpoint links that are gone.
        resync_s: longest time between two passes, give or take a tenth: agents spread out.
        next_change_s: seconds until what `gather` returns changes by the clock alone.
    """

    def __init__(
        self,
        worker: Worker[Kernel],
        gather: Callable[[], PassInput],
        on_missing: Callable[[Collection[str]], None],
        *,
        resync_s: float,
        next_change_s: Callable[[], float],
    ) -> None:
        self.result = PassResult()
        self.passes = 0
        self.writes = 0
        self.running = False
        self.blocked: str | None = None
        self._worker = worker
        self._gather = gather
        self._on_missing = on_missing
        self._resync_s = resync_s
        self._next_change_s = next_change_s
        self._ids = NexthopIds()
        self._dirty = Flag()
        self._passed = trio.Event()

    def mark_dirty(self) -> None:
        """Ask for a pass."""
        self._dirty.set()

    @property
    def in_sync(self) -> bool:
        """Whether the last pass left nothing to do and nothing has happened since."""
        return bool(
            self.passes
            and self.blocked is None
            and not self.result.failures
            and not self.running
            and not self._dirty.is_set
        )

    @property
    def pending(self) -> int:
        """Operations that failed and wait to be tried again, plus one for a pass that is due."""
        return len(self.result.failures) + (self.running or self._dirty.is_set)

    async def wait_for_pass(self) -> None:
        """Wait until the next pass has ended."""
        await self._passed.wait()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run passes for ever; started after the first one.

        A failed operation is tried again with growing delays; a pass that could not run at all
        (the underlay address is gone) likewise.
        """
        started = False
        retry_s = _RETRY_S[0]
        self.mark_dirty()
        while True:
            wait_s = min(self._resync_s * random.uniform(0.9, 1.1), self._next_change_s())
            if self.blocked is not None or self.result.failures:
                wait_s = min(wait_s, retry_s * random.uniform(0.5, 1.0))
                retry_s = min(_RETRY_S[1], retry_s * 2)
            else:
                retry_s = _RETRY_S[0]
            with trio.move_on_after(wait_s):
                await self._dirty.wait()
            await self._pass()
            if not started and self.passes:
                started = True
                task_status.started()
            await trio.sleep(_PAUSE_S)

    async def _pass(self) -> None:
        given = self._gather()
        self.running = True
        before = {str(f) for f in self.result.failures}
        try:
            self.result = await self._worker.run(lambda k: run_pass(k, self._ids, given))
        except (MeshnetError, OSError) as error:
            # The underlay's address is gone, nft is missing, a dump was cut short: what is in the
            # kernel stays, and the next pass may find it mended.
            if str(error) != self.blocked:
                _log.error("pass not possible", reason=str(error))
            self.blocked = str(error)
            return
        finally:
            self.running = False
        self.blocked = None
        self.passes += 1
        self.writes += self.result.writes
        for failure in self.result.failures:
            if str(failure) not in before:
                _log.error("kernel refused", operation=str(failure.op), reason=failure.reason)
        if self.result.writes:
            _log.info(
                "kernel programmed",
                operations=self.result.writes,
                failed=len(self.result.failures),
                seconds=round(self.result.seconds, 3),
            )
        if self.result.again:
            self.mark_dirty()
        if self.result.missing:
            self._on_missing(self.result.missing)
        self._passed.set()
        self._passed = trio.Event()
