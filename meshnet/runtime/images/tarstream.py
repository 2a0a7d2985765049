"""Reading tars that others made, as streams: bounded, and never trusted.

`tarfile` parses; here is what it lets pass: a header that is none ends the archive silently, an
extended header may ask for any amount of memory, and the members that were read are all kept.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Protocol, cast

from meshnet.errors import KernelRefusedError, PolicyRefusedError
from meshnet.runtime.images.oci import BadImageError, Digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader

CHUNK_BYTES = 64 * 1024
_MAX_HEADER_BYTES = 1 << 20
"""Of PAX records and GNU long names, as Go's archive/tar has it."""
_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
}


class Readable(Protocol):
    """What is read from."""

    def read(self, size: int = ..., /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


@dataclass(slots=True)
class Budget:
    """What loading may still take: settings ``image-max-bytes`` and ``image-max-entries``."""

    bytes_left: int
    entries_left: int

    def spend(self, *, size: int = 0, entries: int = 0) -> None:
        """Take some.

        Raises:
            PolicyRefusedError: nothing is left.
        """
        self.bytes_left -= size
        self.entries_left -= entries
        for left, setting in (
            (self.bytes_left, "image-max-bytes"),
            (self.entries_left, "image-max-entries"),
        ):
            if left < 0:
                raise PolicyRefusedError(
                    f"the image exceeds the agent's setting {setting}: raise it if you trust the "
                    "image"
                )


class HashingReader:
    """Reads a stream, counts it against a budget, and knows the digest of what was read."""

    def __init__(self, stream: Readable, budget: Budget) -> None:
        self._stream = stream
        self._budget = budget
        self._hash = hashlib.sha256()

    def read(self, size: int = CHUNK_BYTES, /) -> bytes:
        """At most `size` bytes.

        Raises:
            PolicyRefusedError: more than the budget has.
        """
        chunk = self._stream.read(size)
        self._budget.spend(size=len(chunk))
        self._hash.update(chunk)
        return chunk

    def drain(self) -> Digest:
        """Read to the end; returns the digest of all."""
        while self.read():
            pass
        return Digest(f"sha256:{self._hash.hexdigest()}")


class _Member(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not any(buf):
                raise  # a block of zeros, or none at all: the end
            raise BadImageError(f"the tar archive is damaged ({error}): get it anew") from error
        if member.size < 0 or (member.type in _HEADER_TYPES and member.size > _MAX_HEADER_BYTES):
            raise BadImageError(f"the tar archive has a header of {member.size} bytes: get it anew")
        return member


class TarStream:
    """The members of a tar, one after the other.

    Raises:
        BadImageError: by every method, when it is not a tar, or is damaged.
    """

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        with _damage():
            # The stream is the caller's to close.
            self._archive = tarfile.open(  # noqa: SIM115
                fileobj=cast("IO[bytes]", stream),
                mode="r|",
                bufsize=CHUNK_BYTES,
                tarinfo=_Member,
            )

    def members(self) -> Iterator[tarfile.TarInfo]:
        """All members; the data of each must be read before the next."""
        while True:
            with _damage():
                member = self._archive.next()
            if member is None:
                return
            if member.size < 0:
                raise BadImageError(f"{member.name!r} has size {member.size}: get the archive anew")
            yield member
            # It would keep them all.
            self._archive.members.clear()  # type: ignore[attr-defined]

    def data(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        """The content of a regular file, holes as zeros, in chunks."""
        with _damage():
            source = self._archive.extractfile(member)
        left = member.size
        while source is not None and left:
            with _damage():
                chunk = source.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise BadImageError(f"{member.name!r} is cut off: get the archive anew")
            left -= len(chunk)
            yield chunk

    def drain(self, budget: Budget) -> None:
        """Read on to the end of the stream, whatever comes after the archive.

        Raises:
            PolicyRefusedError: it is more than the budget has.
        """
        with _damage():
            while chunk := self._stream.read(CHUNK_BYTES):
                budget.spend(size=len(chunk))


@contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except (
        tarfile.TarError, EOFError, ValueError, OverflowError, gzip.BadGzipFile, zlib.error
    ) as error:  # fmt: skip
        raise BadImageError(
            f"it is not a tar archive, or is damaged ({error}): fetch it again"
        ) from (error)


def compression(start: bytes) -> str:
    """How a stream is compressed, by its first bytes; empty: not at all."""
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")


@contextmanager
def decompressed(stream: BufferedReader) -> Iterator[Readable]:
    """A stream with its compression, which its first bytes tell, taken off.

    Zstandard is left to the program ``zstd``, which needs a real file.

    Raises:
        BadImageError: it is compressed in another way.
        KernelRefusedError: ``zstd`` is not installed.
    """
    match compression(stream.peek(8)):
        case "":
            yield stream
        case "gzip":
            yield gzip.GzipFile(fileobj=stream)
        case "zstd":
            with _zstd(stream) as unpacked:
                yield unpacked
        case other:
            raise BadImageError(f"it is compressed by {other}: only gzip and zstd are read")


@contextmanager
def _zstd(stream: BufferedReader) -> Iterator[Readable]:
    if shutil.which("zstd") is None:
        raise KernelRefusedError("a layer is compressed by zstd: install the package zstd")
    if not stream.seekable():
        raise BadImageError("the archive is compressed by zstd: decompress it first (zstd -d)")
    os.lseek(stream.fileno(), 0, os.SEEK_SET)  # not stream.seek, which only moves in its buffer
    with subprocess.Popen(
        ["zstd", "-dcq"], stdin=stream, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        try:
            yield child.stdout
        finally:
            child.kill()
