"""Makes, starts, ends and removes this host's containers; finds them again after a restart.

A container's life, each step on disk before the next (docs/run.md)::

    creating ── mount, conmon create, attach networks ──► created ── start ──► running ──► exited
                                                             ▲                               │
                                                             └───────── --restart ───────────┘

conmon, not the agent, is the parent of a container's process, so the agent may end and come back.
The process waits until its networks are attached, so it never runs without them.

`meshnet_agent.containers.runs` starts containers and watches them; this module does what clients
ask for by name.
"""

from __future__ import annotations

import secrets
import signal
import time
from typing import TYPE_CHECKING

import trio

from meshnet.errors import ConflictError, UsageError
from meshnet.ports import parse_all_published
from meshnet.runtime.engine.cgroups import read_usage
from meshnet.runtime.engine.volumes import VolumeStore
from meshnet.runtime.spec.checks import check_options
from meshnet.runtime.spec.id_ranges import IdRange, allocate, check_free
from meshnet.runtime.spec.mount_points import mount_points
from meshnet.runtime.spec.options import MOST_TIMEOUT_S, ContainerOptions
from meshnet.runtime.spec.userns import parse_userns
from meshnet_agent.containers.bundle.sources import Sources
from meshnet_agent.containers.cleanup import Cleanup
from meshnet_agent.containers.directory import Container, ContainerDirectory, ContainerView, view_of
from meshnet_agent.containers.execs import ExecSessions
from meshnet_agent.containers.processes import parse_signal, send
from meshnet_agent.containers.record import ContainerRecord, State, load_all
from meshnet_agent.containers.runs import Runs
from meshnet_agent.containers.volumes import Volumes

if TYPE_CHECKING:
    from meshnet.runtime.engine.cgroups import Usage
    from meshnet_agent.containers.bundle.paths import ContainerPaths
    from meshnet_agent.containers.networking import Networking
    from meshnet_agent.containers.runtime import RuntimeProvider

_KILL_S = 10.0
"""How long a process may take to die of SIGKILL."""


