"""The journal: what a link had before a bridge took it, on disk before anything is changed.

One file for each bridge, ``BRIDGE.json`` in the directory ``takeover`` of the agent's state
directory, replaced whole, with a checksum.  Beside it are ``BRIDGE.lock``, locked by the process
that is at work, and ``BRIDGE.log`` with its last words.  Whoever finds a journal knows what to do:

============  =====================================================================
``moving``    something may have been changed: give back what is written
``moved``     as ``moving``: nobody has confirmed it
``confirmed`` the bridge has it all, and what it has counts
``returning`` it is being given back: give back what is written
============  =====================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from meshnet.codec.checksum import checked, with_checksum
from meshnet.codec.document import BadValueError
from meshnet.errors import KernelRefusedError
from meshnet.kernel.takeover.contents import Contents, Kind, LinkObject
from meshnet.system.files import sync, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_VERSION = 1


class Stage(StrEnum):
    """How far a takeover has come."""

    MOVING = "moving"
    MOVED = "moved"
    CONFIRMED = "confirmed"
    RETURNING = "returning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """One takeover.

    Attributes:
        contents: what the parent had, or, returning, what the bridge had.
        generation: how the kernel made IPv6 addresses on the parent (IN6_ADDR_GEN_MODE_…).
        boot: id of the machine's boot; links do not survive the next one.
    """

    bridge: str
    parent: str
    stage: Stage
    contents: Contents
    generation: int
    boot: str

    def at(self, stage: Stage, contents: Contents | None = None) -> Journal:
        """The same takeover at another stage, and optionally with other contents to give back."""
        return replace(self, stage=stage, contents=contents or self.contents)


class JournalDir:
    """The directory of all journals of a host; made if it is missing."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "takeover"

    def bridges(self) -> list[str]:
        """Bridges that have a journal."""
        return sorted(file.stem for file in self.path.glob("*.json"))

    def load(self, bridge: str) -> Journal | None:
        """The journal of a bridge, if there is one.

        Raises:
            KernelRefusedError: it cannot be read.
        """
        file = self._file(bridge)
        try:
            return _decode(json.loads(checked(file.read_bytes())))
        except FileNotFoundError:
            return None
        except (OSError, BadValueError, ValueError, KeyError, TypeError) as error:
            raise KernelRefusedError(
                f"journal {file} cannot be read ({error}): make sure that the host's addresses are "
                "where they belong, and remove the journal"
            ) from error

    def save(self, journal: Journal) -> None:
        """Write a journal; on return it survives a power cut.

        Raises:
            KernelRefusedError: the disk refused.
        """
        file = self._file(journal.bridge)
        try:
            write_whole(file, with_checksum(json.dumps(_encode(journal)).encode()))
        except OSError as error:
            raise KernelRefusedError(f"journal {file} cannot be written: {error}") from error

    def remove(self, bridge: str) -> None:
        """Forget a takeover that is undone."""
        self._file(bridge).unlink(missing_ok=True)
        sync(self.path)

    @contextlib.contextmanager
    def locked(self, bridge: str) -> Iterator[None]:
        """Be the only process at work on a bridge; waits for another one to end.

        Raises:
            KernelRefusedError: the directory cannot be made or written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self._file(bridge).with_suffix(".lock")
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise KernelRefusedError(f"directory {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def log_of(self, bridge: str) -> Path:
        """File for what the process says."""
        return self._file(bridge).with_suffix(".log")

    def _file(self, bridge: str) -> Path:
        return self.path / f"{bridge}.json"


def _encode(journal: Journal) -> dict[str, Any]:
    return {
        "v": _VERSION,
        "bridge": journal.bridge,
        "parent": journal.parent,
        "stage": journal.stage,
        "generation": journal.generation,
        "boot": journal.boot,
        "contents": {
            name: [
                {
                    "what": str(r),
                    "kind": int(r.kind),
                    "header": r.header.hex(),
                    "attrs": [[kind, payload.hex()] for kind, payload in r.attrs],
                }
                for r in records
            ]
            for name, records in journal.contents._asdict().items()
        },
    }


def _decode(document: Any) -> Journal:  # noqa: ANN401
    if document["v"] != _VERSION:
        raise ValueError(f"version {document['v']}")
    contents = {
        name: tuple(
            LinkObject(
                Kind(r["kind"]),
                bytes.fromhex(r["header"]),
                tuple((int(kind), bytes.fromhex(payload)) for kind, payload in r["attrs"]),
            )
            for r in records
        )
        for name, records in document["contents"].items()
    }
    return Journal(
        bridge=document["bridge"],
        parent=document["parent"],
        stage=Stage(document["stage"]),
        contents=Contents(**contents),
        generation=document["generation"],
        boot=document["boot"],
    )
