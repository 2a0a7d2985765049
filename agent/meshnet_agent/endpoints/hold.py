"""Holds: network namespaces known by a path, attached while no process is in them."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass

from meshnet.errors import MeshnetError, NotFoundError, UsageError
from meshnet.kernel.netns import netns_id, open_bound, open_by_id
from meshnet.sandbox import HoldSandbox
from meshnet.system.proc import boot_id
from meshnet.text import check_owner, printable

_OF_PROCESS = re.compile(r"/proc/\d+(/task/\d+)?/ns/net")
_MOST_PATH = 4095
"""linux/limits.h: PATH_MAX, with the final NUL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundNetns:
    """The path of a network namespace, as a caller gave it.

    Attributes:
        root_of: pid of a process in whose file system the path is; None: in the agent's own.
        inode: the namespace that the caller sees there; None: it did not look.
    """

    path: str
    root_of: int | None = None
    inode: int | None = None


def open_hold(bound: BoundNetns, owner: str | None) -> tuple[HoldSandbox, int]:
    """Open a namespace by its path; returns the hold, and a descriptor that the caller closes.

    Args:
        owner: None: the namespace is its own owner.

    Raises:
        UsageError: the path or the owner key is not usable.
        NotFoundError: there is no network namespace.
        PolicyRefusedError: the agent may not look there.
    """
    if owner is not None:
        check_owner(owner)
    if not bound.path.startswith("/") or "\0" in bound.path or len(bound.path) > _MOST_PATH:
        shown = printable(bound.path, 80)
        raise UsageError(f"path {shown!r} of a network namespace is not usable: give it from / on")
    fd = open_seen(bound)
    netns = netns_id(fd)
    owner = owner or f"netns:{netns.inode}"
    return HoldSandbox(path=bound.path, netns=netns, owner=owner, boot_id=boot_id()), fd


def open_seen(bound: BoundNetns) -> int:
    """Open the namespace that the caller sees at the path.

    An agent in a container has another file system than its callers.  The inode proves that both
    mean the same namespace, whichever way it was opened.  The caller closes the descriptor.

    Raises:
        NotFoundError: there is no network namespace, or another one.
        PolicyRefusedError: the agent may not look there.
    """
    try:
        fd = open_bound(bound.path, bound.root_of)
    except NotFoundError:
        # openat2(2) does not follow links of /proc/PID/ns when it keeps to a root.  The agent's own
        # /proc has the same processes if it shares the pid namespace; if not, the inode tells.
        if bound.root_of is None or not _OF_PROCESS.fullmatch(bound.path):
            raise
        fd = open_bound(bound.path)
    if bound.inode not in (None, netns_id(fd).inode):
        os.close(fd)
        raise NotFoundError(
            f"path {bound.path} leads this agent to another network namespace than its caller: "
            "run the agent in the machine's pid namespace, and with its /run/netns"
        )
    return fd


def reopen_hold(hold: HoldSandbox) -> int:
    """A descriptor of a hold's namespace, wherever it is bound now; the caller closes it.

    Raises:
        NotFoundError: nothing that the agent sees keeps it alive.
        OSError: the agent is out of descriptors.
    """
    if not of_this_boot(hold):
        raise NotFoundError(f"{hold} is of an earlier boot of this machine")
    with contextlib.suppress(MeshnetError):
        fd = open_bound(hold.path)
        if netns_id(fd) == hold.netns:
            return fd
        os.close(fd)
    found = open_by_id(hold.netns)
    if found is None:
        raise NotFoundError(f"{hold} is gone: release what is attached to it")
    return found


def of_this_boot(hold: HoldSandbox) -> bool:
    """Whether a hold's namespace can still exist: none outlives the boot that it was made in."""
    return hold.boot_id == boot_id()
