"""This host's containers: made, started, watched, ended, found again after a restart.

A container's life, each step on disk before the next (docs/run.md)::

    creating ── mount, conmon create, attach networks ──► created ── start ──► running ──► exited
                                                             ▲                               │
                                                             └───────── --restart ───────────┘

conmon is the parent of a container's process, not the agent: the agent may end and come back.  The
process waits until its networks are attached: it never sees a moment without them.
"""

from __future__ import annotations

import secrets
import signal
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import ConflictError, MeshnetError, NotFoundError, UsageError
from meshnet.ports import parse_all_published
from meshnet.runtime.engine.cgroups import read_usage
from meshnet.runtime.engine.conmon import ATTACH, WINDOW_SIZE, read_exit
from meshnet.runtime.engine.oci_runtime import OciRuntime, find_runtime
from meshnet.runtime.engine.volumes import VolumeStore
from meshnet.runtime.images.oci import Digest
from meshnet.runtime.spec.checks import check_options
from meshnet.runtime.spec.id_ranges import IdRange, allocate, check_free
from meshnet.runtime.spec.mount_points import mount_points
from meshnet.runtime.spec.options import MOST_TIMEOUT_S, ContainerOptions, parse_restart
from meshnet.runtime.spec.userns import parse_userns
from meshnet_agent.containers.bundle import (
    Bundle,
    Sources,
    check_may_run,
)
from meshnet_agent.containers.directory import Container, Registry
from meshnet_agent.containers.execs import clear_execs
from meshnet_agent.containers.launch import launch
from meshnet_agent.containers.processes import is_alive, send, wait_for_end
from meshnet_agent.containers.record import ProcessId, Record, State, load_all
from meshnet_agent.containers.volumes import Volumes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from meshnet_agent.api.documents import Document
    from meshnet_agent.endpoints.request import AttachRequest

_log = structlog.get_logger()
_FIRST_DELAY_S, _LAST_DELAY_S = 0.1, 60.0
_KILL_S = 10.0
_LASTING_S = 10.0
"""A run that took longer was a good one: the pauses begin anew."""
_LOST_STATUS = 255
"""Of a container whose exit nobody saw: the host went down, or its conmon was killed."""
_AT_ONCE = 4
"""Containers that are made or taken down at the same time; others wait."""


