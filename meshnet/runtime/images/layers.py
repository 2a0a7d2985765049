"""Unpacks a layer into a directory that overlayfs can stack.

A layer is a tar of what changed (image-spec v1.1, layer.md).  Its markers become overlayfs's own
(Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories"):

=========================  =====================================================================
``dir/.wh.NAME``           character device 0/0 ``dir/NAME``: hides NAME of the layers below
``dir/.wh..wh..opq``       ``trusted.overlay.opaque=y`` on ``dir``: hides all that is below in it
=========================  =====================================================================

Nothing outside of the directory is ever touched, whatever the tar says: every name is walked
component by component from a descriptor of the directory, and no component may be a symbolic link,
so there is nothing to follow.  A name that is absolute, has ``..`` or leads through a symbolic link
is refused, not bent into shape: no builder writes one.  Extended attributes that overlayfs would
take for its own are refused too; of the others those are kept that mean the same on every host:
``user.*`` and ``security.capability``.

Needs root: owners, device nodes and ``trusted.*``.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import math
import os
import shutil
import stat
import zlib
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError
from meshnet.runtime.images.oci import BadImageError, Digest
from meshnet.runtime.images.tarstream import (
    CHUNK_BYTES,
    Budget,
    HashingReader,
    TarStream,
    decompressed,
)

if TYPE_CHECKING:
    import tarfile
    from collections.abc import Iterator
    from io import BufferedReader
    from pathlib import Path

OPAQUE = "trusted.overlay.opaque"
_WHITEOUT = ".wh."
_OPAQUE_NAME = ".wh..wh..opq"
_AUFS = ".wh..wh."
"""Prefix of files by which aufs kept its own books; they mean nothing in a layer."""
_OVERLAYS_OWN = ("trusted.overlay.", "user.overlay.")
_XATTR_KEY = "SCHILY.xattr."
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_DEPTH = 256
_MAX_ID = (1 << 32) - 2
"""Greatest user and group id: the next one is "leave it as it is" to chown(2)."""
_MALFORMED = {
    errno.E2BIG, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.EMLINK,
    errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ERANGE, errno.EXDEV,
}  # fmt: skip
"""What the kernel says of names and values that are wrong by themselves."""
_ZEROS = bytes(CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What a layer came to.

    Attributes:
        size_bytes: content of its regular files, holes included.
    """

    diff_id: Digest
    size_bytes: int
    entries: int


def unpack(blob: BufferedReader, directory: Path, budget: Budget) -> Unpacked:
    """Unpack a layer into an empty directory.  The caller removes it after an error.

    Args:
        blob: the layer's tar, or one compressed by gzip or zstd.
        budget: what it may take; counts down.

    Raises:
        BadImageError: it is malformed, or a name in it leads out of the directory.
        PolicyRefusedError: it exceeds the budget.
        KernelRefusedError: the file system refused.
    """
    tree = _Tree(directory)
    try:
        with decompressed(blob) as tar:
            # Twice the budget: for the tar itself and, files may be sparse, for what it unpacks to.
            reader = HashingReader(tar, Budget(budget.bytes_left, budget.entries_left))
            layer = _Layer(tree, budget)
            layer.unpack(TarStream(reader))
            return Unpacked(reader.drain(), layer.size_bytes, layer.entries)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadImageError(f"its compression is damaged ({error}): get the image anew") from error
    finally:
        tree.close()


