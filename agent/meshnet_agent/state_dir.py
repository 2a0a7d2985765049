"""The agent's two directories: every path in them, their locks, and the instance's name.

The state directory survives a reboot of the host, the run directory does not.

Files are replaced as a whole (`meshnet.system.files`), and each record ends with a checksum, so
that damage is noticed.  A file that cannot be used is set aside as ``NAME.bad`` (``NAME.bad.1``, …
if that exists) and reported, never deleted.  A record of a newer version is not damaged: while
there is one, the agent does not start and changes nothing.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import socket
from typing import TYPE_CHECKING

import structlog

from meshnet.codec.checksum import checked
from meshnet.codec.document import BadValueError
from meshnet.errors import ConflictError, KernelRefusedError, PolicyRefusedError
from meshnet.system.files import write_whole
from meshnet.text import NAME_PATTERN

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_log = structlog.get_logger()
RECORD, DRAFT = ".json", ".draft"
"""Suffixes of an endpoint's files: one that exists, and one that is about to be made."""


class StateDir:
    """The agent's state directory, held by one agent at a time.

    Attributes:
        path: the directory itself, absolute.
        instance: random name of this directory; it stays the same when the agent restarts.
        endpoints: records of this host's endpoints (`meshnet_agent.endpoints.records`).
        containers: a directory for each container, with its record, root file system and log.
        images: layers and names of images.
        volumes: named volumes.
        mesh: which mesh this host is a member of (`meshnet_agent.mesh.identity`).
        snapshot: what this host last knew of it (`meshnet_agent.mesh.saver`).
        firewall: the firewall that was last loaded into nftables (`meshnet.kernel.nft`).
        takeover: journals of takeovers (`meshnet.kernel.takeover.journal`).

    Args:
        random_name: makes the instance's name when the directory is new.

    Raises:
        ConflictError: another agent holds the directory.
        PolicyRefusedError: a newer agent has written to it.
        KernelRefusedError: the directory cannot be made or written to.
    """

    def __init__(self, path: Path, random_name: Callable[[], str]) -> None:
        self.path = path = path.absolute()
        self.endpoints = path / "endpoints"
        self.containers = path / "containers"
        self.images = path / "images"
        self.volumes = path / "volumes"
        self.mesh = path / "mesh.json"
        self.snapshot = path / "snapshot.json"
        self.firewall = path / "firewall.json"
        self.takeover = path / "takeover"
        self._instance = path / "instance"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _hold(path / "lock", f"state directory {path}")
            try:
                self._refuse_newer()
            except PolicyRefusedError:
                os.close(self._lock)
                raise
            self.instance = self._load_instance(random_name)
        except OSError as error:
            raise KernelRefusedError(
                f"state directory {path}: {error.strerror}: give --state-dir a directory that "
                "can be written"
            ) from error

    def close(self) -> None:
        """Let another agent have the directory."""
        os.close(self._lock)

    def _load_instance(self, random_name: Callable[[], str]) -> str:
        file = self._instance
        if file.exists():
            name = file.read_bytes().strip().decode("ascii", "replace")
            if NAME_PATTERN.fullmatch(name):
                return name
            set_aside(file, f"{name[:80]!r} is not a name")
        name = random_name()
        write_whole(file, name.encode())
        return name

    def _refuse_newer(self) -> None:
        """Check the version of every file that has one, before any of them is used.

        An older agent once set aside what a newer one had written, or read it as its own; after the
        upgrade the newer one had lost its endpoints and its mesh.
        """
        for directory, pattern, known in (
            (self.path, self.mesh.name, 1),
            (self.path, self.snapshot.name, 1),
            (self.endpoints, f"*{RECORD}", 2),
            (self.endpoints, f"*{DRAFT}", 2),
            (self.containers, "*/container.json", 2),
            (self.takeover, "*.json", 1),
        ):
            for file in sorted(directory.glob(pattern)):
                version = _version_of(file)
                if version > known:
                    raise PolicyRefusedError(
                        f"{file} was written by a newer meshnet-agent (version {version}, this one "
                        f"knows {known}): start the newer one again; nothing was changed"
                    )


def _version_of(file: Path) -> int:
    """The version that a file names; 0 if it names none or cannot be read: it is not newer then."""
    try:
        document = json.loads(checked(file.read_bytes()))
    except (OSError, ValueError, RecursionError, BadValueError):
        return 0
    found = document.get("v") if isinstance(document, dict) else None
    return found if isinstance(found, int) else 0


class RuntimeDir:
    """The agent's run directory, held by one agent at a time and empty after a reboot.

    Attributes:
        path: the directory itself, absolute.
        socket: the API's Unix socket.
        vtep: a directory for each userspace VTEP (`meshnet.vtep.rundir`).
        containers: bundles of containers, and of programs that are executed in them.
        userns: mounts of containers with a user namespace; other users may enter it, not list it.
        oci: the OCI runtime's own state.

    Raises:
        ConflictError: another agent holds the directory.
        KernelRefusedError: the directory cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = path.absolute()
        self.socket = path / "agent.sock"
        self.vtep = path / "vtep"
        self.containers = path / "containers"
        self.userns = path / "userns"
        self.oci = path / "oci"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _hold(path / "lock", f"run directory {path}")
        except OSError as error:
            raise KernelRefusedError(
                f"run directory {path}: {error.strerror}: give --run-dir a directory that can be "
                "written"
            ) from error

    def close(self) -> None:
        """Let another agent have the directory."""
        os.close(self._lock)


def hold_namespace() -> socket.socket:
    """Be the only agent in this network namespace: two would undo each other's work.

    The lock is an abstract Unix socket, since that belongs to the network namespace in which it was
    bound (unix(7)).  A lock file would not: labs run many agents on one file system.

    Returns:
        The socket; closing it releases the lock, and so does the end of the process.

    Raises:
        ConflictError: another agent runs in this network namespace.
    """
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        lock.bind("\0meshnet-agent")
    except OSError as error:
        lock.close()
        raise ConflictError(
            "another meshnet-agent manages this network namespace: stop that one"
        ) from error
    return lock


def _hold(file: Path, what: str) -> int:
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise ConflictError(
            f"{what} is in use by another meshnet-agent: stop that one, or choose another directory"
        ) from error
    return fd


def set_aside(file: Path, reason: str) -> None:
    """Rename a file that cannot be used, without replacing one that was set aside before.

    Raises:
        OSError: the file cannot be renamed.
    """
    bad = file.with_suffix(".bad")
    for number in itertools.count(1):
        if not bad.exists():
            break
        bad = file.with_suffix(f".bad.{number}")
    _log.error("file set aside", file=str(file), to=bad.name, reason=reason)
    file.rename(bad)
