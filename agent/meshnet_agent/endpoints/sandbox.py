"""Sandboxes of processes: opened by pid or found again, and watched for their end.

The one place in the agent that knows that a pid leads to a namespace.  A process is known by its
pid and start time, its namespace by device and inode.  An open sandbox holds both by descriptors,
so that neither can be mistaken for another, even if the kernel reuses a pid or an inode.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Self, final

import trio

from meshnet.errors import MeshnetError, NotFoundError, PolicyRefusedError
from meshnet.kernel.netns import find_process, host_netns, netns_id, netns_of, open_netns
from meshnet.model import ProcessSandbox
from meshnet.state import endpoint_link_name
from meshnet.system.proc import start_ticks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from meshnet.kernel import Wiring
    from meshnet.model import Endpoint, NetnsId, Sandbox
    from meshnet_agent.tasks.worker import Worker

_NOT_ENOUGH = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say nothing about the process: its endpoints must not be freed because of them."""


@final
class SandboxEnd:
    """Tells when a sandbox's process ends; owns a pidfd."""

    def __init__(self, pid_fd: int) -> None:
        self._pid_fd = pid_fd

    async def wait(self) -> None:
        """Wait until the process has ended.  Others in its namespace may go on."""
        await trio.lowlevel.wait_readable(self._pid_fd)

    def close(self) -> None:
        """Stop watching."""
        os.close(self._pid_fd)


@final
class OpenSandbox:
    """A sandbox whose namespace stays while this is open, a context manager.

    Attributes:
        value: which one it is.
        netns_fd: its namespace; closed with the sandbox.
    """

    def __init__(self, value: Sandbox, netns_fd: int, pid_fd: int) -> None:
        self.value = value
        self.netns_fd = netns_fd
        self._pid_fd = pid_fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its descriptors; each `SandboxEnd` has one of its own, which stays open."""
        os.close(self._pid_fd)
        os.close(self.netns_fd)

    def end(self) -> SandboxEnd:
        """What tells of its process's end, with a descriptor of its own; the caller closes it.

        Raises:
            OSError: the agent is out of descriptors.
        """
        return SandboxEnd(os.dup(self._pid_fd))


def open_sandbox(pid: int) -> OpenSandbox:
    """Open the sandbox of a process, to attach an endpoint to it.

    Raises:
        NotFoundError: there is no such process, or it has ended (a zombie has no namespace).
        PolicyRefusedError: it is in the host's own namespace, or the agent may not look at it.
        OSError: the agent is out of descriptors.
    """
    opened = _open(pid)
    try:
        if opened.value.netns in host_netns():
            raise PolicyRefusedError(
                f"process {pid} is in this host's own network namespace: start it in one of its "
                "own, for example with `unshare --net`"
            )
    except BaseException:
        opened.close()
        raise
    return opened


def reopen(sandbox: Sandbox) -> OpenSandbox:
    """Open a sandbox that was open before.

    Raises:
        NotFoundError: its process has ended, or has left for another namespace.
        PolicyRefusedError: the agent may not look at it.
    """
    opened = _open(sandbox.pid)
    if opened.value != sandbox:
        opened.close()
        raise NotFoundError(f"process {sandbox.pid} is not the one that was attached, which ended")
    return opened


def select_of_process(endpoints: Iterable[Endpoint], pid: int) -> list[Endpoint]:
    """Endpoints in a process's network namespace; if it has ended, those attached by its pid."""
    netns = netns_of(pid)
    return [
        e
        for e in endpoints
        if (e.sandbox.pid == pid if netns is None else e.sandbox.netns == netns)
    ]


def _open(pid: int) -> OpenSandbox:
    with contextlib.ExitStack() as undo:
        try:
            pid_fd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno in _NOT_ENOUGH:
                raise
            raise NotFoundError(
                f"process {pid} does not exist: give the pid of a running process"
            ) from error
        undo.callback(os.close, pid_fd)
        netns_fd = open_netns(pid)
        undo.callback(os.close, netns_fd)
        value = ProcessSandbox(pid=pid, pid_start_ticks=start_ticks(pid), netns=netns_id(netns_fd))
        undo.pop_all()
    return OpenSandbox(value, netns_fd, pid_fd)


class Sandboxes:
    """Looks for the sandboxes of endpoints that an earlier agent attached, or whose process ended.

    What is found is the caller's to close.
    """

    def __init__(self, wiring: Worker[Wiring]) -> None:
        self._wiring = wiring

    async def find(self, endpoint: Endpoint, link_names: Collection[str]) -> OpenSandbox | None:
        """The sandbox of an endpoint on disk: its own process, or an heir as in `find_heir`.

        Args:
            link_names: all host-side links that exist.
        """
        with contextlib.suppress(MeshnetError):
            return reopen(endpoint.sandbox)
        if endpoint.parent is not None or endpoint_link_name(endpoint.id) in link_names:
            # The link exists, so its namespace does, and the inode is still that namespace's.  A
            # macvlan's does not show here: `find_heir` looks for it inside.
            return await self.find_heir(endpoint)
        return None

    async def find_heir(self, endpoint: Endpoint) -> OpenSandbox | None:
        """The sandbox by another process of its namespace; None: there is none."""
        heir = await self._open_any(endpoint.sandbox.netns)
        if heir is None or endpoint.parent is None:
            return heir
        try:
            holds = await self._wiring.run(lambda wiring: wiring.holds(heir.netns_fd, endpoint))
        except BaseException:
            heir.close()
            raise
        if not holds:  # another namespace, which got the inode of one that is gone
            heir.close()
            return None
        return heir

    async def _open_any(self, netns: NetnsId) -> OpenSandbox | None:
        while True:
            pid = await trio.to_thread.run_sync(find_process, netns)
            if pid is None:
                return None
            # Look again after one that ended before it was opened: it may have left children.
            with contextlib.suppress(NotFoundError):
                found = _open(pid)
                if found.value.netns == netns:
                    return found
                found.close()