class _Tree:
    """A directory that is written to by names, and never left.

    Nobody else writes to it meanwhile: it is below the store, which only root enters.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, _DIRECTORY)
        self._last: tuple[tuple[str, ...], int] | None = None

    def close(self) -> None:
        """Give the descriptors back."""
        self.forget()
        os.close(self._root)

    def forget(self) -> None:
        """Walk anew next time: a directory on the way may have gone."""
        if self._last is not None:
            os.close(self._last[1])
            self._last = None

    def directory(self, parts: tuple[str, ...], *, create: bool) -> int:
        """A descriptor of a directory, valid until the next call.

        Raises:
            BadImageError: something on the path is not a directory.
            FileNotFoundError: or is missing, and not to be created.
        """
        if not parts:
            return self._root
        if self._last is None or self._last[0] != parts:
            self.forget()
            self._last = (parts, self._walk(parts, create))
        return self._last[1]

    def _walk(self, parts: tuple[str, ...], create: bool) -> int:
        here = os.dup(self._root)
        try:
            for part in parts:
                if create and _kind(here, part) in (None, _Kind.WHITEOUT):
                    _make_directory(here, part)
                try:
                    below = os.open(part, _DIRECTORY, dir_fd=here)
                except NotADirectoryError:
                    raise BadImageError(
                        f"its name leads through {part!r}, which is not a directory of the layer"
                    ) from None
                os.close(here)
                here = below
        except BaseException:
            os.close(here)
            raise
        return here


class _Kind(Enum):
    """What is already at a name."""

    DIRECTORY = "directory"
    WHITEOUT = "whiteout"
    OTHER = "other"


def _kind(parent: int, name: str) -> _Kind | None:
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        return _Kind.DIRECTORY
    is_whiteout = stat.S_ISCHR(found.st_mode) and found.st_rdev == 0
    return _Kind.WHITEOUT if is_whiteout else _Kind.OTHER


def _make_directory(parent: int, name: str) -> None:
    """Make a directory; in the place of a whiteout it goes on hiding what is below."""
    hides = _kind(parent, name) is _Kind.WHITEOUT
    if hides:
        os.unlink(name, dir_fd=parent)
    os.mkdir(name, dir_fd=parent)
    os.chmod(name, 0o755, dir_fd=parent)  # whatever the umask
    if hides:
        _set_xattr(parent, name, OPAQUE, b"y")


def _set_xattr(parent: int, name: str, key: str, value: bytes) -> None:
    # There is no setxattrat(2) in Python; the descriptor's own link is followed, `name` is not.
    os.setxattr(f"/proc/self/fd/{parent}/{name}", key, value, follow_symlinks=False)


class _Layer:
    """Turns the members of a layer's tar into files."""

    def __init__(self, tree: _Tree, budget: Budget) -> None:
        self.size_bytes = 0
        self.entries = 0
        self._tree = tree
        self._budget = budget
        self._directory_times: dict[tuple[str, ...], int] = {}

    def unpack(self, tar: TarStream) -> None:
        """Unpack all members."""
        for member in tar.members():
            self._budget.spend(entries=1)
            self.entries += 1
            with _named(member.name):
                self._add(member, tar)
        # Last: whatever is made in a directory changes its time.
        for parts, time_ns in self._directory_times.items():
            with _named("/".join(parts)):
                self._set_directory_time(parts, time_ns)

    def _add(self, member: tarfile.TarInfo, tar: TarStream) -> None:
        parts = _split(member.name)
        if not parts:
            if not member.isdir():
                raise BadImageError("it is the layer's root, and no directory")
            self._finish(member, parts, self._tree.directory((), create=False), ".")
            return
        *above, name = parts
        parent = self._tree.directory(tuple(above), create=True)
        if name.startswith(_WHITEOUT):
            self._mark(parent, name)
            return
        kind = _kind(parent, name)
        if member.isdir():
            if kind is _Kind.OTHER:
                os.unlink(name, dir_fd=parent)
            if kind is not _Kind.DIRECTORY:
                _make_directory(parent, name)
        else:
            # A hard link to the very file that it replaces has nothing to link to any more.
            if kind is _Kind.DIRECTORY:
                self._tree.forget()
                parent = self._tree.directory(tuple(above), create=False)
                shutil.rmtree(name, dir_fd=parent)
            elif kind is not None:
                os.unlink(name, dir_fd=parent)
            if member.islnk():
                self._link(member, parent, name)
                return
            self._make(member, tar, parent, name)
        self._finish(member, parts, parent, name)

    def _mark(self, parent: int, name: str) -> None:
        """A marker says what to hide of the layers below; what this layer brings stays."""
        if name == _OPAQUE_NAME:
            _set_xattr(parent, ".", OPAQUE, b"y")
            return
        if name.startswith(_AUFS):
            return
        (hidden,) = _split(name.removeprefix(_WHITEOUT)) or ("",)
        if not hidden:
            raise BadImageError("it hides a name that is none")
        match _kind(parent, hidden):
            case None:
                os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)
            case _Kind.DIRECTORY:
                _set_xattr(parent, hidden, OPAQUE, b"y")

    def _link(self, member: tarfile.TarInfo, parent: int, name: str) -> None:
        target = _split(member.linkname)
        if not target:
            raise BadImageError("it is a hard link to the layer's root")
        # `parent` does not survive the walk to the target's directory.
        here = os.dup(parent)
        try:
            there = self._tree.directory(target[:-1], create=False)
            os.link(target[-1], name, src_dir_fd=there, dst_dir_fd=here, follow_symlinks=False)
        except (FileNotFoundError, PermissionError) as error:
            raise BadImageError(
                f"it is a hard link to {member.linkname!r}, which is not a file of the layer"
            ) from error
        finally:
            os.close(here)

    def _make(self, member: tarfile.TarInfo, tar: TarStream, parent: int, name: str) -> None:
        if member.isreg():
            self._write(member, tar, parent, name)
        elif member.issym():
            os.symlink(member.linkname, name, dir_fd=parent)
        elif member.isfifo():
            os.mkfifo(name, dir_fd=parent)
        elif member.ischr() or member.isblk():
            device = os.makedev(member.devmajor, member.devminor)
            if member.ischr() and device == 0:
                raise BadImageError("it is a device 0/0, which overlayfs takes for a whiteout")
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            os.mknod(name, kind, device, dir_fd=parent)
        else:
            raise BadImageError(f"it is of unknown type {member.type!r}")

    def _write(self, member: tarfile.TarInfo, tar: TarStream, parent: int, name: str) -> None:
        self._budget.spend(size=member.size)
        self.size_bytes += member.size
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(name, flags, 0o600, dir_fd=parent), "wb") as file:
            for chunk in tar.data(member):
                if chunk == _ZEROS[: len(chunk)]:
                    file.seek(len(chunk), os.SEEK_CUR)
                else:
                    file.write(chunk)
            file.truncate(member.size)

    def _finish(
        self, member: tarfile.TarInfo, parts: tuple[str, ...], parent: int, name: str
    ) -> None:
        """Owner, mode, extended attributes and time: in this order, chown(2) takes bits away."""
        if not (0 <= member.uid <= _MAX_ID and 0 <= member.gid <= _MAX_ID):
            raise BadImageError(f"its owner is {member.uid}:{member.gid}")
        os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        if not member.issym():
            os.chmod(name, member.mode & 0o7777, dir_fd=parent)
        for key, value in _xattrs(member):
            _set_xattr(parent, name, key, value)
        if not math.isfinite(member.mtime):
            raise BadImageError(f"its time is {member.mtime}")
        time_ns = round(member.mtime * 1e9)
        if member.isdir():
            self._directory_times[parts] = time_ns
        else:
            os.utime(name, ns=(time_ns, time_ns), dir_fd=parent, follow_symlinks=False)

    def _set_directory_time(self, parts: tuple[str, ...], time_ns: int) -> None:
        *above, name = parts or (".",)
        # A later member may have replaced the directory, or one above it.
        with contextlib.suppress(FileNotFoundError, BadImageError):
            parent = self._tree.directory(tuple(above), create=False)
            if _kind(parent, name) is _Kind.DIRECTORY:
                os.utime(name, ns=(time_ns, time_ns), dir_fd=parent, follow_symlinks=False)


