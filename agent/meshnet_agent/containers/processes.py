"""Processes that outlive the agent: identified for ever, signalled and awaited by pidfd."""

from __future__ import annotations

import contextlib
import os
import signal

import trio

from meshnet.errors import NotFoundError, UsageError
from meshnet.system.proc import boot_id, start_ticks
from meshnet_agent.containers.record import ProcessId


def identify(pid: int) -> ProcessId:
    """Identify a process for ever.

    Raises:
        NotFoundError: there is no such process.
    """
    return ProcessId(pid, start_ticks(pid), boot_id())


def is_alive(process: ProcessId) -> bool:
    """Whether the process still exists, and its pid was not reused."""
    try:
        return identify(process.pid) == process
    except NotFoundError:
        return False


def send(process: ProcessId, number: signal.Signals) -> None:
    """Signal a process, if it is still that one."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(process.pid)
        try:
            # Looked at once the descriptor is open: that stays with one process, the pid does not.
            if is_alive(process):
                signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)


async def wait_for_end(process: ProcessId) -> None:
    """Wait until a process has ended."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if is_alive(process):
            await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)


def parse_signal(text: str) -> signal.Signals:
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