class Containers:
    """All containers of this host.

    Args:
        id_pool: the host's ids from which containers with ``--userns auto`` get theirs.

    Attributes:
        directory: the containers by name and id.
        execs: further programs in them.
        volumes: this host's volumes.
    """

    def __init__(
        self,
        paths: ContainerPaths,
        networking: Networking,
        runtime: RuntimeProvider,
        id_pool: IdRange,
    ) -> None:
        self.directory = ContainerDirectory()
        self.volumes = Volumes(VolumeStore(paths.volumes), self.directory)
        self.execs = ExecSessions(self.directory, runtime, paths.run)
        self._paths = paths
        self._networking = networking
        self._id_pool = id_pool
        self._sources = Sources(paths.images)
        self._cleanup = Cleanup(self.directory, runtime, networking, self._sources, self.volumes)
        self._runs = Runs(self.directory, runtime, networking, self._cleanup)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over what is on disk, then watch for ever."""
        records = await trio.to_thread.run_sync(lambda: list(load_all(self._paths.state)))
        for record in records:
            self.directory.add(Container(record, self._paths.bundle(record.id)))
        async with trio.open_nursery() as nursery:
            await nursery.start(self._runs.run)
            await nursery.start(self.execs.run)
            await self.volumes.collect()
            task_status.started()

    # --- looking --------------------------------------------------------------------------------

    def all(self) -> list[ContainerView]:
        """All containers, the newest first."""
        found = sorted(self.directory.all(), key=lambda c: -c.record.created_s)
        return [self._view(container) for container in found]

    def inspect(self, name: str) -> ContainerView:
        """One container.

        Raises:
            NotFoundError, UsageError: the name fits no container, or several.
        """
        return self._view(self.directory.find(name))

    def _view(self, container: Container) -> ContainerView:
        return view_of(container, self._networking)

    async def usage(self, name: str) -> tuple[ContainerRecord, Usage]:
        """What a running container uses."""
        record = self.directory.running(name).record
        assert record.process is not None
        return record, await trio.to_thread.run_sync(read_usage, record.process.pid)

    # --- making ---------------------------------------------------------------------------------

    async def create(self, options: ContainerOptions) -> ContainerView:
        """Make a container whose process waits, its networks attached; a failure leaves nothing.

        Raises:
            MeshnetError: the class says why.
        """
        check_options(options)
        parse_all_published(options.publish)  # for its errors, before anything is made
        identity = secrets.token_hex(6)
        name = options.name or f"c-{identity}"
        record = ContainerRecord(
            id=identity, name=name, options=options, created_s=time.time(), args=(), lowerdirs=()
        )
        container = Container(record, self._paths.bundle(identity))
        self.directory.add(container)  # from here on nobody else gets the name
        try:
            # Shielded: a client that goes away must not leave half a container.
            with trio.CancelScope(shield=True):
                await self._make(container)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._cleanup.purge(container, volumes=True)
            raise
        return self.inspect(identity)

    async def _make(self, container: Container) -> None:
        record, options = container.record, container.record.options
        source = await trio.to_thread.run_sync(self._sources.hold, options, record.id)
        await trio.to_thread.run_sync(container.bundle.make)
        config = source.config
        # As in Docker, another entrypoint discards the image's command.
        args = (
            (options.entrypoint, *options.command)
            if options.entrypoint is not None
            else config.arguments(options.command)
        )
        if not args:
            raise UsageError(f"image {options.image} does not say what to run: give a command")
        await container.change(
            image_id=source.image_id,
            lowerdirs=source.lowerdirs,
            args=args,
            env=config.env or (),
            user=options.user if options.user is not None else config.user or "",
            workdir=options.workdir or config.working_dir or "/",
            stop_signal=options.stop_signal or config.stop_signal or "SIGTERM",
            # Nothing is awaited between choice and record, so nobody else chooses the same.
            ids=self._choose_ids(options),
            mount_points=mount_points(options, config.volumes or (), _random_volume),
        )
        parse_signal(container.record.stop_signal)  # the image's may be nonsense: fail now
        await self._runs.launch(container)

    def _choose_ids(self, options: ContainerOptions) -> IdRange | None:
        """Ids of the host for a new container (`ContainerRecord.ids`)."""
        wanted = parse_userns(options.userns)
        if wanted.container is not None:
            return self.directory.find(wanted.container).record.ids
        taken = {r.name: r.ids for r in self.directory.records() if r.ids is not None}
        if wanted.ids is not None:
            return check_free(wanted.ids, taken)
        return allocate(self._id_pool, taken) if wanted.auto else None

    # --- running --------------------------------------------------------------------------------

    async def prepare(self, name: str) -> ContainerView:
        """Make an exited container wait to be started again (`Runs.prepare`)."""
        container = self.directory.find(name)
        await self._runs.prepare(container)
        return self.inspect(container.record.id)

    async def start(self, name: str) -> ContainerView:
        """Start a container that is created or has exited (`Runs.start`)."""
        container = self.directory.find(name)
        await self._runs.start(container)
        return self._view(container)

    async def restart(self, name: str, timeout_s: int | None) -> ContainerView:
        """Stop a container, if it runs, and start it again.

        Raises:
            ConflictError: it is one that is removed when it ends.
        """
        container = self.directory.find(name)
        if container.record.options.rm:
            raise ConflictError(
                f"container {name} is removed when it ends (--rm): run it again instead"
            )
        await self.stop(name, timeout_s)
        await container.ended.wait()
        return await self.start(container.record.id)

    async def wait(self, name: str) -> ContainerRecord:
        """Wait until a container has ended for good, restarts included."""
        container = self.directory.find(name)
        await container.ended.wait()
        return container.record

    # --- ending ---------------------------------------------------------------------------------

    async def kill(self, name: str, signal_name: str) -> ContainerView:
        """Send a signal to a container's first process."""
        container = self.directory.running(name)
        _signal(container, parse_signal(signal_name))
        return self._view(container)

    async def stop(self, name: str, timeout_s: int | None) -> ContainerView:
        """End a container: its stop signal, then SIGKILL; returns when it has ended.

        Args:
            timeout_s: seconds between the signals; None: as its options say.

        Raises:
            UsageError: the time is out of range.
            ConflictError: it did not end, even by SIGKILL.
        """
        if timeout_s is not None and not 0 <= timeout_s <= MOST_TIMEOUT_S:
            raise UsageError(f"timeout {timeout_s} is out of range: give seconds, 0 or more")
        container = self.directory.find(name)
        # The event of this run: a later start makes another one.
        ended = container.ended
        # Before the signal: otherwise its end would be one to restart it after.
        await container.change(stopped=True)
        record = container.record
        if record.state is not State.EXITED:
            if record.state is State.RUNNING:
                _signal(container, parse_signal(record.stop_signal))
                with trio.move_on_after(
                    record.options.stop_timeout_s if timeout_s is None else timeout_s
                ):
                    await ended.wait()
            await _kill_and_wait(container, ended)
        return self._view(container)

    async def remove(self, name: str, *, force: bool, volumes: bool = False) -> ContainerView:
        """Remove a container that has ended, or with `force` any; returns what it was.

        Args:
            volumes: remove its anonymous volumes, too.

        Raises:
            ConflictError: it runs.
        """
        container = self.directory.find(name)
        before = self._view(container)
        if container.record.state in (State.RUNNING, State.CREATING) and not force:
            raise ConflictError(
                f"container {name} is {container.record.state}: stop it first, or use --force"
            )
        if container.record.state is not State.EXITED:
            await container.change(stopped=True)
            await _kill_and_wait(container, container.ended)
        if container in self.directory:  # with --rm its end has removed it
            await self._cleanup.purge(container, volumes=volumes)
        return before


async def _kill_and_wait(container: Container, ended: trio.Event) -> None:
    if not ended.is_set():
        _signal(container, signal.SIGKILL)
        with trio.move_on_after(_KILL_S) as waiting:
            await ended.wait()
        if waiting.cancelled_caught:
            raise ConflictError(
                f"container {container.record.name} did not end within {_KILL_S:.0f} s of SIGKILL: "
                "see whether its process hangs in the kernel (state D in ps)"
            )


def _signal(container: Container, number: signal.Signals) -> None:
    process = container.record.process
    if process is not None:
        send(process, number)


def _random_volume() -> str:
    return secrets.token_hex(16)
