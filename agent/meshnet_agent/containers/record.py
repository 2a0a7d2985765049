"""What is known of a container, as a value and as a file that survives the agent."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import structlog

from meshnet.codec.checksum import checked, with_checksum
from meshnet.codec.document import BadValueError
from meshnet.files import write_whole
from meshnet.runtime.spec.id_ranges import IdRange  # noqa: TC001  (msgspec reads it)
from meshnet.runtime.spec.mount_points import MountPoint  # noqa: TC001  (msgspec reads it)
from meshnet.runtime.spec.options import ContainerOptions, parse_label, shared_with

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_log = structlog.get_logger()
FILE = "container.json"


class State(StrEnum):
    """Where a container is in its life; the words are Docker's, but for the first."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process for ever: pids are reused, with the start time and the boot they are not."""

    pid: int
    start_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One container.

    Attributes:
        image_id: digest of the image that it holds.
        args, env, user, workdir, stop_signal: of the options, or else of the image.
        lowerdirs: what its root file system is stacked on, the uppermost first.
        ids: those of the host that its own ones are; None: the same.
        mount_points: volumes of the store that it has.
        process: its first process, while there is one.
        shim: the conmon that keeps it.
        created_s, started_s, finished_s: Unix time.
        stopped: somebody wanted its end: it is not restarted.
        endpoints: documents of the endpoints that were made with it.
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
    endpoints: tuple[dict[str, Any], ...] = ()
    v: Literal[1] = 1

    @property
    def hostname(self) -> str:
        """Its own, or the beginning of its id."""
        return self.options.hostname or self.id

    @property
    def shares_network(self) -> bool:
        """Whether its network namespace is the host's or another container's."""
        words = self.options.networks
        return "host" in words or any(shared_with(w) is not None for w in words)

    def document(self, endpoints: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The document of ``ps`` and ``inspect`` (docs/cli.md).

        Args:
            endpoints: documents of those that it has now, with or without our doing.
        """
        networks: Sequence[str] = self.options.networks
        if self.process is not None and not self.shares_network:
            networks = [e["network"] for e in endpoints] or [n for n in networks if n == "none"]
        return {
            "id": self.id,
            "name": self.name,
            "pid": self.process.pid if self.process is not None else None,
            "state": self.state,
            "exit_code": self.exit_code,
            "image": self.options.image or self.options.rootfs,
            "networks": list(networks),
            "command": list(self.args),
            "labels": dict(map(parse_label, self.options.labels)),
            "endpoints": list(endpoints),
            "restarts": self.restarts,
            "error": self.error,
            "created_s": self.created_s,
            "started_s": self.started_s,
            "finished_s": self.finished_s,
        }


_decoder = msgspec.json.Decoder(Record)


def save(directory: Path, record: Record, *, keep: bool = True) -> None:
    """Write a container's record; on return it survives the agent, with `keep` also a power cut."""
    write_whole(directory / FILE, with_checksum(msgspec.json.encode(record)), keep=keep)


def load_all(directory: Path) -> Iterator[Record]:
    """All containers below a directory; a file that cannot be read is logged and left alone."""
    for file in sorted(directory.glob(f"*/{FILE}")):
        try:
            yield _decoder.decode(checked(file.read_bytes()))
        except (OSError, BadValueError, msgspec.DecodeError) as error:
            _log.error("container cannot be read", file=str(file), reason=str(error))
