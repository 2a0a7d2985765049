"""Network namespaces: finding that of a process, and doing something inside one.

`setns(2)` moves one thread; pyroute2's helper is not used because it creates a namespace that does
not exist.  Only the thread that enters is moved, and it always comes back.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from meshnet.errors import NotFoundError, PolicyRefusedError
from meshnet.model import NetnsId
from meshnet.system import libc
from meshnet.system.proc import mounts

if TYPE_CHECKING:
    from collections.abc import Iterator


def open_netns(pid: int) -> int:
    """A descriptor of a process's network namespace; the caller closes it.

    Raises:
        NotFoundError: there is no such process.
        PolicyRefusedError: this process may not look at it.
    """
    try:
        return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NotFoundError(
            f"process {pid} does not exist: give the pid of a running process"
        ) from error
    except PermissionError as error:
        raise PolicyRefusedError(
            f"the namespaces of process {pid} may not be looked at by this agent: give the pid of "
            "another process of the same namespace"
        ) from error


def netns_id(fd: int) -> NetnsId:
    """Which namespace a descriptor is of."""
    return _id_of(os.fstat(fd))


def netns_of(pid: int) -> NetnsId | None:
    """The network namespace that a process is in; None: it has ended, or may not be looked at."""
    try:
        return _id_of(os.stat(f"/proc/{pid}/ns/net"))
    except OSError:
        return None


def own_netns() -> NetnsId:
    """The calling thread's."""
    return _id_of(os.stat("/proc/thread-self/ns/net"))


def host_netns() -> set[NetnsId]:
    """The calling thread's network namespace and that of process 1.

    They differ where the agent itself runs in a namespace, as in the lab; endpoints belong in
    neither.

    Raises:
        PolicyRefusedError: that of process 1 cannot be found out.
    """
    # Process 1 may be out of reach even for root; process 2, the kernel's, is in the same one.
    for pid in (1, 2):
        found = netns_of(pid)
        if found is not None:
            return {own_netns(), found}
    raise PolicyRefusedError(
        "neither process 1's nor process 2's network namespace may be looked at, so this machine's "
        "own cannot be told from others: run the agent in the machine's pid namespace"
    )


def find_process(netns: NetnsId) -> int | None:
    """Any process of a network namespace."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and netns_of(int(entry)) == netns:
            return int(entry)
    return None


def open_by_id(netns: NetnsId) -> int | None:
    """A descriptor of a network namespace, if anything keeps it that can be seen.

    That is a process, or a mount as ``ip netns`` and container engines make them.  The caller
    closes it.
    """
    pid = find_process(netns)
    paths = [f"/proc/{pid}/ns/net"] if pid is not None else []
    with contextlib.suppress(OSError):
        paths += [m.point for m in mounts() if m.root == b"net:[%d]" % netns.inode]
    for path in paths:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if netns_id(fd) == netns:
                return fd
            os.close(fd)
    return None


def _id_of(file: os.stat_result) -> NetnsId:
    return NetnsId(file.st_dev, file.st_ino)


@contextlib.contextmanager
def inside(fd: int) -> Iterator[None]:
    """Run the block with the calling thread in another network namespace.

    Raises:
        OSError: the kernel refused to enter (EPERM), or the descriptor is no namespace.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc.setns(fd, libc.CLONE_NEWNET)
        try:
            yield
        finally:
            libc.setns(home, libc.CLONE_NEWNET)
    finally:
        os.close(home)
