"""The store of images: content by its digest, layers unpacked once, names on top.

An image exists when the index of the store's directory says so (`meshnet.runtime.images.store_dir`
has the layout).  Everything it needs is on the disk by then, and goes when the last index entry
that needs it is gone: what is referenced is computed, never counted up and down.  So a process that
is killed leaves only what nobody references, which the next load, removal or start of an agent
collects.  Any number of processes may use a store at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import tarfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from meshnet.errors import (
    ConflictError,
    MeshnetError,
    UsageError,
)
from meshnet.runtime.images import oci
from meshnet.runtime.images.archive import Archive
from meshnet.runtime.images.layers import unpack
from meshnet.runtime.images.names import Entry, canonical, find, hex_of, short, tidied
from meshnet.runtime.images.oci import BadImageError, Descriptor, Digest, Index
from meshnet.runtime.images.store_dir import OCI_LAYOUT, StoreDir
from meshnet.system.files import sync, sync_filesystem
from meshnet.text import check_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from io import BufferedReader
    from pathlib import Path

    from meshnet.runtime.images.archive import ArchivedImage, Blob
    from meshnet.runtime.images.oci import ImageDocument, Reference
    from meshnet.runtime.images.tarstream import Budget


@dataclass(frozen=True, slots=True)
class Image:
    """An image of the store.

    Attributes:
        id: digest of its config.
        names: none for an image whose name was given to another one.
        layers: diff ids, the lowest first.
        size_bytes: content of its layers, unpacked; images may share some.
        containers: who holds it.
    """

    id: Digest
    manifest: Descriptor
    names: tuple[str, ...]
    document: ImageDocument
    layers: tuple[Digest, ...]
    size_bytes: int
    containers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Removed:
    """What `ImageStore.remove` did: took a name away, and the image with its last one."""

    id: Digest
    untagged: tuple[str, ...]
    deleted: bool


class ImageStore:
    """The images below a directory, which is made when it is first needed.

    Every method blocks; `load`, `export` and `remove` move data and may take long.  Every method
    raises `KernelRefusedError` when the disk refuses.
    """

    def __init__(self, root: Path) -> None:
        self._dir = StoreDir(root)
        self._host = oci.platform_of(os.uname().machine)

    # --- reading --------------------------------------------------------------------------------

    def images(self) -> list[Image]:
        """All images, the named ones first, by name."""
        with self._dir.locked():
            entries = self._dir.entries()
            by_id = {e.id: [o for o in entries if o.id == e.id] for e in entries}
            found = [self._image(same) for same in by_id.values()]
        return sorted(found, key=lambda image: (not image.names, image.names, image.id))

    def find(self, text: str) -> Image:
        """An image by one of its names, its id, or the beginning of the id (4 digits or more).

        Raises:
            NotFoundError: there is none.
            UsageError: several ids begin like that, or it is not a name.
        """
        with self._dir.locked():
            return self._image(find(self._dir.entries(), text))

    def lowerdirs(self, image: Image) -> tuple[Path, ...]:
        """The image's layers as overlayfs wants them: the uppermost first, none twice.

        A layer that occurs twice is hidden by its upper occurrence, so the lower one is left out:
        overlayfs refuses it.  An image may have no layer at all.
        """
        return tuple(self._dir.layer(d) / "diff" for d in dict.fromkeys(reversed(image.layers)))

    # --- containers -----------------------------------------------------------------------------

    def hold(self, text: str, container: str) -> Image:
        """Keep an image for a container until `release`.  Idempotent.

        Raises:
            NotFoundError, UsageError: as `find`.
        """
        check_name("container", container)
        with self._dir.locked():
            entries = find(self._dir.entries(), text)
            holds = self._dir.holds / hex_of(entries[0].id)
            holds.mkdir(exist_ok=True)
            (holds / container).touch(mode=0o600)
            sync(holds)
            sync(self._dir.holds)
            return self._image(entries)

    def release(self, image: Digest, container: str) -> None:
        """Let go of an image that the container held.  Idempotent."""
        check_name("container", container)
        with self._dir.locked():
            holds = self._dir.holds / hex_of(image)
            (holds / container).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                holds.rmdir()  # stays while others hold the image

    # --- changing -------------------------------------------------------------------------------

    def load(self, stream: BufferedReader, name: str | None, budget: Budget) -> list[Image]:
        """Take in all images of an archive that are for this host.

        Args:
            stream: a tar of an OCI image layout or of ``docker save``, or that compressed by gzip.
            name: what to call the image, in the place of the names that the archive has.
            budget: what it may take: the archive, and once more its layers.

        Raises:
            BadImageError: the archive is malformed, or is not what its digests say.
            NotFoundError: it has no image for this host's platform.
            PolicyRefusedError: it exceeds the budget.
            UsageError: `name` is none, or the archive has several images.
        """
        wanted = oci.parse_reference(name) if name is not None else None
        for_layers = dataclasses.replace(budget)
        with self._dir.staging() as staging:
            spool = staging / "spool"
            spool.mkdir()
            archive = Archive(spool)
            archive.read(stream, budget)
            found = archive.images(self._host)
            if wanted is not None and len({image.id for image in found}) > 1:
                raise UsageError(
                    f"the archive has {len(found)} images, which cannot all be {wanted}: leave the "
                    "name out, their own will be used"
                )
            while True:
                self._unpack_missing(staging, found, for_layers)
                sync_filesystem(staging)
                with self._dir.locked():
                    if not list(self._missing(staging, found)):
                        return self._commit(staging, found, wanted)
                # Somebody removed an image, and with it layers that were to be shared with it.

    def remove(self, text: str) -> Removed:
        """Take a name away, or an image by its id; with its last name an image goes.

        Raises:
            NotFoundError, UsageError: as `find`.
            ConflictError: containers hold the image, or it was given by id and has several names.
        """
        with self._dir.staging() as staging, self._dir.locked():
            entries = self._dir.entries()
            same = find(entries, text)
            names = [e.name for e in same if e.name]
            by_name = bool(names) and names[0] == canonical(text)
            if len(names) > 1 and not by_name:
                raise ConflictError(
                    f"image {short(same[0].id)} has {len(names)} names ({', '.join(names)}): "
                    "remove them by name"
                )
            going = same[:1] if by_name else same
            deleted = len(going) == len(same)
            holders = self._dir.holders(same[0].id)
            if deleted and holders:
                raise ConflictError(
                    f"image {text} is in use by container {', '.join(holders)}: remove "
                    f"{'it' if len(holders) == 1 else 'them'} first"
                )
            self._dir.write_entries([e for e in entries if e not in going])
            self._dir.collect(staging)
        return Removed(same[0].id, tuple(e.name for e in going if e.name), deleted)

    def export(self, text: str, output: IO[bytes]) -> None:
        """Write an image as a tar of an OCI image layout, with the very blobs that were loaded.

        Raises:
            NotFoundError, UsageError: as `find`.
        """
        with self._dir.staging() as staging:
            with self._dir.locked():
                image = self._image(find(self._dir.entries(), text))
                blobs = sorted(self._dir.blobs_of(image.manifest))
                for digest in blobs:
                    # A link: the image may be removed while it is written.
                    os.link(self._dir.blob(digest), staging / hex_of(digest))
            index = oci.encode(Index(manifests=(image.manifest,)))
            with tarfile.open(fileobj=output, mode="w|") as tar:
                for name, content in (("oci-layout", OCI_LAYOUT), ("index.json", index)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                for digest in blobs:
                    tar.add(staging / hex_of(digest), f"blobs/sha256/{hex_of(digest)}")

    def collect(self) -> None:
        """Remove what killed processes left."""
        with self._dir.staging() as staging, self._dir.locked():
            self._dir.collect(staging)

    # --- loading --------------------------------------------------------------------------------

    def _missing(
        self, staging: Path, images: Iterable[ArchivedImage]
    ) -> Iterator[tuple[Digest, Blob]]:
        """Layers that are neither in the store nor unpacked in `staging`."""
        for image in images:
            for diff_id, blob in image.layers:
                if not (self._dir.layer(diff_id).exists() or (staging / hex_of(diff_id)).exists()):
                    yield diff_id, blob

    def _unpack_missing(
        self, staging: Path, images: Iterable[ArchivedImage], budget: Budget
    ) -> None:
        for diff_id, blob in self._missing(staging, images):
            directory = staging / hex_of(diff_id)
            (directory / "diff").mkdir(parents=True)
            (directory / "diff").chmod(0o755)
            try:
                with open(blob.path, "rb") as file:
                    unpacked = unpack(file, directory / "diff", budget)
                if unpacked.diff_id != diff_id:
                    raise BadImageError(
                        f"it has digest {unpacked.diff_id} once decompressed: the image was "
                        "changed or damaged, get it anew"
                    )
            except MeshnetError as error:
                raise type(error)(f"layer {short(diff_id)}: {error}") from error
            facts = {"size_bytes": unpacked.size_bytes, "entries": unpacked.entries}
            (directory / "layer.json").write_text(json.dumps(facts))

    def _commit(
        self, staging: Path, images: Iterable[ArchivedImage], wanted: Reference | None
    ) -> list[Image]:
        """Move what is new into place, and then say that it is there."""
        entries = self._dir.entries()
        for image in images:
            for blob in image.blobs:
                if not self._dir.blob(blob.digest).exists():
                    os.rename(blob.path, self._dir.blob(blob.digest))
            for diff_id, _ in image.layers:
                if not self._dir.layer(diff_id).exists():
                    os.rename(staging / hex_of(diff_id), self._dir.layer(diff_id))
            names = [str(name) for name in ([wanted] if wanted is not None else image.names)]
            entries += [Entry(image.id, image.manifest, name) for name in names or [""]]
        sync(self._dir.blobs)
        sync(self._dir.layers)
        self._dir.write_entries(tidied(entries))
        entries = self._dir.entries()
        ids = dict.fromkeys(image.id for image in images)
        return [self._image([e for e in entries if e.id == i]) for i in ids]

    def _image(self, entries: list[Entry]) -> Image:
        """The image that entries are of; the first tells its manifest."""
        first = entries[0]
        document = oci.decode_config(self._dir.blob(first.id).read_bytes(), f"config {first.id}")
        layers = document.rootfs.diff_ids
        return Image(
            id=first.id,
            manifest=first.manifest,
            names=tuple(sorted(e.name for e in entries if e.name)),
            document=document,
            layers=layers,
            size_bytes=sum(self._dir.layer_size(d) for d in layers),
            containers=self._dir.holders(first.id),
        )
