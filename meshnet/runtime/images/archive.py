"""Image archives: a tar of an OCI image layout, or what ``docker save`` makes.

Both come as a stream, in which a manifest may follow the layers that it names.  So the archive's
files are written down first, under numbers: no name in an archive ever becomes a name on the disk.
Then each is looked up by the digest that it really has.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshnet.errors import NotFoundError
from meshnet.runtime.images import oci
from meshnet.runtime.images.oci import BadImageError, Descriptor, Digest, Reference
from meshnet.runtime.images.tarstream import TarStream, compression, decompressed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from io import BufferedReader
    from pathlib import Path

    from meshnet.runtime.images.oci import ImageDocument, Platform, SavedImage
    from meshnet.runtime.images.tarstream import Budget

_BLOB_NAME = re.compile(r"blobs/sha256/([0-9a-f]{64})")
_MAX_INDEX_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Blob:
    """A file of the archive, written down."""

    path: Path
    digest: Digest
    size: int

    def descriptor(self, media_type: str) -> Descriptor:
        """Names it."""
        return Descriptor(media_type=media_type, digest=self.digest, size=self.size)


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """An image that an archive has, with all that it is made of.

    Attributes:
        id: digest of its config.
        names: what the archive calls it.
        blobs: manifest, config and layers.
        layers: the lowest first, each with its diff id.
    """

    id: Digest
    manifest: Descriptor
    document: ImageDocument
    names: tuple[Reference, ...]
    blobs: tuple[Blob, ...]
    layers: tuple[tuple[Digest, Blob], ...]


class Archive:
    """The files of an archive, by name and by digest.

    Args:
        directory: an empty one, for the files.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        self._files: dict[str, Blob] = {}
        self._links: dict[str, str] = {}
        self._blobs: dict[Digest, Blob] = {}

    def read(self, stream: BufferedReader, budget: Budget) -> None:
        """Write the archive's files down; reads the stream to its end.

        Args:
            stream: a tar, or one compressed by gzip.

        Raises:
            BadImageError: it is not a tar, or a blob is not what its name says.
            PolicyRefusedError: it exceeds the budget.
        """
        with decompressed(stream) as plain:
            tar = TarStream(plain)
            for member in tar.members():
                budget.spend(size=member.size, entries=1)
                name = posixpath.normpath(member.name)
                if member.isreg():
                    self._files[name] = blob = self._write(tar.data(member))
                    promised = _BLOB_NAME.fullmatch(name)
                    if promised and blob.digest != f"sha256:{promised[1]}":
                        raise BadImageError(
                            f"blob {name} of the archive has digest {blob.digest}: it was changed "
                            "or damaged, get it anew"
                        )
                elif member.issym():
                    # docker save had links for layers that occur twice.
                    self._links[name] = posixpath.normpath(
                        posixpath.join(posixpath.dirname(name), member.linkname)
                    )
                elif not member.isdir():
                    raise BadImageError(
                        f"{member.name!r} of the archive is not a file: create the archive again"
                    )
            tar.drain(budget)

    def images(self, host: Platform) -> list[ArchivedImage]:
        """Its images for a host.

        Raises:
            BadImageError: it is not an image archive, or something in it is missing or malformed.
            NotFoundError: it has no image for the host's platform.
        """
        if "index.json" in self._files:
            index = oci.decode_index(self._document(self._files["index.json"]), "index.json")
            manifests = self._choose(index.manifests, host, "the archive", 0)
        elif "manifest.json" in self._files:
            raw = self._document(self._files["manifest.json"])
            manifests = map(self._manifest_of, oci.decode_saved(raw, "manifest.json"))
        else:
            raise BadImageError(
                "the archive has neither index.json nor manifest.json: give an OCI image layout or "
                "what docker save made"
            )
        found = [self._image(descriptor, names, host) for descriptor, names in manifests]
        if not found:
            raise NotFoundError("the archive has no image: make it anew")
        return found

    def _choose(
        self, descriptors: Iterable[Descriptor], host: Platform, what: str, depth: int
    ) -> Iterator[tuple[Descriptor, tuple[Reference, ...]]]:
        if depth > _MAX_INDEX_DEPTH:
            raise BadImageError(f"{what} has indexes within indexes: make it anew")
        for descriptor in oci.choose(descriptors, host, what):
            if not descriptor.is_index:
                yield descriptor, descriptor.names
                continue
            what = f"index {descriptor.digest}"
            index = oci.decode_index(self._document(self._blob(descriptor)), what)
            for manifest, names in self._choose(index.manifests, host, what, depth + 1):
                yield manifest, descriptor.names or names

    def _manifest_of(self, saved: SavedImage) -> tuple[Descriptor, tuple[Reference, ...]]:
        """Make the manifest that ``docker save`` has none of."""
        layers = []
        for name in saved.layers:
            blob = self._file(name)
            with open(blob.path, "rb") as file:
                kind = compression(file.read(8))
            layers.append(blob.descriptor(oci.LAYER_TYPE + (f"+{kind}" if kind else "")))
        config = self._file(saved.config).descriptor(oci.CONFIG_TYPE)
        manifest = self._write([oci.encode(oci.Manifest(config=config, layers=tuple(layers)))])
        names = tuple(map(oci.parse_reference, saved.repo_tags or ()))
        return manifest.descriptor(oci.MANIFEST_TYPE), names

    def _image(
        self, descriptor: Descriptor, names: tuple[Reference, ...], host: Platform
    ) -> ArchivedImage:
        blob = self._blob(descriptor)
        manifest = oci.decode_manifest(self._document(blob), f"manifest {descriptor.digest}")
        config = self._blob(manifest.config)
        document = oci.decode_config(self._document(config), f"config {config.digest}")
        if oci.fitness(document.platform, host) is None:
            raise NotFoundError(
                f"image {config.digest} is for {document.platform}, not for {host}: get one that is"
            )
        diff_ids = document.rootfs.diff_ids
        if len(diff_ids) != len(manifest.layers):
            raise BadImageError(
                f"image {config.digest} has {len(manifest.layers)} layers and {len(diff_ids)} diff "
                "ids: make it anew"
            )
        layers = tuple(map(self._blob, manifest.layers))
        return ArchivedImage(
            id=config.digest,
            manifest=Descriptor(
                media_type=descriptor.media_type or manifest.media_type,
                digest=descriptor.digest,
                size=descriptor.size,
            ),
            document=document,
            names=names,
            blobs=(blob, config, *layers),
            layers=tuple(zip(diff_ids, layers, strict=True)),
        )

    def _file(self, name: str) -> Blob:
        name = posixpath.normpath(name)
        found = self._files.get(self._links.get(name, name))
        if found is None:
            raise BadImageError(f"the archive has no file {name!r}: make it anew")
        return found

    def _blob(self, descriptor: Descriptor) -> Blob:
        found = self._blobs.get(descriptor.digest)
        if found is None or found.size != descriptor.size:
            raise BadImageError(
                f"the archive has no blob {descriptor.digest} of {descriptor.size} bytes: make it "
                "anew"
            )
        return found

    def _write(self, chunks: Iterable[bytes]) -> Blob:
        path = self._directory / str(self._count)
        self._count += 1
        hashed, size = hashlib.sha256(), 0
        with open(path, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
                hashed.update(chunk)
                size += len(chunk)
        blob = Blob(path, Digest(f"sha256:{hashed.hexdigest()}"), size)
        return self._blobs.setdefault(blob.digest, blob)

    def _document(self, blob: Blob) -> bytes:
        with open(blob.path, "rb") as file:
            return file.read(oci.MAX_DOCUMENT_BYTES + 1)
