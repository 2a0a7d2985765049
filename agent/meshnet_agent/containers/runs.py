"""A container's runs: launched, started, watched to their end, restarted as its options say.

A run has ended when its conmon has.  That may happen at any moment, even while a client waits for
another step, so whoever acts on a container takes its lock and then looks at its state again.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import ConflictError, MeshnetError, NotFoundError
from meshnet.runtime.engine.conmon import read_exit
from meshnet.runtime.spec.options import parse_restart
from meshnet_agent.containers.launch import launch
from meshnet_agent.containers.processes import is_alive, wait_for_end
from meshnet_agent.containers.record import State
from meshnet_agent.tasks.backoff import Backoff

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from meshnet_agent.containers.cleanup import Cleanup
    from meshnet_agent.containers.directory import Container, ContainerDirectory
    from meshnet_agent.containers.networking import Networking
    from meshnet_agent.containers.record import ProcessId
    from meshnet_agent.containers.runtime import RuntimeProvider

_log = structlog.get_logger()
_FIRST_DELAY_S, _LAST_DELAY_S = 0.1, 60.0
_LASTING_S = 10.0
"""A run that lasted longer counts as good: the pauses before restarts begin anew."""
_AGAIN_S = (1.0, 60.0)
"""Pauses before what failed at a container's end is tried again."""
_LOST_STATUS = 255
"""Status of a container whose exit nobody saw: the host went down, or its conmon was killed."""
_AT_ONCE = 4
"""How many containers are made or taken down at the same time; others wait."""


