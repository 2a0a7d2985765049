"""Takes a lab down, whoever made it and however far it or an earlier take-down got.

It finds processes by ``lab.json`` (pid and start time), by the network namespace they live in, and
by their parents; namespaces by their names; mounts by ``/proc/self/mountinfo``; control groups by
the agents' records of their containers.  May import only the standard library, `meshnet.errors`,
`meshnet.system` and the lab's lower modules.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import ConflictError, KernelRefusedError, NotFoundError
from meshnet.lab.netns import ETCDS, delete_netns, list_netns, netns_name, netns_path
from meshnet.lab.poll import wait_until
from meshnet.lab.process import (
    NetnsId,
    ProcessRef,
    end_processes,
    find_in_namespaces,
    netns_id,
    own_netns_id,
    with_descendants,
)
from meshnet.lab.state import (
    LABS_DIR,
    ContainerRecord,
    LabDocument,
    LabFile,
    is_lab_dir,
    removal_order,
)
from meshnet.system import libc
from meshnet.system.proc import mounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_DEADLINE_S = 5.0
# What is being ended may start further processes, as a shell does, so it takes several rounds.
_ROUNDS = 10
END_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Removed:
    """What a take-down found and removed.

    Attributes:
        processes: how many it ended.
        namespaces: names of the namespaces it removed.
        directory: whether the lab's directory was there.
    """

    processes: int
    namespaces: list[str]
    directory: bool

    @property
    def anything(self) -> bool:
        """Whether there was anything to remove."""
        return bool(self.processes or self.namespaces or self.directory)


def tear_down(
    lab: str,
    base_dir: Path,
    *,
    known: Iterable[ProcessRef] = (),
    progress: Callable[[str], None] | None = None,
    deadline_s: float = END_DEADLINE_S,
) -> Removed:
    """Remove everything of a lab: agents and containers, then etcd, namespaces and directory.

    Harmless if the lab does not exist, and may be called again after it failed or was killed.

    Args:
        lab: name of the lab.
        base_dir: its directory.
        known: processes that the caller knows to be the lab's, on top of those in ``lab.json``.
        progress: called with a line before every step.
        deadline_s: seconds that agents and containers get to end before they are killed.

    Raises:
        ConflictError: `base_dir` is not this lab's directory, or the caller itself is in one of
            the lab's namespaces.
        KernelRefusedError: something cannot be removed.
    """
    say = progress or (lambda _: None)
    document = _read_document(lab, base_dir)
    namespaces = list_netns(lab)
    _refuse_from_inside(namespaces)
    etcd_namespaces = {netns_name(lab, name) for name in ETCDS}
    etcds = set() if document is None else set(document.etcds.values())
    others = {*known, *([] if document is None else document.processes())} - etcds
    containers = [] if document is None else document.containers

    say("ending agents and containers")
    # etcd comes last, so that agents can give their leases back as they end.
    count = end_everything(
        [netns_path(name) for name in namespaces if name not in etcd_namespaces],
        others,
        containers,
        deadline_s=deadline_s,
    )
    say("ending etcd")
    etcd_paths = [netns_path(name) for name in namespaces if name in etcd_namespaces]
    # Killed at once: its data goes as well, and a leader that ends in order first spends seconds on
    # finding a successor.
    count += end_everything(etcd_paths, etcds, deadline_s=0)
    say("removing namespaces and directories")
    delete_netns(namespaces)
    directory = base_dir.is_dir()
    if directory:
        _remove_base_dir(base_dir)
    return Removed(processes=count, namespaces=namespaces, directory=directory)


def end_everything(
    namespaces: Iterable[Path],
    refs: Iterable[ProcessRef],
    containers: Iterable[ContainerRecord] = (),
    *,
    deadline_s: float,
) -> int:
    """End processes, all others in the given namespaces, and all descendants.

    Args:
        namespaces: paths of namespaces that are the lab's.
        refs: processes that are the lab's.
        containers: processes that end with all others in the namespace made for each.
        deadline_s: seconds between SIGTERM and SIGKILL; 0 is SIGKILL at once.

    Returns:
        How many were ended.

    Raises:
        KernelRefusedError: some cannot be ended, or new ones keep appearing.
    """
    wanted = set(refs)
    ended: set[ProcessRef] = set()
    with contextlib.ExitStack() as stack:
        # Namespaces are held open until the end: as long as we refer to one, the kernel does not
        # reuse its inode number, so nobody else's process can be taken for one of the lab's.
        ids = {found for path in namespaces if (found := _hold(path, stack)) is not None}
        for container in containers:
            wanted.add(container.ref)
            found = _hold(Path(f"/proc/{container.ref.pid}/ns/net"), stack)
            # Compared, because the process may not have reached its namespace yet, or left it.
            if found is not None and found == container.netns and container.ref.is_alive():
                ids.add(found)
        for _ in range(_ROUNDS):
            left = with_descendants(wanted | find_in_namespaces(ids))
            if not left:
                return len(ended)
            end_processes(left, deadline_s=deadline_s)
            ended |= left
    pids = ", ".join(str(ref.pid) for ref in left)
    raise KernelRefusedError(
        f"processes keep appearing in the lab's namespaces, last {pids}: end what starts them"
    )


def _hold(path: Path, stack: contextlib.ExitStack) -> NetnsId | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    stack.callback(os.close, descriptor)
    stat = os.fstat(descriptor)
    return (stat.st_dev, stat.st_ino)


def _read_document(lab: str, base_dir: Path) -> LabDocument | None:
    if not base_dir.is_dir():
        return None
    if not is_lab_dir(base_dir):
        raise ConflictError(
            f"{base_dir} is not a lab's directory (it has no lab.json) and is left alone: "
            "remove it yourself"
        )
    try:
        document = LabFile(base_dir).read()
    except (NotFoundError, ConflictError):
        # 'up' was killed before it wrote the file, or the file is damaged.  The processes are found
        # by their namespaces all the same.
        return None
    if document.name != lab:
        raise ConflictError(
            f"{base_dir} belongs to lab {document.name!r}, not {lab!r}: "
            f"use 'meshnet lab down --name {document.name}'"
        )
    return document


def _refuse_from_inside(namespaces: Iterable[str]) -> None:
    for name in namespaces:
        if netns_id(netns_path(name)) == own_netns_id():
            raise ConflictError(
                f"this command runs in the lab's own namespace {name}: leave it and try again"
            )


def _remove_base_dir(base_dir: Path) -> None:
    _unmount_below(base_dir)
    _remove_cgroups(base_dir)
    try:
        # lab.json goes last: as long as anything else is left, a second attempt recognises the
        # directory by it.
        for path in removal_order(base_dir):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        base_dir.rmdir()
    except FileNotFoundError:
        pass  # another 'lab down' removes it at the same time
    except OSError as exc:
        raise KernelRefusedError(f"{base_dir} cannot be removed: {exc}") from exc
    if base_dir.parent == LABS_DIR:
        with contextlib.suppress(OSError):  # other labs are there
            LABS_DIR.rmdir()


def _unmount_below(base_dir: Path) -> None:
    """Unmount everything below a directory.

    Containers' root file systems are mounted below the agent's state directory, with volumes and
    the user's directories in them.  Removing files through these mounts would remove the user's.
    """
    root = f"{base_dir.resolve()}/"
    # mountinfo lists a mount after the one that it is on, so the innermost go first.
    for mount in reversed(list(mounts())):
        if mount.point.startswith(root):
            try:
                libc.umount(mount.point, libc.MNT_DETACH)
            except OSError as exc:
                raise KernelRefusedError(
                    f"{mount.point} cannot be unmounted: {exc.strerror}"
                ) from exc


def _remove_cgroups(base_dir: Path) -> None:
    """Remove the control groups of containers that the agents still had when they ended."""
    for record in base_dir.glob("*/state/containers/*"):
        # cgroups v1 have a tree for each controller, v2 has a single one.
        for group in (
            *_CGROUPS.glob(f"*/meshnet/{record.name}"),
            _CGROUPS / "meshnet" / record.name,
        ):
            try:
                # Busy until the last process, which has ended, is reaped.
                wait_until(lambda: _is_removed(group), _CGROUP_DEADLINE_S, "removed")  # noqa: B023
            except (OSError, TimeoutError) as exc:
                raise KernelRefusedError(f"{group} cannot be removed: {exc}") from exc


def _is_removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise
        return False
    return True
