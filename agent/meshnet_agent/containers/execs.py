"""``meshnet exec``: further programs in a container, each under a conmon of its own.

The program waits until its client has attached and asks for it to be started.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from meshnet.errors import NotFoundError, UsageError
from meshnet.runtime.engine.conmon import (
    ATTACH,
    CONMON_PID,
    WINDOW_SIZE,
    Exec,
    Shim,
    read_exit,
)
from meshnet.runtime.spec.checks import check_process
from meshnet.system.group import open_to_group
from meshnet_agent.containers.processes import identify, send, wait_for_end

if TYPE_CHECKING:
    from meshnet.runtime.spec.options import ContainerOptions
    from meshnet_agent.containers.directory import ContainerDirectory
    from meshnet_agent.containers.record import ProcessId
    from meshnet_agent.containers.runtime import RuntimeProvider

_STARTED = "started"
"""A file in a program's directory that says that the program was started."""
_FORGET_S = 60.0
"""How long a program waits for its client, and how long its status is kept after its end."""


@dataclass(frozen=True, slots=True)
class ExecSession:
    """A program that waits for its client.

    Attributes:
        attach: socket of its terminal or its standard streams.
        window: FIFO that takes the terminal's size.
        exit_file: where conmon writes how it ended.
    """

    id: str
    attach: Path
    window: Path
    exit_file: Path


@dataclass(eq=False)
class _Program:
    container: str
    directory: Path
    waiting: Exec
    shim: ProcessId
    started: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    exit_code: int | None = None


class ExecSessions:
    """All programs that clients run in containers.

    Args:
        run_dir: holds a directory for each program while it runs.
    """

    def __init__(
        self, directory: ContainerDirectory, runtime: RuntimeProvider, run_dir: Path
    ) -> None:
        self._directory = directory
        self._runtime = runtime
        self._run_dir = run_dir
        self._sessions: dict[str, _Program] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tidy up what an earlier agent left, then watch programs for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.to_thread.run_sync(_clear, self._run_dir)
            task_status.started()
            await trio.sleep_forever()

    async def create(self, name: str, wanted: ContainerOptions) -> ExecSession:
        """Prepare a program; returns where its client attaches.

        Args:
            wanted: its command, variables, user, workdir, terminal and stdin.

        Raises:
            ConflictError: the container does not run.
        """
        container = self._directory.running(name)
        if not wanted.command:
            raise UsageError("exec needs a command: give one after the container's name")
        check_process(wanted)
        record = container.record
        options = replace(
            record.options,
            command=wanted.command,
            env=(*record.options.env, *wanted.env),
            user=wanted.user,
            workdir=wanted.workdir,
            tty=wanted.tty,
            interactive=wanted.interactive,
        )
        identity = secrets.token_hex(6)
        directory = self._run_dir / f"exec-{identity}"
        process = await trio.to_thread.run_sync(
            container.bundle.write_exec, record, options, directory, record.env
        )
        shim = Shim(
            runtime=await self._runtime.get(),
            identity=record.id,
            bundle=directory,
            log=directory / "log",
            exits=directory,
            tty=options.tty,
            stdin=options.interactive,
        )
        waiting = await shim.prepare_exec(process)
        conmon = identify(int((directory / CONMON_PID).read_text()))
        for file, mode in ((ATTACH, 0o770), (WINDOW_SIZE, 0o660)):
            open_to_group(directory / file, mode)
        session = _Program(record.id, directory, waiting, conmon)
        self._sessions[identity] = session
        if self._nursery is None:
            raise RuntimeError("programs are watched only while run() runs")
        self._nursery.start_soon(self._live, identity, session)
        return ExecSession(
            identity, directory / ATTACH, directory / WINDOW_SIZE, directory / record.id
        )

    async def start(self, identity: str) -> int:
        """Start a program whose client has attached; returns its pid.

        Raises:
            StartError: there is no such program, or the runtime refused.
        """
        session = self._find(identity)
        # On disk first: if the agent is killed now, the next one ends what it does not know as
        # started.
        (session.directory / _STARTED).touch()
        session.started.set()
        return await session.waiting.start()

    async def wait(self, identity: str) -> int | None:
        """Wait until a program has ended; returns its status, None if nobody saw it."""
        session = self._find(identity)
        await session.ended.wait()
        return session.exit_code

    def _find(self, identity: str) -> _Program:
        if identity not in self._sessions:
            raise NotFoundError(f"exec {identity} does not exist: it has ended, or never existed")
        return self._sessions[identity]

    async def _live(self, identity: str, session: _Program) -> None:
        with trio.move_on_after(_FORGET_S) as waiting:
            await session.started.wait()
        if waiting.cancelled_caught:
            send(session.shim, signal.SIGKILL)
            await session.waiting.close()
        await wait_for_end(session.shim)
        session.exit_code = read_exit(session.directory, session.container)
        with contextlib.suppress(OSError):
            await trio.to_thread.run_sync(shutil.rmtree, session.directory)
        session.ended.set()
        # A client that was slow, or that connects again, still gets the status.
        await trio.sleep(_FORGET_S)
        self._sessions.pop(identity, None)


def _clear(run_dir: Path) -> None:
    """At the agent's start, end programs that still wait, and tidy up after those that ended.

    Nobody will ask for the start of one that waits.  One that was started goes on, as its container
    does.
    """
    for directory in run_dir.glob("exec-*"):
        conmon = _conmon_of(directory)
        if conmon is not None:
            try:
                if (directory / _STARTED).exists():
                    continue
                signal.pidfd_send_signal(conmon, signal.SIGKILL)
            finally:
                os.close(conmon)
        shutil.rmtree(directory, ignore_errors=True)


def _conmon_of(directory: Path) -> int | None:
    """A pidfd of the conmon that lives in a directory; None: it has ended."""
    try:
        pid = int((directory / CONMON_PID).read_text())
        fd = os.pidfd_open(pid)
    except (OSError, ValueError):
        return None
    # The pid may be another process's by now, but conmon's arguments name its directory.
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if os.fsencode(directory) in words:
            return fd
    os.close(fd)
    return None
