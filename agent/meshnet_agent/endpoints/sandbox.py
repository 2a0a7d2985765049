"""Sandboxes: opened by pid or path, found again, and watched for their end.

The one place in the agent that knows that a pid leads to a namespace.  A process is known by its
pid and start time, its namespace by device and inode.  An open sandbox holds both by descriptors,
so that neither can be mistaken for another, even if the kernel reuses a pid or an inode.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Self, final

import trio

from meshnet.errors import MeshnetError, NotFoundError, PolicyRefusedError
from meshnet.kernel.netns import (
    NOT_ENOUGH,
    find_process,
    host_netns,
    netns_id,
    netns_of,
    open_netns,
)
from meshnet.sandbox import HoldSandbox, ProcessSandbox
from meshnet.state import endpoint_link_name
from meshnet.system.proc import start_ticks
from meshnet_agent.endpoints.hold import of_this_boot, open_hold, open_seen, reopen_hold

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from meshnet.kernel import Wiring
    from meshnet.model import Endpoint
    from meshnet.sandbox import NetnsId, Sandbox
    from meshnet_agent.endpoints.hold import BoundNetns
    from meshnet_agent.tasks.worker import Worker


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

    def __init__(self, value: Sandbox, netns_fd: int, pid_fd: int | None) -> None:
        self.value = value
        self.netns_fd = netns_fd
        self._pid_fd = pid_fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its descriptors; each `SandboxEnd` has one of its own, which stays open."""
        if self._pid_fd is not None:
            os.close(self._pid_fd)
        os.close(self.netns_fd)

    def end(self) -> SandboxEnd | None:
        """What tells of its process's end, with a descriptor of its own; the caller closes it.

        None: it is a hold, which somebody releases.

        Raises:
            OSError: the agent is out of descriptors.
        """
        return SandboxEnd(os.dup(self._pid_fd)) if self._pid_fd is not None else None


def open_sandbox(pid: int) -> OpenSandbox:
    """Open the sandbox of a process, to attach an endpoint to it.

    Raises:
        NotFoundError: there is no such process, or it has ended (a zombie has no namespace).
        PolicyRefusedError: it is in the host's own namespace, or the agent may not look at it.
        OSError: the agent is out of descriptors.
    """
    opened = _open(pid)
    _refuse_host(opened, "start it in one of its own, for example with `unshare --net`")
    return opened


def open_bound_sandbox(bound: BoundNetns, owner: str | None) -> OpenSandbox:
    """Open the sandbox of a namespace bound to a path, to attach an endpoint to it.

    Raises:
        UsageError: the path or the owner key is not usable.
        NotFoundError: there is no network namespace at the path.
        PolicyRefusedError: it is the host's own, or the agent may not look there.
        OSError: the agent is out of descriptors.
    """
    hold, netns_fd = open_hold(bound, owner)
    opened = OpenSandbox(hold, netns_fd, None)
    _refuse_host(opened, "give the path of another, for example of `ip netns add`")
    return opened


def _refuse_host(opened: OpenSandbox, remedy: str) -> None:
    """Close a sandbox that is in the host's own namespace, and raise `PolicyRefusedError`."""
    try:
        if opened.value.netns in host_netns():
            raise PolicyRefusedError(
                f"{opened.value} is in this host's own network namespace: {remedy}"
                if isinstance(opened.value, ProcessSandbox)
                else f"{opened.value} is this host's own: {remedy}"
            )
    except BaseException:
        opened.close()
        raise


def reopen(sandbox: Sandbox) -> OpenSandbox:
    """Open a sandbox that was open before.

    Raises:
        NotFoundError: its process has ended, or has left for another namespace; nothing holds its
            namespace any more.
        PolicyRefusedError: the agent may not look at it.
        OSError: the agent is out of descriptors.
    """
    if isinstance(sandbox, HoldSandbox):
        return OpenSandbox(sandbox, reopen_hold(sandbox), None)
    opened = _open(sandbox.pid)
    if opened.value != sandbox:
        opened.close()
        raise NotFoundError(f"process {sandbox.pid} is not the one that was attached, which ended")
    return opened


def select_of_process(endpoints: Iterable[Endpoint], pid: int) -> list[Endpoint]:
    """Endpoints in a process's network namespace; if it has ended, those attached by its pid."""
    netns = netns_of(pid)
    if netns is not None:
        return [e for e in endpoints if e.sandbox.netns == netns]
    return [e for e in endpoints if isinstance(e.sandbox, ProcessSandbox) and e.sandbox.pid == pid]


def select_bound(endpoints: Iterable[Endpoint], bound: BoundNetns) -> list[Endpoint]:
    """Endpoints in the namespace at a path; if none is there any more, those attached by the path.

    Raises:
        PolicyRefusedError: the agent may not look there.
    """
    try:
        netns_fd = open_seen(bound)
    except NotFoundError:
        return [e for e in endpoints if _is_hold_at(e.sandbox, bound.path)]
    netns = netns_id(netns_fd)
    os.close(netns_fd)
    return [e for e in endpoints if e.sandbox.netns == netns]


def _is_hold_at(sandbox: Sandbox, path: str) -> bool:
    return isinstance(sandbox, HoldSandbox) and sandbox.path == path


def _open(pid: int) -> OpenSandbox:
    with contextlib.ExitStack() as undo:
        try:
            pid_fd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno in NOT_ENOUGH:
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

    async def lives(self, endpoint: Endpoint, link_names: Collection[str]) -> bool:
        """Whether the sandbox of an endpoint on disk is still there (`find`, `is_held`)."""
        if isinstance(endpoint.sandbox, HoldSandbox):
            return self.is_held(endpoint, link_names)
        found = await self.find(endpoint, link_names)
        if found is None:
            return False
        found.close()
        return True

    def is_held(self, endpoint: Endpoint, link_names: Collection[str]) -> bool:
        """Whether an endpoint's hold may still be there, as far as this agent can see.

        The host's end of a veth pair proves that the namespace lives, even if no path that this
        agent sees leads there.  Of a macvlan nothing shows here, so only a reboot proves its end.

        Args:
            link_names: all host-side links that exist.
        """
        if not isinstance(endpoint.sandbox, HoldSandbox) or not of_this_boot(endpoint.sandbox):
            return False
        if endpoint.parent is not None or endpoint_link_name(endpoint.id) in link_names:
            return True
        try:
            reopen(endpoint.sandbox).close()
        except NotFoundError:
            return False
        return True

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
