"""Reads a container's log (conmon's format ``k8s-file``) from where a client wants it.

Lines are ``TIME STREAM F|P TEXT``; P marks a part of a longer line.  When the file would grow too
large, conmon begins another one, which takes its name.
"""

from __future__ import annotations

import mmap
import os
from datetime import datetime
from typing import IO, TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from meshnet_agent.containers.directory import Container

_CHUNK_BYTES = 64 * 1024
_POLL_S = 0.1
"""What was begun and replaced between two looks is missed (docs/run.md)."""


async def read_log(
    container: Container, *, follow: bool, tail: int | None, since_s: float | None
) -> AsyncGenerator[bytes]:
    """The log's bytes, from the present file.

    The reader closes the generator (`contextlib.aclosing`), even if cancelled: it holds a file.

    Args:
        follow: go on until the container has ended, across new files.
        tail: only so many of the last lines.
        since_s: only what is not older; Unix time.
    """
    path = container.bundle.log
    try:
        file = await trio.open_file(path, "rb")
    except FileNotFoundError:
        return
    try:
        await trio.to_thread.run_sync(_seek, file.wrapped, tail, since_s)
        while True:
            # Both before the read, which then gets all that came before: bytes written between a
            # read and a look would be lost.
            over = container.ended.is_set()
            renewed = await trio.to_thread.run_sync(_is_renewed, file.wrapped, path)
            while chunk := await file.read(_CHUNK_BYTES):
                yield chunk
            if renewed:
                # conmon adds nothing more to a file that has lost its name.
                await file.aclose()
                file = await trio.open_file(path, "rb")
                continue
            if over or not follow:
                return
            with trio.move_on_after(_POLL_S):
                await container.ended.wait()
    finally:
        await trio.aclose_forcefully(file)


def _is_renewed(file: IO[bytes], path: os.PathLike[str]) -> bool:
    try:
        return not os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False  # the container was removed


def _seek(file: IO[bytes], tail: int | None, since_s: float | None) -> None:
    """Go to the first byte that the client wants."""
    size = os.fstat(file.fileno()).st_size
    places = [0]
    if tail is not None:
        places.append(_last_lines(file, size, tail))
    if since_s is not None:
        places.append(_first_since(file, size, since_s))
    file.seek(max(places))


def _first_since(file: IO[bytes], size: int, since_s: float) -> int:
    place = 0
    file.seek(0)
    while place < size:
        line = file.readline()
        if not line.endswith(b"\n"):
            break  # conmon is still writing this line
        if _time_of(line) >= since_s:
            return place
        place += len(line)
    return place


def _time_of(line: bytes) -> float:
    try:
        return datetime.fromisoformat(line.split(b" ", 1)[0].decode()).timestamp()
    except ValueError:
        return 0.0


def _last_lines(file: IO[bytes], size: int, count: int) -> int:
    """Where the last `count` lines begin; parts (P) belong to the whole line (F) after them."""
    if size == 0:
        return 0  # mmap refuses an empty file
    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as view:
        end = view.rfind(b"\n") + 1
        while end > 0:
            begin = view.rfind(b"\n", 0, end - 1) + 1
            if _is_whole(view[begin:end]):
                if count == 0:
                    return end
                count -= 1
            end = begin
    return 0


def _is_whole(line: bytes) -> bool:
    fields = line.split(b" ", 3)
    return len(fields) == 4 and fields[2] == b"F"
