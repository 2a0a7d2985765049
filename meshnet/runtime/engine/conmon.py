"""conmon, the shim: keeps a container, its log and its exit status without the agent.

conmon(8) starts the runtime, becomes the parent of the container's process, writes the log and,
at the end, a file with the exit status.  Clients attach to a socket of its (SOCK_SEQPACKET: each
message of output begins with 2, stdout, or 3, stderr; input is sent as it is).

In the bundle's directory it makes ``attach``, ``winsz`` (a FIFO that takes ``HEIGHT WIDTH``
lines), ``pid`` and ``conmon.pid``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from meshnet.errors import KernelRefusedError
from meshnet.runtime.engine.oci_runtime import clean

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from meshnet.runtime.engine.oci_runtime import OciRuntime

ATTACH, WINDOW_SIZE, CONMON_PID = "attach", "winsz", "conmon.pid"
_START_S = 30.0


class StartError(KernelRefusedError):
    """The runtime could not start the program; the message is the runtime's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shim:
    """What conmon is told.

    Attributes:
        bundle: directory with ``config.json``; of an exec a directory of its own.
        log: file of the format ``k8s-file``.
        log_max_bytes: the log begins anew when it would become larger: what was in it is lost (a
            new file takes the name, conmon 2.1.6); 0: never.
        exits: directory that the exit status is written to, as a file named after the container.
    """

    runtime: OciRuntime
    identity: str
    bundle: Path
    log: Path
    exits: Path
    tty: bool
    stdin: bool
    log_max_bytes: int = 0

    def command(self, *more: str) -> list[str]:
        """The command line.

        Raises:
            KernelRefusedError: conmon is not installed.
        """
        conmon = shutil.which("conmon")
        if conmon is None:
            raise KernelRefusedError("conmon is not installed: install it to run containers")
        program, *words = [*self.runtime.enter, str(self.runtime.path)]
        arguments = [*words, "--root", str(self.runtime.root)]
        arguments += ["--log", str(self.bundle / "runtime.log")]
        return [
            *(conmon, "--api-version", "1", "--cid", self.identity, "--cuuid", self.identity),
            *("--runtime", program, "--bundle", str(self.bundle), "--full-attach"),
            *("--container-pidfile", str(self.bundle / "pid")),
            *("--conmon-pidfile", str(self.bundle / CONMON_PID)),
            *("--log-path", f"k8s-file:{self.log}", "--exit-dir", str(self.exits)),
            *(word for argument in arguments for word in ("--runtime-arg", argument)),
            *(["--log-size-max", str(self.log_max_bytes)] if self.log_max_bytes else []),
            *(["--systemd-cgroup"] if self.runtime.systemd_cgroup else []),
            *(["--terminal"] if self.tty else []),
            *(["--stdin"] if self.stdin else []),
            *more,
        ]

    async def create(self) -> int:
        """Create the container; returns the pid of its process, which waits to be started.

        Raises:
            StartError: the runtime refused, or there is no such program.
        """
        sync = await _spawn(self.command(), self.bundle, {})
        try:
            return await _read_pid(sync)
        finally:
            await trio.aclose_forcefully(sync)

    async def prepare_exec(self, process: Path) -> Exec:
        """Make ready to run another program in the container, for a client that attaches first.

        Args:
            process: a file with the program, as in ``config.json``.
        """
        attach_read, attach_write = os.pipe()
        start_read, start_write = os.pipe()
        # conmon takes the pipe's end for its start.  It is given a descriptor that is both ends, so
        # that none comes when the agent dies: it waits until the next agent ends it.
        start_both = os.open(f"/proc/self/fd/{start_read}", os.O_RDWR | os.O_CLOEXEC)
        os.close(start_read)
        os.write(start_write, b"\n")  # conmon waits for one before it forks, and for one to start
        command = self.command("--exec", "--exec-attach", "--exec-process-spec", str(process))
        pipes = {"_OCI_ATTACHPIPE": attach_write, "_OCI_STARTPIPE": start_both}
        async with trio.lowlevel.FdStream(attach_read) as ready:
            start = trio.lowlevel.FdStream(start_write)
            try:
                sync = await _spawn(command, self.bundle, pipes)
                with trio.fail_after(_START_S):
                    await ready.receive_some(4096)
            except BaseException:
                await trio.aclose_forcefully(start)
                raise
        return Exec(start, sync)


@dataclass(frozen=True, slots=True)
class Exec:
    """A program that waits to be started by conmon."""

    _start: trio.lowlevel.FdStream
    _sync: trio.lowlevel.FdStream

    async def start(self) -> int:
        """Start it; returns its pid.

        Raises:
            StartError: the runtime refused, or there is no such program.
        """
        try:
            await self._start.send_all(b"\n")
            return await _read_pid(self._sync)
        finally:
            await self.close()

    async def close(self) -> None:
        """Let go of conmon; one that waits does so until it is ended."""
        await trio.aclose_forcefully(self._start)
        await trio.aclose_forcefully(self._sync)


async def _spawn(
    command: Sequence[str], directory: Path, pipes: dict[str, int]
) -> trio.lowlevel.FdStream:
    """Start conmon; returns the pipe that it reports on.  Closes our ends of `pipes`."""
    sync_read, sync_write = os.pipe()
    pipes = {"_OCI_SYNCPIPE": sync_write, **pipes}
    sync = trio.lowlevel.FdStream(sync_read)
    environment = {"PATH": os.environ.get("PATH", ""), **{k: str(fd) for k, fd in pipes.items()}}
    try:
        # To a file: the process that goes on would keep a pipe open for ever.
        with (directory / "conmon.log").open("ab") as log:
            await trio.run_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=tuple(pipes.values()),
                start_new_session=True,
            )
    except (OSError, subprocess.CalledProcessError) as error:
        await trio.aclose_forcefully(sync)
        raise KernelRefusedError(f"conmon did not start: {error}") from error
    finally:
        for fd in pipes.values():
            os.close(fd)
    return sync


async def _read_pid(sync: trio.lowlevel.FdStream) -> int:
    raw = b""
    while not raw.endswith(b"\n"):
        chunk = await sync.receive_some(65536)
        if not chunk:
            raise StartError(f"conmon ended early: {raw.decode(errors='replace')}")
        raw += chunk
    answer = json.loads(raw.splitlines()[0])
    pid = int(answer.get("data", answer.get("pid", -1)))
    if pid <= 0:
        raise StartError(clean(str(answer.get("message", ""))))
    return pid


def read_exit(exits: Path, identity: str) -> int | None:
    """The exit status that conmon wrote; None: it has not."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((exits / identity).read_text())
    return None
