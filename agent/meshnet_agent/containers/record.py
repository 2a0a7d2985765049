"""What the agent knows of a container, as a value and as a file that survives the agent.

The file, ``container.json``, has a version of its own (`VERSION`).  Version 1 kept the API's
documents of the endpoints; `decode` still reads it, and the next write of the record replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import structlog

from meshnet.codec.checksum import checked, with_checksum
from meshnet.codec.document import BadValueError
from meshnet.runtime.spec.id_ranges import IdRange  # noqa: TC001  (msgspec reads it)
from meshnet.runtime.spec.mount_points import MountPoint  # noqa: TC001  (msgspec reads it)
from meshnet.runtime.spec.options import ContainerOptions, shared_with
from meshnet.system.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_log = structlog.get_logger()
FILE = "container.json"
VERSION: Literal[2] = 2


class State(StrEnum):
    """Where a container is in its life; all words but the first are Docker's."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class ProcessId:
    """Identifies one process for ever: pids are reused, but not at one start time of one boot."""

    pid: int
    start_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerEndpoint:
    """What a container remembers of an endpoint made with it: enough to detach it again.

    Attributes:
        pid: the process that was attached.
        addresses: without prefix lengths, IPv4 first; text, as ``/etc/hosts`` has them.
    """

    id: str
    network: str
    pid: int
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerRecord:
    """One container.

    Attributes:
        image_id: digest of the image that it holds.
        args, env, user, workdir, stop_signal: from the options, otherwise from the image.
        lowerdirs: the layers below its root file system, the uppermost first.
        ids: the host's ids that its own map to; None: they are the same.
        mount_points: volumes of the store that it has.
        process: its first process, while it has one.
        shim: its conmon.
        created_s, started_s, finished_s: Unix time.
        stopped: somebody asked for its end, so it is not restarted.
        endpoints: those that were made with it.
        v: version of the file (`meshnet_agent.state_dir`).
    """

    id: str
    name: str
    options: ContainerOptions
    created_s: float
    args: tuple[str, ...]
    lowerdirs: tuple[str, ...]
    image_id: str | None = None
    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = "/"
    stop_signal: str = "SIGTERM"
    ids: IdRange | None = None
    mount_points: tuple[MountPoint, ...] = ()
    state: State = State.CREATING
    process: ProcessId | None = None
    shim: ProcessId | None = None
    started_s: float | None = None
    finished_s: float | None = None
    exit_code: int | None = None
    error: str | None = None
    restarts: int = 0
    stopped: bool = False
    endpoints: tuple[ContainerEndpoint, ...] = ()
    v: Literal[2] = VERSION

    @property
    def hostname(self) -> str:
        """The one of its options, otherwise its id."""
        return self.options.hostname or self.id

    @property
    def shares_network(self) -> bool:
        """Whether its network namespace is the host's or another container's."""
        words = self.options.networks
        return "host" in words or any(shared_with(w) is not None for w in words)


class _EndpointV1(msgspec.Struct):
    """What we need of an endpoint's document in a file of version 1."""

    id: str
    network: str
    pid: int
    address: str
    address6: str | None = None


def encode(record: ContainerRecord) -> bytes:
    """A record as the content of its file."""
    return with_checksum(msgspec.json.encode(record))


def decode(raw: bytes) -> ContainerRecord:
    """The record in a file, of this version or of version 1.

    Raises:
        BadValueError: its checksum does not match.
        msgspec.DecodeError: it is malformed, or of a newer version.
    """
    # As a plain document first: version 1 had no `v`, and its endpoints do not fit the record.
    document = msgspec.json.decode(checked(raw), type=dict[str, Any])
    if document.get("v", 1) == 1:
        document = _migrate_v1(document)
    return msgspec.convert(document, ContainerRecord)


def _migrate_v1(document: dict[str, Any]) -> dict[str, Any]:
    endpoints = msgspec.convert(document.get("endpoints", ()), tuple[_EndpointV1, ...])
    return document | {
        "v": VERSION,
        "endpoints": [
            {
                "id": e.id,
                "network": e.network,
                "pid": e.pid,
                "addresses": [a.partition("/")[0] for a in (e.address, e.address6) if a],
            }
            for e in endpoints
        ],
    }


def save(directory: Path, record: ContainerRecord, *, keep: bool = True) -> None:
    """Write a container's record; it then survives the agent and, with `keep`, a power cut."""
    write_whole(directory / FILE, encode(record), keep=keep)


def load_all(directory: Path) -> Iterator[ContainerRecord]:
    """All containers below a directory; logs a file that cannot be read, and leaves it alone."""
    for file in sorted(directory.glob(f"*/{FILE}")):
        try:
            yield decode(file.read_bytes())
        except (OSError, BadValueError, msgspec.DecodeError) as error:
            _log.error("container cannot be read", file=str(file), reason=str(error))