class Runs:
    """Runs of this host's containers."""

    def __init__(
        self,
        directory: ContainerDirectory,
        runtime: RuntimeProvider,
        networking: Networking,
        cleanup: Cleanup,
    ) -> None:
        self._directory = directory
        self._runtime = runtime
        self._networking = networking
        self._cleanup = cleanup
        self._slots = trio.CapacityLimiter(_AT_ONCE)
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over the containers that are in the directory, then watch for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for container in self._directory.all():
                record = container.record
                if record.state is State.EXITED:
                    nursery.start_soon(self._found_exited, container)
                elif record.shim is not None and is_alive(record.shim):
                    self._watch(container, record.shim)
                else:
                    nursery.start_soon(self._found_ended, container)
            task_status.started()
            await trio.sleep_forever()

    # --- beginning ------------------------------------------------------------------------------

    async def launch(self, container: Container) -> None:
        """Make a process that waits to be started, and watch it.

        Raises:
            MeshnetError: the class says why; what was made is in the record and in the bundle.
        """
        runtime = await self._runtime.get()
        async with container.lock, self._slots:
            record = container.record
            self._check_there(container)
            if record.state not in (State.CREATING, State.EXITED):
                raise ConflictError(f"container {record.name} is already {record.state}")
            await launch(container, runtime, self._directory, self._networking)
        assert container.record.shim is not None
        self._watch(container, container.record.shim)

    async def prepare(self, container: Container) -> None:
        """Make an exited container wait to be started again, over its own writable layer.

        One that waits already is left as it is.

        Raises:
            ConflictError: it runs.
        """
        if container.record.state is State.EXITED:
            with trio.CancelScope(shield=True):
                await self._prepare_again(container)
        elif container.record.state is not State.CREATED:
            record = container.record
            raise ConflictError(
                f"container {record.name} is {record.state}: stop it first, or restart it"
            )

    async def _prepare_again(self, container: Container) -> None:
        exit_code = container.record.exit_code
        # `ended` is not set if a restart by its policy still waits for its time.  That restart
        # finds the container started, and gives up.
        container.ended = trio.Event() if container.ended.is_set() else container.ended
        await container.change(stopped=False, restarts=0, error=None)
        try:
            await self.launch(container)
        except BaseException as error:
            if container.record.state is State.EXITED and container in self._directory:
                await self._undo_launch(container, exit_code, str(error))
                container.ended.set()
            raise

    async def start(self, container: Container) -> None:
        """Start the process of a created container; an exited container is first made again.

        Raises:
            ConflictError: it runs.
        """
        runtime = await self._runtime.get()
        if container.record.state is State.EXITED:
            await self.prepare(container)
        async with container.lock:
            record = container.record
            self._check_there(container)
            if record.state is not State.CREATED:
                raise ConflictError(
                    f"container {record.name} is {record.state}: stop it first, or restart it"
                )
            with trio.CancelScope(shield=True):
                # Disk first: a running process that is recorded as waiting would be started twice.
                await container.change(state=State.RUNNING, started_s=time.time())
                await runtime.start(record.id)
        _log.info("container started", container=record.name, id=record.id)

    def _check_there(self, container: Container) -> None:
        """Refuse one that was removed while its lock was waited for."""
        if container not in self._directory:
            raise NotFoundError(f"container {container.record.name} was removed meanwhile")

    # --- watching -------------------------------------------------------------------------------

    def _watch(self, container: Container, shim: ProcessId) -> None:
        if self._nursery is None:
            raise RuntimeError("containers are watched only while run() runs")
        self._nursery.start_soon(self._wait_for_end, container, shim)

    async def _surely(
        self, container: Container, what: str, step: Callable[[], Awaitable[object]]
    ) -> None:
        """Do a step of a container's end, again and again until it is done; `status` names it.

        No container may end the agent, whatever the disk, the kernel or the runtime answers.

        Args:
            what: what is so as long as it is not done.
            step: may be done again after it has failed.
        """
        backoff = Backoff(*_AGAIN_S)
        while True:
            try:
                with trio.CancelScope(shield=True):
                    await step()
            except (MeshnetError, OSError) as error:
                if container not in self._directory:
                    return
                trouble = f"container {container.record.name} {what}: {error}"
                if container.trouble != trouble:  # logged once for each reason
                    _log.error("tried again", reason=trouble)
                container.trouble = trouble
                await trio.sleep(backoff.failed())
            else:
                container.trouble = None
                return

    async def _wait_for_end(self, container: Container, shim: ProcessId) -> None:
        await wait_for_end(shim)
        exit_code = read_exit(container.bundle.exits, container.record.id)
        if exit_code is None and container.record.process is not None:
            # Somebody killed conmon.  The program goes on, and nobody will know its status.
            await wait_for_end(container.record.process)
        await self._ended(container, exit_code)

    async def _found_ended(self, container: Container) -> None:
        """At the agent's start: it ended while no agent ran."""
        if container.record.state is State.CREATING:
            purge = partial(self._cleanup.purge, container, volumes=True)
            await self._surely(container, "is not removed", purge)
            return
        await self._ended(container, read_exit(container.bundle.exits, container.record.id))

    async def _found_exited(self, container: Container) -> None:
        """At the agent's start: it had ended before; a restart of it may have been under way."""
        await self._surely(container, "is not put away", partial(self._put_away, container))
        if container in self._directory and container.record.state is State.EXITED:
            await self._after_end(container, 0.0)

    async def _put_away(self, container: Container) -> None:
        async with container.lock, self._slots:
            # Somebody may have removed it, or started it, before its turn came.
            if container in self._directory and container.record.state is State.EXITED:
                await self._cleanup.put_away(container)
                await container.change(process=None, shim=None, endpoints=())

    async def _ended(self, container: Container, exit_code: int | None) -> None:
        """Put away what a container had, record how it ended, and do what its options say."""
        now = time.time()
        lasted_s = now - (container.record.started_s or now)
        note = partial(self._note_end, container, exit_code, now)
        await self._surely(container, "is not put away", note)
        if container not in self._directory:
            return  # removed while it was being started again
        record = container.record
        _log.info("container ended", container=record.name, exit_code=record.exit_code)
        # With --rm the end is not written, since the record goes: a crash before that leads to the
        # same clean-up.
        if not self._is_to_go(container):
            await self._surely(container, "has no record", partial(self._record_end, container))
        await self._after_end(container, lasted_s)

    async def _note_end(
        self, container: Container, exit_code: int | None, finished_s: float
    ) -> None:
        async with container.lock, self._slots:
            if container not in self._directory:
                return
            await self._cleanup.put_away(container)
            container.note(
                state=State.EXITED,
                exit_code=_LOST_STATUS if exit_code is None else exit_code,
                error="nobody saw how it ended" if exit_code is None else None,
                finished_s=finished_s,
                process=None,
                shim=None,
                endpoints=(),
            )

    async def _record_end(self, container: Container) -> None:
        async with container.lock:
            if container not in self._directory or container.record.state is not State.EXITED:
                return
            try:
                await container.change()
            except MeshnetError:
                # Whoever waits is told the true status, though it is not on disk yet.
                if not self._wants_restart(container):
                    container.ended.set()
                raise

    async def _after_end(self, container: Container, lasted_s: float) -> None:
        """Restart it, remove it, or let it be, as its options say."""
        if self._wants_restart(container):
            assert self._nursery is not None
            self._nursery.start_soon(self._restart, container, lasted_s)
            return
        if self._is_to_go(container):
            await self._surely(container, "is not removed", partial(self._forget, container))
        container.ended.set()

    async def _forget(self, container: Container) -> None:
        async with container.lock:
            if container in self._directory:
                try:
                    await self._cleanup.forget(container, volumes=True)
                except (MeshnetError, OSError):
                    container.ended.set()  # its client need not wait for its files
                    raise

    # --- restarting -----------------------------------------------------------------------------

    def _is_to_go(self, container: Container) -> bool:
        """Whether nothing is to stay of a container that has ended."""
        return container.record.options.rm and not self._wants_restart(container)

    def _wants_restart(self, container: Container) -> bool:
        record = container.record
        policy = parse_restart(record.options.restart)
        return (
            not record.stopped
            and container in self._directory
            and record.exit_code is not None
            and policy.wants(record.exit_code, record.restarts)
        )

    async def _restart(self, container: Container, lasted_s: float) -> None:
        """Start it again; if it cannot be made, try again after ever longer pauses."""
        failures = 0 if lasted_s > _LASTING_S else container.record.restarts
        while True:
            # The exponent has a limit, since a float does not hold 2 ** 1024.
            await trio.sleep(min(_LAST_DELAY_S, _FIRST_DELAY_S * 2 ** min(failures, 16)))
            record = container.record
            if record.state is not State.EXITED:
                return  # somebody started it meanwhile
            if not self._wants_restart(container):
                container.ended.set()
                return
            failures += 1
            exit_code = container.record.exit_code
            try:
                with trio.CancelScope(shield=True):
                    await container.change(restarts=container.record.restarts + 1)
                    await self.launch(container)
                    await self.start(container)
                    return
            except (MeshnetError, OSError) as error:
                _log.error("not restarted", container=container.record.name, reason=str(error))
                if container.record.state is not State.EXITED:
                    return  # its end is watched
                undo = partial(self._undo_launch, container, exit_code, str(error))
            await self._surely(container, "is not put away", undo)

    async def _undo_launch(self, container: Container, exit_code: int | None, error: str) -> None:
        """Return it to how it had ended, with the reason why it could not be made again."""
        async with container.lock:
            if container not in self._directory:
                return
            await self._cleanup.put_away(container)
            await container.change(
                exit_code=exit_code, error=error, process=None, shim=None, endpoints=()
            )
