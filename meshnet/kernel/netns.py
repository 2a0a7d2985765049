"""Network namespaces: finding that of a process, and running code inside one.

`setns(2)` moves only the calling thread, and `inside` always brings it back.  pyroute2's helper is
not used: it creates a namespace that does not exist.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING

from meshnet.errors import NotFoundError, PolicyRefusedError
from meshnet.sandbox import NetnsId
from meshnet.system import libc
from meshnet.system.proc import mounts

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_ENOUGH = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say nothing about a process or a namespace: nothing may be freed because of them."""
_NS_GET_NSTYPE = 0xB703
"""linux/nsfs.h."""


def open_netns(pid: int) -> int:
    """A descriptor of a process's network namespace; the caller closes it.

    Raises:
        NotFoundError: the process does not exist.
        PolicyRefusedError: the agent may not look at the process.
    """
    try:
        return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NotFoundError(
            f"process {pid} does not exist: give the pid of a running process"
        ) from error
    except PermissionError as error:
        raise PolicyRefusedError(
            f"this agent may not look at the namespaces of process {pid}: give the pid of another "
            "process in the same namespace"
        ) from error


def open_bound(path: str, root_of: int | None = None) -> int:
    """A descriptor of the network namespace that is bound to a path; the caller closes it.

    Args:
        path: absolute.
        root_of: pid of the process in whose file system the path is; None: in the agent's own.

    Raises:
        NotFoundError: there is nothing at that path, or not a network namespace.
        PolicyRefusedError: the agent may not look there.
        OSError: the agent is out of descriptors.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        if root_of is None:
            fd = os.open(path, flags)
        else:
            root = os.open(f"/proc/{root_of}/root", os.O_PATH | os.O_CLOEXEC)
            try:
                fd = libc.openat2(root, path, flags, libc.RESOLVE_IN_ROOT)
            finally:
                os.close(root)
    except PermissionError as error:
        raise PolicyRefusedError(f"this agent may not open {path}: run it as root") from error
    except OSError as error:
        if error.errno in NOT_ENOUGH:
            raise
        raise NotFoundError(
            f"network namespace {path} cannot be opened: {error.strerror}: give the path of one, "
            "as `ip netns add` makes them below /run/netns"
        ) from error
    if not _is_netns(fd):
        os.close(fd)
        # What is left of a namespace after it is unmounted: an empty file.
        raise NotFoundError(
            f"{path} is not a network namespace (perhaps not any more): give the path of one, as "
            "`ip netns add` makes them below /run/netns"
        )
    return fd


def _is_netns(fd: int) -> bool:
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == libc.CLONE_NEWNET
    except OSError:  # ENOTTY: not of nsfs
        return False


def netns_id(fd: int) -> NetnsId:
    """The namespace that a descriptor refers to."""
    return _id_of(os.fstat(fd))


def netns_of(pid: int) -> NetnsId | None:
    """The network namespace of a process; None: it has ended, or the agent may not look at it."""
    try:
        return _id_of(os.stat(f"/proc/{pid}/ns/net"))
    except OSError:
        return None


def own_netns() -> NetnsId:
    """The calling thread's network namespace."""
    # Not /proc/self, which is the main thread's: a worker may have entered another.
    return _id_of(os.stat("/proc/thread-self/ns/net"))


def host_netns() -> set[NetnsId]:
    """The calling thread's network namespace and that of process 1.

    They differ where the agent itself runs in a namespace, as in the lab; endpoints belong in
    neither.

    Raises:
        PolicyRefusedError: the agent may not look at process 1.
    """
    # Process 1 may be out of reach even for root; process 2, kthreadd, is in the same namespace.
    for pid in (1, 2):
        found = netns_of(pid)
        if found is not None:
            return {own_netns(), found}
    raise PolicyRefusedError(
        "this agent may look at the network namespace of neither process 1 nor process 2, and so "
        "cannot tell the machine's own from others: run it in the machine's pid namespace"
    )


def find_process(netns: NetnsId) -> int | None:
    """Any process of a network namespace."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and netns_of(int(entry)) == netns:
            return int(entry)
    return None


def open_by_id(netns: NetnsId) -> int | None:
    """A descriptor of a network namespace; None: nothing that the agent can see keeps it alive.

    A process does, or a mount as ``ip netns`` and container engines make them.  The caller closes
    the descriptor.
    """
    pid = find_process(netns)
    paths = [f"/proc/{pid}/ns/net"] if pid is not None else []
    with contextlib.suppress(OSError):
        paths += [m.point for m in mounts() if m.root == b"net:[%d]" % netns.inode]
    for path in paths:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            # Compared after opening: the process may have ended and its pid be another's now.
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
        OSError: the kernel refused to enter (EPERM), or the descriptor is not of a namespace.
    """
    # A descriptor, not a path: after setns(2) the path leads to the namespace that was entered.
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc.setns(fd, libc.CLONE_NEWNET)
        try:
            yield
        finally:
            libc.setns(home, libc.CLONE_NEWNET)
    finally:
        os.close(home)
