"""Endpoints on disk: one file each, replaced whole, with a checksum (`meshnet_agent.state_dir`).

A file that cannot be used is set aside and reported, never deleted.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from meshnet.codec.checksum import checked, with_checksum
from meshnet.codec.document import BadValueError
from meshnet.codec.endpoints import decode_endpoint, encode_endpoint
from meshnet.errors import KernelRefusedError
from meshnet.kernel.netns import own_netns
from meshnet.system.files import UNFINISHED, write_whole
from meshnet_agent.state_dir import DRAFT, RECORD, set_aside

if TYPE_CHECKING:
    from pathlib import Path

    from meshnet.model import Endpoint, EndpointId


class EndpointRecords:
    """The files of this host's endpoints.

    Args:
        directory: holds nothing else; made if it does not exist.

    Raises:
        KernelRefusedError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for file in directory.glob(f"*{UNFINISHED}"):
                file.unlink()  # a write that was cut short
        except OSError as error:
            raise KernelRefusedError(
                f"{directory}: {error.strerror}: give --state-dir a directory that can be written"
            ) from error

    def load(self) -> tuple[list[Endpoint], set[str]]:
        """All endpoints that were saved and not removed, and the ids of those that cannot be read.

        Raises:
            KernelRefusedError: the disk refused to be read.
        """
        found = [endpoint for _, endpoint in self._load(f"*{RECORD}")]
        # Also files that an earlier start set aside: their endpoints may still be alive.
        return found, {file.name.partition(".")[0] for file in self._directory.glob("*.bad*")}

    def load_drafts(self) -> list[Endpoint]:
        """Endpoints that were about to be connected when the agent was killed.

        Raises:
            KernelRefusedError: the disk refused to be read.
        """
        # A draft with a record beside it is of an attach that succeeded (see `save`).
        drafts = self._load(f"*{DRAFT}")
        return [endpoint for file, endpoint in drafts if not file.with_suffix(RECORD).exists()]

    def _load(self, pattern: str) -> list[tuple[Path, Endpoint]]:
        found = []
        try:
            for file in sorted(self._directory.glob(pattern)):
                try:
                    endpoint = decode_endpoint(checked(file.read_bytes()))
                    if endpoint.id != file.stem:
                        raise BadValueError(f"it belongs to endpoint {endpoint.id}")
                    found.append((file, _with_device(endpoint)))
                except (BadValueError, IsADirectoryError) as error:
                    set_aside(file, str(error))
        except OSError as error:
            raise KernelRefusedError(f"{self._directory} cannot be read: {error}") from error
        return found

    def ids(self) -> set[str]:
        """Ids of all that is recorded: endpoints, drafts and files that cannot be read.

        Raises:
            KernelRefusedError: the disk refused to be read.
        """
        try:
            files = [file for file in self._directory.iterdir() if file.suffix != UNFINISHED]
        except OSError as error:
            raise KernelRefusedError(f"{self._directory} cannot be read: {error}") from error
        return {file.name.partition(".")[0] for file in files}

    def save_draft(self, endpoint: Endpoint) -> None:
        """Record an endpoint whose link is about to be made where the host does not see it.

        Raises:
            KernelRefusedError: the disk refused.
        """
        self._write(self._file(endpoint.id).with_suffix(DRAFT), endpoint)

    def save(self, endpoint: Endpoint) -> None:
        """Record an endpoint; on return it survives a power cut, and its draft is gone.

        Raises:
            KernelRefusedError: the disk refused.
        """
        file = self._file(endpoint.id)
        self._write(file, endpoint)
        with contextlib.suppress(OSError):  # a draft beside a record is ignored
            file.with_suffix(DRAFT).unlink(missing_ok=True)

    def _write(self, file: Path, endpoint: Endpoint) -> None:
        try:
            write_whole(file, with_checksum(encode_endpoint(endpoint)))
        except OSError as error:
            raise KernelRefusedError(
                f"endpoint {endpoint.name} cannot be recorded in {self._directory}: "
                f"{error.strerror}"
            ) from error

    def remove(self, endpoint_id: EndpointId) -> None:
        """Forget an endpoint.  Idempotent.

        Raises:
            KernelRefusedError: the disk refused.
        """
        try:
            for suffix in (DRAFT, RECORD):
                file = self._file(endpoint_id).with_suffix(suffix)
                # Look first: a read-only file system refuses to remove even what does not exist.
                if file.exists():
                    file.unlink(missing_ok=True)
        except OSError as error:
            raise KernelRefusedError(
                f"{self._file(endpoint_id)} stays: {error.strerror}"
            ) from error

    def _file(self, endpoint_id: EndpointId) -> Path:
        return self._directory / f"{endpoint_id}{RECORD}"


def _with_device(endpoint: Endpoint) -> Endpoint:
    """Add the device, which records of earlier versions lack: a host has only one nsfs."""
    netns = endpoint.sandbox.netns
    if netns.device:
        return endpoint
    known = netns._replace(device=own_netns().device)
    return replace(endpoint, sandbox=replace(endpoint.sandbox, netns=known))