def _split(name: str) -> tuple[str, ...]:
    """A member's name as components below the layer's root; none for the root itself."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or ".." in parts:
        raise BadImageError(f"the name {name!r} leads out of the layer")
    if "\0" in name:
        raise BadImageError(f"the name {name!r} has a NUL character")
    if len(parts) > _MAX_DEPTH:
        raise BadImageError(f"the name has {len(parts)} components: at most {_MAX_DEPTH} are taken")
    if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
        raise BadImageError(f"the name {name!r} leads through a whiteout")
    return parts


def _xattrs(member: tarfile.TarInfo) -> Iterator[tuple[str, bytes]]:
    for record, value in member.pax_headers.items():
        key = record.removeprefix(_XATTR_KEY)
        if key == record:
            continue
        if key.startswith(_OVERLAYS_OWN):
            raise BadImageError(f"it has the extended attribute {key!r}, which is overlayfs's own")
        # The kernel has user.* on these alone, see xattr(7).
        holds_any = member.isreg() or member.isdir()
        if (key.startswith("user.") and holds_any) or (
            key == "security.capability" and member.isreg()
        ):
            # tarfile decodes what is UTF-8 and escapes the rest.
            yield key, value.encode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Names the member in what is wrong with it."""
    try:
        yield
    except BadImageError as error:
        raise BadImageError(f"member {name[:200]!r}: {error}") from error
    except (OverflowError, ValueError) as error:
        raise BadImageError(f"member {name[:200]!r} has a value that is none: {error}") from error
    except OSError as error:
        problem = f"member {name[:200]!r}: {error.strerror or error}"
        if error.errno in _MALFORMED:
            raise BadImageError(problem) from error
        raise KernelRefusedError(f"{problem}: look at the disk of the agent's state") from error