class Containers:
    """All containers of this host.

    Args:
        state_dir, run_dir: the agent's.
        attach, detach: puts a process on a network, and takes it off.
        endpoints_of: documents of the endpoints in a process's network namespace.
        passed_over: filled with the OCI runtimes that cannot run here, and why.
        id_pool: ids of the host that containers with ``--userns auto`` get theirs from.
        systemd_cgroup: systemd makes the containers' cgroups.

    Attributes:
        volumes: this host's volumes.
    """

    def __init__(
        self,
        state_dir: Path,
        run_dir: Path,
        attach: Callable[[int, AttachRequest], Awaitable[Document]],
        detach: Callable[[int, str], Awaitable[Document]],
        endpoints_of: Callable[[int], list[Document]],
        passed_over: dict[str, str],
        *,
        id_pool: IdRange,
        systemd_cgroup: bool = False,
    ) -> None:
        self._state = state_dir.absolute() / "containers"
        self._run = run_dir.absolute() / "containers"
        self._runtime_root = run_dir.absolute() / "oci"
        self._sources = Sources(state_dir.absolute() / "images")
        self._attach = attach
        self._detach = detach
        self._endpoints_of = endpoints_of
        self.registry = Registry()
        self._runtime: OciRuntime | None = None
        self._probing = trio.Lock()
        self._slots = trio.CapacityLimiter(_AT_ONCE)
        self._nursery: trio.Nursery | None = None
        self._passed_over = passed_over
        self._id_pool = id_pool
        self.volumes = Volumes(
            VolumeStore(state_dir.absolute() / "volumes"),
            lambda: {r.name: r.mount_points for r in self.registry.records()},
        )
        self._systemd_cgroup = systemd_cgroup

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over what is on disk, then watch for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for record in await trio.to_thread.run_sync(lambda: list(load_all(self._state))):
                container = Container(record, self._bundle(record.id))
                self.registry.add(container)
                if record.state is State.EXITED:
                    nursery.start_soon(self._found_exited, container)
                elif record.shim is not None and is_alive(record.shim):
                    self._watch(container, record.shim)
                else:
                    nursery.start_soon(self._found_ended, container)
            await trio.to_thread.run_sync(clear_execs, self._run)
            await trio.to_thread.run_sync(self.volumes.store.collect)
            task_status.started()
            await trio.sleep_forever()

    # --- looking --------------------------------------------------------------------------------

    def documents(self) -> list[Document]:
        """All containers, the newest first."""
        records = sorted(self.registry.records(), key=lambda r: -r.created_s)
        return [self._document(record) for record in records]

    def _document(self, record: Record) -> Document:
        if record.process is None or record.shares_network:
            return record.document(())
        return record.document(self._endpoints_of(record.process.pid))

    def inspect(self, name: str) -> Document:
        """All that is known of a container."""
        container = self.registry.find(name)
        record = container.record
        options = {f: getattr(record.options, f) for f in ContainerOptions.__slots__}
        return self._document(record) | {
            "options": options,
            "image_id": record.image_id,
            "ids": asdict(record.ids) if record.ids is not None else None,
            "mount_points": [asdict(point) for point in record.mount_points],
            "log": str(container.bundle.log),
            "attach": str(container.bundle.run / ATTACH),
            "window": str(container.bundle.run / WINDOW_SIZE),
            "exit_file": str(container.bundle.exits / record.id),
        }

    async def stats(self, name: str) -> Document:
        """What a running container uses."""
        record = self.registry.running(name).record
        assert record.process is not None
        usage = await trio.to_thread.run_sync(read_usage, record.process.pid)
        return {"name": record.name, **usage.document()}

    # --- making ---------------------------------------------------------------------------------

    async def create(self, options: ContainerOptions) -> Document:
        """Make a container whose process waits, its networks attached; nothing is left if it fails.

        Raises:
            MeshnetError: the class says why.
        """
        check_options(options)
        parse_all_published(options.publish)
        identity = secrets.token_hex(6)
        name = options.name or f"c-{identity}"
        record = Record(
            id=identity, name=name, options=options, created_s=time.time(), args=(), lowerdirs=()
        )
        container = Container(record, self._bundle(identity))
        self.registry.add(container)
        try:
            with trio.CancelScope(shield=True):
                await self._make(container)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._purge(container, volumes=True)
            raise
        return self.inspect(identity)

    async def _make(self, container: Container) -> None:
        record, options = container.record, container.record.options
        source = await trio.to_thread.run_sync(self._sources.hold, options, record.id)
        await trio.to_thread.run_sync(container.bundle.make)
        config = source.config
        # Docker: another entrypoint takes the image's command away with it.
        args = (
            (options.entrypoint, *options.command)
            if options.entrypoint is not None
            else config.arguments(options.command)
        )
        if not args:
            raise UsageError(f"image {options.image} says nothing of what to run: give a command")
        await container.change(
            image_id=source.image_id,
            lowerdirs=source.lowerdirs,
            args=args,
            env=config.env or (),
            user=options.user if options.user is not None else config.user or "",
            workdir=options.workdir or config.working_dir or "/",
            stop_signal=options.stop_signal or config.stop_signal or "SIGTERM",
            # Nothing is awaited between the choice and the record: nobody else chooses the same.
            ids=self._choose_ids(options),
            mount_points=mount_points(options, config.volumes or (), _random_volume),
        )
        _signal_of(container.record.stop_signal)
        await self._launch(container)

    async def _launch(self, container: Container) -> None:
        """From nothing to a process that waits."""
        runtime = await self.runtime()
        async with container.lock, self._slots:
            record = container.record
            if container not in self.registry:
                raise NotFoundError(f"container {record.name} was removed meanwhile")
            if record.state not in (State.CREATING, State.EXITED):
                raise ConflictError(f"container {record.name} is {record.state} already")
            await launch(container, runtime, self.registry, self._attach)
        assert container.record.shim is not None
        self._watch(container, container.record.shim)

    def _choose_ids(self, options: ContainerOptions) -> IdRange | None:
        """Ids of the host for a new container (`Record.ids`)."""
        wanted = parse_userns(options.userns)
        if wanted.container is not None:
            return self.registry.find(wanted.container).record.ids
        taken = {r.name: r.ids for r in self.registry.records() if r.ids is not None}
        if wanted.ids is not None:
            return check_free(wanted.ids, taken)
        return allocate(self._id_pool, taken) if wanted.auto else None

    async def runtime(self) -> OciRuntime:
        """The OCI runtime (`find_runtime`)."""
        async with self._probing:
            if self._runtime is None:
                check_may_run()
                self._runtime, passed_over = await find_runtime(
                    self._runtime_root, systemd_cgroup=self._systemd_cgroup
                )
                self._passed_over.update(passed_over)
                _log.info("OCI runtime", path=str(self._runtime.path), passed_over=passed_over)
            return self._runtime

    async def prepare(self, name: str) -> Document:
        """Make an exited container wait to be started again, over its own writable layer.

        One that is created already is left as it is.

        Raises:
            ConflictError: it runs.
        """
        container = self.registry.find(name)
        if container.record.state is State.EXITED:
            with trio.CancelScope(shield=True):
                await self._prepare_again(container)
        elif container.record.state is not State.CREATED:
            raise ConflictError(f"container {name} is {container.record.state}: it need not start")
        return self.inspect(container.record.id)

    async def _prepare_again(self, container: Container) -> None:
        exit_code = container.record.exit_code
        # A restart that its policy wants and that waits for its time finds it started, and ends.
        container.ended = trio.Event() if container.ended.is_set() else container.ended
        await container.change(stopped=False, restarts=0, error=None)
        try:
            await self._launch(container)
        except BaseException as error:
            if container.record.state is State.EXITED and container in self.registry:
                await self._undo_launch(container, exit_code, str(error))
                container.ended.set()
            raise

    async def start(self, name: str) -> Document:
        """Let the process of a created container go on; an exited one is made again before.

        Raises:
            ConflictError: it runs.
        """
        container = self.registry.find(name)
        runtime = await self.runtime()
        if container.record.state is State.EXITED:
            await self.prepare(container.record.id)
        async with container.lock:
            record = container.record
            if record.state is not State.CREATED:
                raise ConflictError(
                    f"container {record.name} is {record.state}: stop it first, or restart it"
                )
            with trio.CancelScope(shield=True):
                await container.change(state=State.RUNNING, started_s=time.time())
                await runtime.start(record.id)
        _log.info("container started", container=record.name, id=record.id)
        return self._document(container.record)

    async def restart(self, name: str, timeout_s: int | None) -> Document:
        """Stop a container, if it runs, and start it again.

        Raises:
            ConflictError: it is removed when it ends.
        """
        container = self.registry.find(name)
        if container.record.options.rm:
            raise ConflictError(f"container {name} goes when it ends (--rm): run it again instead")
        await self.stop(name, timeout_s)
        await container.ended.wait()
        return await self.start(container.record.id)

    # --- ending ---------------------------------------------------------------------------------

    async def kill(self, name: str, signal_name: str) -> Document:
        """Send a signal to a container's first process."""
        container = self.registry.running(name)
        self._signal(container, _signal_of(signal_name))
        return self._document(container.record)

    async def stop(self, name: str, timeout_s: int | None) -> Document:
        """End a container: its stop signal, then SIGKILL; returns when it has ended.

        Raises:
            UsageError: no such time.
        """
        if timeout_s is not None and not 0 <= timeout_s <= MOST_TIMEOUT_S:
            raise UsageError(f"timeout {timeout_s} is out of range: give seconds, 0 or more")
        container = self.registry.find(name)
        ended = container.ended
        await container.change(stopped=True)
        record = container.record
        if record.state is not State.EXITED:
            if record.state is State.RUNNING:
                self._signal(container, _signal_of(record.stop_signal))
                with trio.move_on_after(
                    record.options.stop_timeout_s if timeout_s is None else timeout_s
                ):
                    await ended.wait()
            await self._kill_and_wait(container, ended)
        return self._document(container.record)

    async def _kill_and_wait(self, container: Container, ended: trio.Event) -> None:
        if not ended.is_set():
            self._signal(container, signal.SIGKILL)
            with trio.move_on_after(_KILL_S) as waiting:
                await ended.wait()
            if waiting.cancelled_caught:
                raise ConflictError(f"container {container.record.name} survived SIGKILL")

    async def remove(self, name: str, *, force: bool, volumes: bool = False) -> Document:
        """Remove a container that has ended, or with `force` any.

        Args:
            volumes: its anonymous ones too.

        Raises:
            ConflictError: it runs.
        """
        container = self.registry.find(name)
        document = self._document(container.record)
        if container.record.state in (State.RUNNING, State.CREATING) and not force:
            raise ConflictError(
                f"container {name} is {container.record.state}: stop it first, or use --force"
            )
        if container.record.state is not State.EXITED:
            await container.change(stopped=True)
            await self._kill_and_wait(container, container.ended)
        if container in self.registry:
            await self._purge(container, volumes=volumes)
        return document

    async def wait(self, name: str) -> Document:
        """Wait until a container has ended for good, restarts included; returns its status."""
        container = self.registry.find(name)
        await container.ended.wait()
        return {"name": container.record.name, "exit_code": container.record.exit_code}

    def _signal(self, container: Container, number: signal.Signals) -> None:
        process = container.record.process
        if process is not None:
            send(process, number)

    # --- watching -------------------------------------------------------------------------------

    def _watch(self, container: Container, process: ProcessId) -> None:
        if self._nursery is None:
            raise RuntimeError("containers are watched only while run() runs")
        self._nursery.start_soon(self._wait_for_end, container, process)

    async def _wait_for_end(self, container: Container, shim: ProcessId) -> None:
        await wait_for_end(shim)
        exit_code = read_exit(container.bundle.exits, container.record.id)
        if exit_code is None and container.record.process is not None:
            # Somebody killed conmon: nobody will know the status.
            await wait_for_end(container.record.process)
        await self._ended(container, exit_code)

    async def _found_ended(self, container: Container) -> None:
        """At the agent's start: it ended while no agent was there."""
        if container.record.state is State.CREATING:
            await self._purge(container, volumes=True)
            return
        await self._ended(container, read_exit(container.bundle.exits, container.record.id))

    async def _found_exited(self, container: Container) -> None:
        """At the agent's start: it had ended before; a restart of it may have been under way."""
        async with container.lock, self._slots:
            if container not in self.registry or container.record.state is not State.EXITED:
                return  # somebody removed it, or started it, before its turn came
            await self._put_away(container)
            await container.change(process=None, shim=None, endpoints=())
        await self._after_end(container, 0.0)

    async def _ended(self, container: Container, exit_code: int | None) -> None:
        """Put away what a container had, record how it ended, and do what its options say."""
        ran = container.record.started_s or time.time()
        with trio.CancelScope(shield=True):
            async with container.lock, self._slots:
                if container not in self.registry:
                    return  # removed while it was being started again
                await self._put_away(container)
                container.note(
                    state=State.EXITED,
                    exit_code=_LOST_STATUS if exit_code is None else exit_code,
                    error="nobody saw how it ended" if exit_code is None else None,
                    finished_s=time.time(),
                    process=None,
                    shim=None,
                    endpoints=(),
                )
                if not self._is_to_go(container):
                    await container.change()
            record = container.record
            _log.info("container ended", container=record.name, exit_code=record.exit_code)
            await self._after_end(container, time.time() - ran)

    async def _after_end(self, container: Container, lasted_s: float) -> None:
        """Restart it, remove it, or let it be, as its options say."""
        if self._wants_restart(container):
            self.nursery.start_soon(self._restart, container, lasted_s)
            return
        if self._is_to_go(container):
            async with container.lock:
                await self._forget(container, volumes=True)
        container.ended.set()

    def _is_to_go(self, container: Container) -> bool:
        """Whether nothing is to be left of a container that has ended."""
        return container.record.options.rm and not self._wants_restart(container)

    def _wants_restart(self, container: Container) -> bool:
        record = container.record
        policy = parse_restart(record.options.restart)
        return (
            not record.stopped
            and container in self.registry
            and record.exit_code is not None
            and policy.wants(record.exit_code, record.restarts)
        )

    async def _restart(self, container: Container, lasted_s: float) -> None:
        """Start it again; one that cannot be made is tried again, ever later."""
        failures = 0 if lasted_s > _LASTING_S else container.record.restarts
        while True:
            await trio.sleep(min(_LAST_DELAY_S, _FIRST_DELAY_S * 2 ** min(failures, 16)))
            record = container.record
            if record.state is not State.EXITED:
                return  # somebody started it meanwhile
            if not self._wants_restart(container):
                container.ended.set()
                return
            failures += 1
            with trio.CancelScope(shield=True):
                try:
                    exit_code = container.record.exit_code
                    await container.change(restarts=container.record.restarts + 1)
                    await self._launch(container)
                    await self.start(container.record.id)
                    return
                except MeshnetError as error:
                    _log.error("not restarted", container=container.record.name, reason=str(error))
                    if container.record.state is not State.EXITED:
                        return  # its end is watched
                    await self._undo_launch(container, exit_code, str(error))

    async def _undo_launch(self, container: Container, exit_code: int | None, error: str) -> None:
        """It could not be made again: it has ended as before, and the record says why."""
        async with container.lock:
            if container not in self.registry:
                return
            await self._put_away(container)
            await container.change(
                exit_code=exit_code, error=error, process=None, shim=None, endpoints=()
            )

    async def _put_away(self, container: Container) -> None:
        """Cgroup, processes, endpoints, mounts: all not on disk.  A failure is only logged."""
        record = container.record
        if record.shim is not None and read_exit(container.bundle.exits, record.id) is None:
            send(record.shim, signal.SIGKILL)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._detach_all, record)
            try:
                await (await self.runtime()).delete(record.id)
            except MeshnetError as error:
                _log.error("container not deleted", container=record.name, reason=str(error))
        try:
            await trio.to_thread.run_sync(container.bundle.unmount)
        except MeshnetError as error:
            _log.error("root file system stays", container=record.name, reason=str(error))

    async def _detach_all(self, record: Record) -> None:
        for endpoint in record.endpoints:
            try:
                await self._detach(endpoint["pid"], endpoint["network"])
            except NotFoundError:
                pass  # the endpoint's own watch was faster
            except MeshnetError as error:
                _log.error("endpoint stays", container=record.name, reason=str(error))

    async def _purge(self, container: Container, *, volumes: bool) -> None:
        """Remove a container and everything of it, but volumes only if they are to go."""
        async with container.lock:
            await self._put_away(container)
            await self._forget(container, volumes=volumes)
        container.ended.set()

    async def _forget(self, container: Container, *, volumes: bool) -> None:
        """Remove what is left of a container that was put away: its files, its hold on an image."""
        record = container.record

        def remove() -> None:
            if record.options.image is not None and record.image_id is not None:
                self._sources.release(Digest(record.image_id), record.id)
            container.bundle.remove()

        await trio.to_thread.run_sync(remove)
        self.registry.drop(container)
        if volumes:
            await self.volumes.remove_anonymous(record.mount_points)

    # --- small things ---------------------------------------------------------------------------

    @property
    def nursery(self) -> trio.Nursery:
        """For tasks that end with the agent; there is one only while `run` runs."""
        assert self._nursery is not None
        return self._nursery

    def run_dir(self, name: str) -> Path:
        """A directory for sockets."""
        return self._run / name

    def _bundle(self, identity: str) -> Bundle:
        return Bundle(self._state / identity, self._run / identity, self.volumes.store)


def _random_volume() -> str:
    return secrets.token_hex(16)


def _signal_of(text: str) -> signal.Signals:
    """``KILL``, ``SIGKILL`` or ``9``.

    Raises:
        UsageError: no such signal.
    """
    try:
        if text.isdigit():
            return signal.Signals(int(text))
        return signal.Signals["SIG" + text.upper().removeprefix("SIG")]
    except (ValueError, KeyError) as error:
        raise UsageError(f"signal {text!r} is unknown: see signal(7)") from error
