"""Network namespaces: finding that of a process, and doing something inside one.

`setns(2)` moves one thread; pyroute2's helper is not used because it creates a namespace that does
not exist.  Only the thread that enters is moved, and it always comes back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

from meshnet.errors import NotFoundError, PolicyRefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_NEWNET = 0x4000_0000
_libc = ctypes.CDLL(None, use_errno=True)


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


def netns_inode(fd: int) -> int:
    """The number that tells a namespace from all others alive."""
    return os.fstat(fd).st_ino


def host_netns_inodes() -> set[int]:
    """Inodes of the calling thread's network namespace and of that of process 1.

    They differ where the agent itself runs in a namespace, as in the lab; endpoints belong in
    neither.

    Raises:
        PolicyRefusedError: that of process 1 cannot be found out.
    """
    own = os.stat("/proc/thread-self/ns/net").st_ino
    # Process 1 may be out of reach even for root; process 2, the kernel's, is in the same one.
    for pid in (1, 2):
        with contextlib.suppress(OSError):
            return {own, os.stat(f"/proc/{pid}/ns/net").st_ino}
    raise PolicyRefusedError(
        "neither process 1's nor process 2's network namespace may be looked at, so this machine's "
        "own cannot be told from others: run the agent in the machine's pid namespace"
    )


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5), field 22 of stat).

    Raises:
        NotFoundError: there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything, so fields count from its end.
            return int(file.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NotFoundError(
            f"process {pid} does not exist: give the pid of a running process"
        ) from error


def find_process(inode: int) -> int | None:
    """Any process whose network namespace has this inode."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry}/ns/net").st_ino == inode:
                    return int(entry)
    return None


def open_by_inode(inode: int) -> int | None:
    """A descriptor of the network namespace with this inode, if anything keeps it that can be seen.

    That is a process, or a mount as ``ip netns`` and container engines make them.  The caller
    closes it.
    """
    pid = find_process(inode)
    paths = [f"/proc/{pid}/ns/net"] if pid is not None else []
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as mounts:
        # proc(5): fields 4 and 5 are what is mounted, and where.
        fields = [line.split() for line in mounts]
        name = b"net:[%d]" % inode
        paths += [os.fsdecode(f[4]) for f in fields if f[3] == name]
    for path in paths:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if netns_inode(fd) == inode:
                return fd
            os.close(fd)
    return None


@contextlib.contextmanager
def inside(fd: int) -> Iterator[None]:
    """Run the block with the calling thread in another network namespace.

    Raises:
        OSError: the kernel refused to enter (EPERM), or the descriptor is no namespace.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(fd)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")


@contextlib.contextmanager
def open_process(pid: int) -> Iterator[tuple[int, int]]:
    """Descriptors of a process and of its network namespace.

    Raises:
        NotFoundError: there is no such process, or it has ended (a zombie has no namespace).
    """
    with contextlib.ExitStack() as stack:
        try:
            pid_fd = os.pidfd_open(pid)
        except (ProcessLookupError, OSError) as error:
            raise NotFoundError(
                f"process {pid} does not exist: give the pid of a running process"
            ) from error
        stack.callback(os.close, pid_fd)
        netns_fd = open_netns(pid)
        stack.callback(os.close, netns_fd)
        yield pid_fd, netns_fd
