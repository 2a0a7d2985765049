"""This host's containers: made, started, watched, ended, found again after a restart.

A container's life, each step on disk before the next (docs/run.md)::

    creating ── mount, conmon create, attach networks ──► created ── start ──► running ──► exited
                                                             ▲                               │
                                                             └───────── --restart ───────────┘

conmon is the parent of a container's process, not the agent: the agent may end and come back.  The
process waits until its networks are attached: it never sees a moment without them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import ConflictError, MeshnetError, NotFoundError, UsageError
from meshnet.kernel.netns import start_ticks
from meshnet.ports import parse_all_published
from meshnet.runtime.cgroups import read_usage
from meshnet.runtime.conmon import ATTACH, CONMON_PID, WINDOW_SIZE, Shim, read_exit
from meshnet.runtime.oci import Digest
from meshnet.runtime.oci_runtime import OciRuntime, find_runtime
from meshnet.runtime.options import ContainerOptions, check_options, parse_restart, shared_with
from meshnet.text import check_name
from meshnet_agent.attachment import AttachRequest
from meshnet_agent.bundle import (
    Bundle,
    Sources,
    check_may_run,
    open_to_group,
    remove_ended_execs,
)
from meshnet_agent.container_record import ProcessId, Record, State, load_all, save

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from meshnet_agent.documents import Document

_log = structlog.get_logger()
_FIRST_DELAY_S, _LAST_DELAY_S = 0.1, 60.0
_KILL_S = 10.0
_LASTING_S = 10.0
"""A run that took longer was a good one: the pauses begin anew."""
_LOST_STATUS = 255
"""Of a container whose exit nobody saw: the host went down, or its conmon was killed."""
_AT_ONCE = 4
"""Containers that are made or taken down at the same time; others wait."""


class Container:
    """One container and what is going on with it.

    Attributes:
        lock: held while a step of its life is under way.
        ended: set when it has ended for good, restarts included, and everything is put away.
    """

    def __init__(self, record: Record, bundle: Bundle) -> None:
        self.record = record
        self.bundle = bundle
        self.lock = trio.Lock()
        self.ended = trio.Event()

    async def change(self, **fields: object) -> None:
        """Change the record, here and on disk."""
        self.record = replace(self.record, **fields)  # type: ignore[arg-type]
        await trio.to_thread.run_sync(save, self.bundle.state, self.record)


class Containers:
    """All containers of this host.

    Args:
        state_dir, run_dir: the agent's.
        attach, detach: puts a process on a network, and takes it off.
        passed_over: filled with the OCI runtimes that cannot run here, and why.
    """

    def __init__(
        self,
        state_dir: Path,
        run_dir: Path,
        attach: Callable[[AttachRequest], Awaitable[Document]],
        detach: Callable[[int, str], Awaitable[Document]],
        passed_over: dict[str, str],
    ) -> None:
        self._state = state_dir.absolute() / "containers"
        self._run = run_dir.absolute() / "containers"
        self._runtime_root = run_dir.absolute() / "oci"
        self._sources = Sources(state_dir.absolute() / "images")
        self._attach = attach
        self._detach = detach
        self._containers: dict[str, Container] = {}
        self._runtime: OciRuntime | None = None
        self._probing = trio.Lock()
        self._slots = trio.CapacityLimiter(_AT_ONCE)
        self._nursery: trio.Nursery | None = None
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._passed_over = passed_over

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over what is on disk, then watch for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for record in await trio.to_thread.run_sync(lambda: list(load_all(self._state))):
                container = Container(record, self._bundle(record.id))
                self._containers[record.id] = container
                if record.state is State.EXITED:
                    nursery.start_soon(self._found_exited, container)
                elif record.shim is not None and self._is_alive(record.shim):
                    self._watch(container, record.shim)
                else:
                    nursery.start_soon(self._found_ended, container)
            await trio.to_thread.run_sync(remove_ended_execs, self._run)
            task_status.started()
            await trio.sleep_forever()

    # --- looking --------------------------------------------------------------------------------

    def documents(self) -> list[Document]:
        """All containers, the newest first."""
        records = [c.record for c in self._containers.values()]
        return [r.document() for r in sorted(records, key=lambda r: -r.created_s)]

    def find(self, name: str) -> Container:
        """A container by its name, its id, or the beginning of the id.

        Raises:
            NotFoundError: there is none.
            UsageError: several ids begin so.
        """
        for container in self._containers.values():
            if name in (container.record.name, container.record.id):
                return container
        found = [c for i, c in self._containers.items() if name and i.startswith(name)]
        if not found:
            raise NotFoundError(f"container {name} does not exist: meshnet ps -a lists them")
        if len(found) > 1:
            raise UsageError(f"{name} begins {len(found)} containers' ids: give more of it")
        return found[0]

    def inspect(self, name: str) -> Document:
        """All that is known of a container."""
        container = self.find(name)
        record = container.record
        options = {f: getattr(record.options, f) for f in ContainerOptions.__slots__}
        return record.document() | {
            "options": options,
            "image_id": record.image_id,
            "log": str(container.bundle.log),
            "attach": str(container.bundle.run / ATTACH),
            "window": str(container.bundle.run / WINDOW_SIZE),
            "exit_file": str(container.bundle.exits / record.id),
        }

    async def stats(self, name: str) -> Document:
        """What a running container uses."""
        record = self._running(name).record
        assert record.process is not None
        usage = await trio.to_thread.run_sync(read_usage, record.process.pid)
        return {"name": record.name, **usage.document()}

    def _running(self, name: str) -> Container:
        container = self.find(name)
        if container.record.state is not State.RUNNING or container.record.process is None:
            raise ConflictError(f"container {name} does not run: meshnet ps -a shows its state")
        return container

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
        check_name("container", name)
        if any(c.record.name == name for c in self._containers.values()):
            raise ConflictError(f"container name {name} is taken: choose another, or remove that")
        record = Record(
            id=identity, name=name, options=options, created_s=time.time(), args=(), lowerdirs=()
        )
        container = self._containers[identity] = Container(record, self._bundle(identity))
        try:
            with trio.CancelScope(shield=True):
                await self._make(container)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._purge(container)
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
        )
        _signal_of(container.record.stop_signal)
        await self._launch(container)

    async def _launch(self, container: Container) -> None:
        """From nothing to a process that waits."""
        runtime = await self._find_runtime()
        async with container.lock, self._slots:
            record, bundle = container.record, container.bundle
            await trio.to_thread.run_sync(bundle.make)
            namespaces, etc = self._namespaces(record.options)
            await trio.to_thread.run_sync(bundle.mount, record, namespaces, etc)
            pid = await self._shim(container, runtime).create()
            await container.change(
                process=self._identify(pid),
                shim=self._identify(int((bundle.run / CONMON_PID).read_text())),
            )
            for file, mode in ((ATTACH, 0o770), (WINDOW_SIZE, 0o660)):
                open_to_group(bundle.run / file, mode)
            await self._attach_networks(container, pid)
            if etc is None:
                await trio.to_thread.run_sync(bundle.write_etc, container.record)
            await container.change(state=State.CREATED, exit_code=None, finished_s=None)
        assert container.record.shim is not None
        self._watch(container, container.record.shim)

    def _shim(self, container: Container, runtime: OciRuntime) -> Shim:
        return Shim(
            runtime=runtime,
            identity=container.record.id,
            bundle=container.bundle.run,
            log=container.bundle.log,
            exits=container.bundle.exits,
            tty=container.record.options.tty,
            stdin=container.record.options.interactive,
        )

    async def _attach_networks(self, container: Container, pid: int) -> None:
        record = container.record
        for number, network in enumerate(_own_networks(record.options)):
            name = record.name if number == 0 else f"{record.name}.{network}"[:63]
            request = AttachRequest(
                pid=pid,
                network=network,
                ifname=f"eth{number}",
                name=name,
                default_route=number == 0,
                publish=parse_all_published(record.options.publish) if number == 0 else (),
            )
            endpoint = await self._attach(request)
            await container.change(endpoints=(*container.record.endpoints, endpoint))

    def _namespaces(self, options: ContainerOptions) -> tuple[dict[str, str | None], Bundle | None]:
        """Namespaces to join (see `Surroundings`), and whose files of /etc are shared."""
        found: dict[str, str | None] = {}
        network = options.networks[0] if len(options.networks) == 1 else None
        for kind, file, word in (
            ("network", "net", network),
            ("pid", "pid", options.pid),
            ("ipc", "ipc", options.ipc),
            ("uts", "uts", options.uts),
        ):
            other = shared_with(word)
            found[kind] = None if word == "host" else ""
            if other is not None:
                process = self._running(other).record.process
                assert process is not None
                found[kind] = f"/proc/{process.pid}/ns/{file}"
        other = shared_with(network)
        return found, self.find(other).bundle if other is not None else None

    async def _find_runtime(self) -> OciRuntime:
        async with self._probing:
            if self._runtime is None:
                check_may_run()
                self._runtime, passed_over = await find_runtime(self._runtime_root)
                self._passed_over.update(passed_over)
                _log.info("OCI runtime", path=str(self._runtime.path), passed_over=passed_over)
            return self._runtime

    async def start(self, name: str) -> Document:
        """Let the process of a created container go on.

        Raises:
            ConflictError: it is not in that state.
        """
        container = self.find(name)
        runtime = await self._find_runtime()
        async with container.lock:
            record = container.record
            if record.state is not State.CREATED:
                raise ConflictError(f"container {record.name} is {record.state}, not created")
            with trio.CancelScope(shield=True):
                await container.change(state=State.RUNNING, started_s=time.time())
                await runtime.start(record.id)
        _log.info("container started", container=record.name, id=record.id)
        return container.record.document()

    # --- ending ---------------------------------------------------------------------------------

    async def kill(self, name: str, signal_name: str) -> Document:
        """Send a signal to a container's first process."""
        container = self._running(name)
        self._signal(container, _signal_of(signal_name))
        return container.record.document()

    async def stop(self, name: str, timeout_s: int | None) -> Document:
        """End a container: its stop signal, then SIGKILL; returns when it has ended."""
        container = self.find(name)
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
        return container.record.document()

    async def _kill_and_wait(self, container: Container, ended: trio.Event) -> None:
        if not ended.is_set():
            self._signal(container, signal.SIGKILL)
            with trio.move_on_after(_KILL_S) as waiting:
                await ended.wait()
            if waiting.cancelled_caught:
                raise ConflictError(f"container {container.record.name} survived SIGKILL")

    async def remove(self, name: str, *, force: bool) -> Document:
        """Remove a container that has ended, or with `force` any.

        Raises:
            ConflictError: it runs.
        """
        container = self.find(name)
        document = container.record.document()
        if container.record.state in (State.RUNNING, State.CREATING) and not force:
            raise ConflictError(
                f"container {name} is {container.record.state}: stop it first, or use --force"
            )
        if container.record.state is not State.EXITED:
            await container.change(stopped=True)
            await self._kill_and_wait(container, container.ended)
        if container.record.id in self._containers:
            await self._purge(container)
        return document

    async def wait(self, name: str) -> Document:
        """Wait until a container has ended for good, restarts included; returns its status."""
        container = self.find(name)
        await container.ended.wait()
        return {"name": container.record.name, "exit_code": container.record.exit_code}

    def _signal(self, container: Container, number: signal.Signals) -> None:
        process = container.record.process
        if process is not None:
            self._send(process, number)

    def _send(self, process: ProcessId, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(process.pid)
            try:
                if self._is_alive(process):
                    signal.pidfd_send_signal(fd, number)
            finally:
                os.close(fd)

    # --- watching -------------------------------------------------------------------------------

    def _watch(self, container: Container, process: ProcessId) -> None:
        if self._nursery is None:
            raise RuntimeError("containers are watched only while run() runs")
        self._nursery.start_soon(self._wait_for_end, container, process)

    async def _wait_for_end(self, container: Container, shim: ProcessId) -> None:
        await self.wait_for_process(shim)
        exit_code = read_exit(container.bundle.exits, container.record.id)
        if exit_code is None and container.record.process is not None:
            # Somebody killed conmon: nobody will know the status.
            await self.wait_for_process(container.record.process)
        await self._ended(container, exit_code)

    async def wait_for_process(self, process: ProcessId) -> None:
        """Wait until a process has ended."""
        try:
            fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return
        try:
            if self._is_alive(process):
                await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)

    async def _found_ended(self, container: Container) -> None:
        """At the agent's start: it ended while no agent was there."""
        if container.record.state is State.CREATING:
            await self._purge(container)
            return
        await self._ended(container, read_exit(container.bundle.exits, container.record.id))

    async def _found_exited(self, container: Container) -> None:
        """At the agent's start: it had ended before; a restart of it may have been under way."""
        async with container.lock, self._slots:
            await self._put_away(container)
            await container.change(process=None, shim=None, endpoints=())
        await self._after_end(container, 0.0)

    async def _ended(self, container: Container, exit_code: int | None) -> None:
        """Put away what a container had, record how it ended, and do what its options say."""
        ran = container.record.started_s or time.time()
        with trio.CancelScope(shield=True):
            async with container.lock, self._slots:
                await self._put_away(container)
                await container.change(
                    state=State.EXITED,
                    exit_code=_LOST_STATUS if exit_code is None else exit_code,
                    error="nobody saw how it ended" if exit_code is None else None,
                    finished_s=time.time(),
                    process=None,
                    shim=None,
                    endpoints=(),
                )
            record = container.record
            _log.info("container ended", container=record.name, exit_code=record.exit_code)
            await self._after_end(container, time.time() - ran)

    async def _after_end(self, container: Container, lasted_s: float) -> None:
        """Restart it, remove it, or let it be, as its options say."""
        record = container.record
        if self._wants_restart(record):
            self.nursery.start_soon(self._restart, container, lasted_s)
            return
        if record.options.rm:
            await self._purge(container)
        container.ended.set()

    def _wants_restart(self, record: Record) -> bool:
        policy = parse_restart(record.options.restart)
        return (
            not record.stopped
            and record.id in self._containers
            and record.exit_code is not None
            and policy.wants(record.exit_code, record.restarts)
        )

    async def _restart(self, container: Container, lasted_s: float) -> None:
        """Start it again; one that cannot be made is tried again, ever later."""
        failures = 0 if lasted_s > _LASTING_S else container.record.restarts
        while True:
            await trio.sleep(min(_LAST_DELAY_S, _FIRST_DELAY_S * 2 ** min(failures, 16)))
            if not self._wants_restart(container.record):
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
                    async with container.lock:
                        await self._put_away(container)
                        await container.change(
                            exit_code=exit_code,
                            error=str(error),
                            process=None,
                            shim=None,
                            endpoints=(),
                        )

    async def _put_away(self, container: Container) -> None:
        """Cgroup, processes, endpoints, mounts: all not on disk.  A failure is only logged."""
        record = container.record
        if record.shim is not None and read_exit(container.bundle.exits, record.id) is None:
            self._send(record.shim, signal.SIGKILL)
        try:
            await (await self._find_runtime()).delete(record.id)
        except MeshnetError as error:
            _log.error("container not deleted", container=record.name, reason=str(error))
        for endpoint in record.endpoints:
            # The endpoint's own watch may have been faster.
            with contextlib.suppress(NotFoundError):
                await self._detach(endpoint["pid"], endpoint["network"])
        try:
            await trio.to_thread.run_sync(container.bundle.unmount)
        except MeshnetError as error:
            _log.error("root file system stays", container=record.name, reason=str(error))

    async def _purge(self, container: Container) -> None:
        """Remove a container and everything of it."""
        async with container.lock:
            record = container.record
            await self._put_away(container)
            if record.options.image is not None and record.image_id is not None:
                image = Digest(record.image_id)
                await trio.to_thread.run_sync(self._sources.release, image, record.id)
            await trio.to_thread.run_sync(container.bundle.remove)
            self._containers.pop(record.id, None)
        container.ended.set()

    # --- small things ---------------------------------------------------------------------------

    @property
    def nursery(self) -> trio.Nursery:
        """For tasks that end with the agent; there is one only while `run` runs."""
        assert self._nursery is not None
        return self._nursery

    async def runtime(self) -> OciRuntime:
        """The OCI runtime (`find_runtime`)."""
        return await self._find_runtime()

    def running(self, name: str) -> Container:
        """A container that runs.

        Raises:
            NotFoundError, ConflictError: there is none, or it does not run.
        """
        return self._running(name)

    def run_dir(self, name: str) -> Path:
        """A directory for sockets."""
        return self._run / name

    def _bundle(self, identity: str) -> Bundle:
        return Bundle(self._state / identity, self._run / identity)

    def _identify(self, pid: int) -> ProcessId:
        return ProcessId(pid, start_ticks(pid), self._boot_id)

    def identify(self, pid: int) -> ProcessId:
        """A process for ever."""
        return self._identify(pid)

    def send(self, process: ProcessId, number: signal.Signals) -> None:
        """Signal a process, if it is still that one."""
        self._send(process, number)

    def _is_alive(self, process: ProcessId) -> bool:
        try:
            return (
                process.boot_id == self._boot_id and start_ticks(process.pid) == process.start_ticks
            )
        except NotFoundError:
            return False


def _own_networks(options: ContainerOptions) -> tuple[str, ...]:
    words = options.networks
    return tuple(w for w in words if w not in ("none", "host") and shared_with(w) is None)


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
