"""The directory of an image store: what is where, the index, the locks.

::

    DIR/oci-layout, index.json, blobs/sha256/   an OCI image layout: names are annotations of the
                                                index; blobs are kept as they came, so that a push
                                                sends what a pull got
    DIR/layers/HEX/diff, layer.json             a layer, unpacked for overlayfs; HEX: its diff id
    DIR/holds/HEX/CONTAINER                     containers of an image; HEX: its id
    DIR/tmp/…                                   what is under way; locked by whoever works there
    DIR/lock                                    taken for moments, never while data is moved
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError
from meshnet.runtime.images import oci
from meshnet.runtime.images.names import Entry, hex_of
from meshnet.runtime.images.oci import Descriptor, Index
from meshnet.system.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from meshnet.runtime.images.oci import Digest

OCI_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


class StoreDir:
    """The directory; made when it is first locked.

    Attributes:
        root: itself.
        blobs, layers, holds: see above.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs" / "sha256"
        self.layers = root / "layers"
        self.holds = root / "holds"
        self._tmp = root / "tmp"

    def entries(self) -> list[Entry]:
        """What the index says; to be called under the lock, as all that follows."""
        try:
            raw = (self.root / "index.json").read_bytes()
        except FileNotFoundError:
            return []
        index = oci.decode_index(raw, str(self.root / "index.json"))
        return [
            Entry(
                self._manifest(d).config.digest,
                Descriptor(media_type=d.media_type, digest=d.digest, size=d.size),
                (d.annotations or {}).get(oci.REF_NAME, ""),
            )
            for d in index.manifests
        ]

    def write_entries(self, entries: Iterable[Entry]) -> None:
        """Replace the index, atomically and durably."""
        manifests = tuple(
            Descriptor(
                media_type=e.manifest.media_type,
                digest=e.manifest.digest,
                size=e.manifest.size,
                annotations={oci.REF_NAME: e.name} if e.name else None,
            )
            for e in entries
        )
        write_whole(self.root / "index.json", oci.encode(Index(manifests=manifests)))

    def layer_size(self, diff_id: Digest) -> int:
        """Bytes of a layer's content, unpacked."""
        return int(json.loads((self.layer(diff_id) / "layer.json").read_bytes())["size_bytes"])

    def holders(self, image: Digest) -> tuple[str, ...]:
        """The containers that hold an image."""
        try:
            return tuple(sorted(os.listdir(self.holds / hex_of(image))))
        except FileNotFoundError:
            return ()

    def _manifest(self, descriptor: Descriptor) -> oci.Manifest:
        raw = self.blob(descriptor.digest).read_bytes()
        return oci.decode_manifest(raw, f"manifest {descriptor.digest}")

    def blobs_of(self, descriptor: Descriptor) -> set[Digest]:
        """All blobs of an image, the manifest itself among them."""
        manifest = self._manifest(descriptor)
        return {descriptor.digest, manifest.config.digest, *(d.digest for d in manifest.layers)}

    def blob(self, digest: Digest) -> Path:
        """Where a blob is, or belongs."""
        return self.blobs / hex_of(digest)

    def layer(self, diff_id: Digest) -> Path:
        """Where a layer is, or belongs."""
        return self.layers / hex_of(diff_id)

    def collect(self, staging: Path) -> None:
        """Move everything that the index does not lead to into `staging`, which goes."""
        blobs: set[str] = set()
        layers: set[str] = set()
        for entry in self.entries():
            blobs |= set(map(hex_of, self.blobs_of(entry.manifest)))
            config = self.blob(entry.id).read_bytes()
            layers |= set(map(hex_of, oci.decode_config(config, entry.id).rootfs.diff_ids))
        for directory, kept in ((self.blobs, blobs), (self.layers, layers)):
            for name in set(os.listdir(directory)) - kept:
                os.rename(directory / name, staging / f"{directory.name}-{name}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While the block runs nobody else changes the store; made if it is missing.

        Raises:
            KernelRefusedError: the disk refuses, now or in the block.
        """
        with self._refusals():
            self._make()
            lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
            finally:
                os.close(lock)

    def _make(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (self.blobs, self.layers, self.holds, self._tmp):
            directory.mkdir(parents=True, exist_ok=True)
        if not (self.root / "oci-layout").exists():
            (self.root / "oci-layout").write_bytes(OCI_LAYOUT)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory of the calling process's own, removed at the end.

        It is locked: one that is not is left by a process that was killed, and goes with this one.

        Raises:
            KernelRefusedError: the disk refuses, now or in the block.
        """
        with self._refusals(), contextlib.ExitStack() as stack:
            with self.locked():
                staging = Path(tempfile.mkdtemp(dir=self._tmp))
                stack.callback(os.close, _try_lock(staging))
                stack.callback(shutil.rmtree, staging, ignore_errors=True)
                for other in self._tmp.iterdir():
                    # Somebody works there, or has just finished.
                    with contextlib.suppress(BlockingIOError, FileNotFoundError):
                        os.close(_try_lock(other))
                        os.rename(other, staging / f"left-{other.name}")
            yield staging

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise  # of whoever reads an export
        except OSError as error:
            raise KernelRefusedError(
                f"the image store {self.root} cannot be used ({error}): look at its disk, and run "
                "as root"
            ) from error


def _try_lock(directory: Path) -> int:
    """Lock a directory; returns the descriptor that holds the lock until it is closed.

    Raises:
        BlockingIOError: another process has it.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd
