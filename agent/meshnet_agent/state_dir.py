"""What the agent keeps on disk: its instance name and its endpoints.

Files are replaced whole (`meshnet.files`), and a record ends with a checksum, so that no damage is
believed.  A file that cannot be used is set aside as ``NAME.bad`` (``NAME.bad.1``, … if that is
there) and reported, never deleted.  A record that a newer version wrote is no damage: while there
is one the agent does not start, and touches nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import socket
from typing import TYPE_CHECKING

import structlog

from meshnet.codec.checksum import checked, with_checksum
from meshnet.codec.document import BadValueError
from meshnet.codec.endpoints import decode_endpoint, encode_endpoint
from meshnet.errors import ConflictError, KernelRefusedError, PolicyRefusedError
from meshnet.files import UNFINISHED, write_whole
from meshnet.text import NAME_PATTERN

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.model import Endpoint, EndpointId

_log = structlog.get_logger()
_VERSION = 1
_VERSIONED = (
    "mesh.json",
    "endpoints/*.json",
    "endpoints/*.draft",
    "containers/*/container.json",
    "takeover/*.json",
)


class StateDir:
    """The agent's state directory, held by one agent at a time.

    Args:
        random_name: makes the instance name of a new directory.

    Raises:
        ConflictError: another agent holds the directory.
        PolicyRefusedError: a newer agent has written to it.
        KernelRefusedError: it cannot be made or written.
    """

    def __init__(self, path: Path, random_name: Callable[[], str]) -> None:
        self.path = path
        self._endpoints = path / "endpoints"
        try:
            self._endpoints.mkdir(parents=True, exist_ok=True)
            self._lock = _hold(path / "lock", f"state directory {path}")
            try:
                _refuse_newer(path)
            except PolicyRefusedError:
                os.close(self._lock)
                raise
            for file in self._endpoints.glob(f"*{UNFINISHED}"):
                file.unlink()  # a write that was cut short
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
        file = self.path / "instance"
        if file.exists():
            name = file.read_bytes().strip().decode("ascii", "replace")
            if NAME_PATTERN.fullmatch(name):
                return name
            set_aside(file, f"{name[:80]!r} is no name")
        name = random_name()
        write_whole(file, name.encode())
        return name

    def load_endpoints(self) -> tuple[list[Endpoint], set[str]]:
        """All endpoints that were saved and not removed, and the ids of those unreadable.

        Raises:
            KernelRefusedError: the disk refused to be read.
        """
        found = [endpoint for _, endpoint in self._load("*.json")]
        return found, {file.name.partition(".")[0] for file in self._endpoints.glob("*.bad*")}

    def load_drafts(self) -> list[Endpoint]:
        """Endpoints that were about to be connected when the agent was killed.

        Raises:
            KernelRefusedError: the disk refused to be read.
        """
        drafts = self._load("*.draft")
        return [endpoint for file, endpoint in drafts if not file.with_suffix(".json").exists()]

    def _load(self, pattern: str) -> list[tuple[Path, Endpoint]]:
        found = []
        try:
            for file in sorted(self._endpoints.glob(pattern)):
                try:
                    endpoint = decode_endpoint(checked(file.read_bytes()))
                    if endpoint.id != file.stem:
                        raise BadValueError(f"it is of endpoint {endpoint.id}")
                    found.append((file, endpoint))
                except (BadValueError, IsADirectoryError) as error:
                    set_aside(file, str(error))
        except OSError as error:
            raise KernelRefusedError(f"{self._endpoints} cannot be read: {error}") from error
        return found

    def endpoint_ids(self) -> set[str]:
        """Ids of all that is recorded: endpoints, drafts and files that cannot be read.

        Raises:
            KernelRefusedError: the disk refused to be read.
        """
        try:
            files = [file for file in self._endpoints.iterdir() if file.suffix != UNFINISHED]
        except OSError as error:
            raise KernelRefusedError(f"{self._endpoints} cannot be read: {error}") from error
        return {file.name.partition(".")[0] for file in files}

    def save_draft(self, endpoint: Endpoint) -> None:
        """Record what is about to be made where the host cannot find it again.

        Raises:
            KernelRefusedError: the disk refused.
        """
        self._write(self._file(endpoint.id).with_suffix(".draft"), endpoint)

    def save_endpoint(self, endpoint: Endpoint) -> None:
        """Record an endpoint; on return it survives a power cut, and its draft is gone.

        Raises:
            KernelRefusedError: the disk refused.
        """
        file = self._file(endpoint.id)
        self._write(file, endpoint)
        with contextlib.suppress(OSError):  # it counts for nothing beside the record
            file.with_suffix(".draft").unlink(missing_ok=True)

    def _write(self, file: Path, endpoint: Endpoint) -> None:
        try:
            write_whole(file, with_checksum(encode_endpoint(endpoint)))
        except OSError as error:
            raise KernelRefusedError(
                f"endpoint {endpoint.name} cannot be recorded in {self._endpoints}: "
                f"{error.strerror}"
            ) from error

    def remove_endpoint(self, endpoint_id: EndpointId) -> None:
        """Forget an endpoint.  Idempotent.

        Raises:
            KernelRefusedError: the disk refused.
        """
        try:
            for suffix in (".draft", ".json"):
                file = self._file(endpoint_id).with_suffix(suffix)
                # Looked for first: a read-only file system refuses to remove what is not there.
                if file.exists():
                    file.unlink(missing_ok=True)
        except OSError as error:
            raise KernelRefusedError(
                f"{self._file(endpoint_id)} stays: {error.strerror}"
            ) from error

    def _file(self, endpoint_id: EndpointId) -> Path:
        return self._endpoints / f"{endpoint_id}.json"


def _refuse_newer(path: Path) -> None:
    """Look at the version of every file, before any of them is used."""
    for pattern in _VERSIONED:
        for file in sorted(path.glob(pattern)):
            version = _version_of(file)
            if version > _VERSION:
                raise PolicyRefusedError(
                    f"{file} was written by a newer meshnet-agent (version {version}, this one "
                    f"knows {_VERSION}): start the newer one again; nothing was changed"
                )


def _version_of(file: Path) -> int:
    """The version of a file; that of one without, or that cannot be read, is this one's."""
    try:
        document = json.loads(checked(file.read_bytes()))
    except (OSError, ValueError, RecursionError, BadValueError):
        return _VERSION
    found = document.get("v") if isinstance(document, dict) else None
    return found if isinstance(found, int) else _VERSION


def hold_run_dir(path: Path) -> int:
    """Make the run directory and take its lock; returns the lock's descriptor.

    Raises:
        ConflictError: another agent holds it.
        KernelRefusedError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        return _hold(path / "lock", f"run directory {path}")
    except OSError as error:
        raise KernelRefusedError(
            f"run directory {path}: {error.strerror}: give --run-dir a directory that can be "
            "written"
        ) from error


def hold_namespace() -> socket.socket:
    """Be the only agent of this network namespace: two would undo each other's work.

    An abstract Unix socket belongs to the network namespace it was bound in (unix(7)).

    Raises:
        ConflictError: another agent is there.
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
    """Rename a file that cannot be used, over none that was set aside before."""
    bad = file.with_suffix(".bad")
    for number in itertools.count(1):
        if not bad.exists():
            break
        bad = file.with_suffix(f".bad.{number}")
    _log.error("file set aside", file=str(file), to=bad.name, reason=reason)
    file.rename(bad)
