"""The images of this host: read in threads, loaded in a separate process (docs/images.md)."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import KernelRefusedError, MeshnetError, error_classes
from meshnet.runtime.images.store import ImageStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from meshnet.runtime.images.store import Image, Removed

_log = structlog.get_logger()
_AT_ONCE = 2
"""Loads that run at the same time; others wait."""


class Images:
    """The image store of this host.

    Args:
        path: the store's directory.
        max_bytes, max_entries: what one load may take (`meshnet.runtime.images.tarstream.Budget`).
    """

    def __init__(self, path: Path, *, max_bytes: int, max_entries: int) -> None:
        self._path = path
        self._store = ImageStore(path)
        self._limits = (f"--max-bytes={max_bytes}", f"--max-entries={max_entries}")
        self._loads = trio.CapacityLimiter(_AT_ONCE)

    async def all(self) -> list[Image]:
        """All images (`ImageStore.images`)."""
        return await trio.to_thread.run_sync(self._store.images)

    async def find(self, text: str) -> Image:
        """One image (`ImageStore.find`)."""
        return await trio.to_thread.run_sync(self._store.find, text)

    async def remove(self, text: str) -> Removed:
        """Remove a name or an image (`ImageStore.remove`)."""
        return await trio.to_thread.run_sync(self._store.remove, text)

    async def collect(self) -> None:
        """Remove what killed processes left (`ImageStore.collect`); only logs an error."""
        if await trio.Path(self._path).exists():
            try:
                await trio.to_thread.run_sync(self._store.collect)
            except MeshnetError as error:
                _log.error("image store cannot be cleaned up", reason=str(error))

    async def load(self, archive: AsyncIterator[bytes], name: str | None) -> list[Image]:
        """Take in an archive (`ImageStore.load`).

        It reads all of `archive` even if the load fails early, because the sender listens for the
        answer only then.  Cancelling ends the process.

        Args:
            archive: a `MeshnetError` that it raises ends the load.
        """
        # A process of its own, so that the agent goes on answering.  -P: nothing in the working
        # directory may be imported in the place of one of our modules.
        command = [
            sys.executable,
            "-P",
            "-m",
            "meshnet.runtime.images.load",
            f"--store={self._path}",
        ]
        command += [*self._limits, *([f"--name={name}"] if name is not None else [])]
        output = bytearray()
        cut_off: MeshnetError | None = None
        async with self._loads, trio.open_nursery() as nursery:
            run = functools.partial(
                trio.run_process,
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                check=False,
            )
            process: trio.Process = await nursery.start(run)
            nursery.start_soon(_gather, process, output)
            try:
                await _feed(process, archive)
            except MeshnetError as error:
                cut_off = error  # raised here, it would come out of the nursery in a group
                process.terminate()
        if cut_off is not None:
            raise cut_off
        try:
            answer = json.loads(output)
        except ValueError as error:
            raise KernelRefusedError(
                f"loading the image ended with status {process.returncode}: see the agent's log"
            ) from error
        if "error" in answer:
            kind = error_classes().get(answer["error"]["kind"], MeshnetError)
            raise kind(answer["error"]["message"])
        return await trio.to_thread.run_sync(
            lambda: [self._store.find(image_id) for image_id in answer["ids"]]
        )

    async def export(self, image: str, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Write an image as a tar of an OCI image layout (`ImageStore.export`)."""
        reader, writer = os.pipe()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, self._export, image, writer)
            # Closed before the nursery waits: the thread must not hang on a pipe that nobody reads.
            async with trio.lowlevel.FdStream(reader) as stream:
                async for chunk in stream:
                    await write(bytes(chunk))

    def _export(self, image: str, writer: int) -> None:
        with contextlib.suppress(BrokenPipeError), open(writer, "wb") as file:
            self._store.export(image, file)


async def _gather(process: trio.Process, output: bytearray) -> None:
    assert process.stdout is not None
    async for chunk in process.stdout:
        output += chunk


async def _feed(process: trio.Process, archive: AsyncIterator[bytes]) -> None:
    assert process.stdin is not None
    async with process.stdin:
        async for chunk in archive:
            with contextlib.suppress(trio.BrokenResourceError):  # the loader has seen enough
                await process.stdin.send_all(chunk)
