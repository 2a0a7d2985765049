"""Images without a builder: layers, OCI image layouts and ``docker save`` archives, as bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from meshnet.runtime.images.oci import platform_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader

HOST = platform_of(os.uname().machine)
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True)
class Member:
    """An entry of a tar."""

    name: str
    kind: bytes = tarfile.REGTYPE
    data: bytes = b""
    link: str = ""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: float = 0
    device: tuple[int, int] = (0, 0)
    pax: dict[str, str] = field(default_factory=dict)


def directory(
    name: str, mode: int = 0o755, mtime: float = 0, pax: dict[str, str] | None = None
) -> Member:
    return Member(name, tarfile.DIRTYPE, mode=mode, mtime=mtime, pax=pax or {})


def symlink(name: str, link: str) -> Member:
    return Member(name, tarfile.SYMTYPE, link=link, mode=0o777)


def hard_link(name: str, link: str) -> Member:
    return Member(name, tarfile.LNKTYPE, link=link)


def tar(*members: Member) -> bytes:
    """A tar with the members, in that order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.linkname, info.mode = member.kind, member.link, member.mode
            info.uid, info.gid, info.mtime = member.uid, member.gid, member.mtime
            info.devmajor, info.devminor = member.device
            info.size, info.pax_headers = len(member.data), member.pax
            archive.addfile(info, io.BytesIO(member.data))
    return buffer.getvalue()


def digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def descriptor(content: bytes, media_type: str, **more: object) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(content), "size": len(content), **more}


def dumps(document: object) -> bytes:
    return json.dumps(document).encode()


def config_of(layers: tuple[bytes, ...], **config: object) -> bytes:
    """An image's config for this host."""
    return dumps(
        {
            "architecture": HOST.architecture,
            "os": "linux",
            "created": "2026-01-02T03:04:05Z",
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
            "config": config,
        }
    )


@contextmanager
def stream_of(raw: bytes) -> Iterator[BufferedReader]:
    """Bytes as what a store loads from."""
    with io.BufferedReader(io.BytesIO(raw)) as stream:
        yield cast("BufferedReader", stream)


def files_tar(files: dict[str, bytes]) -> bytes:
    return tar(*(Member(name, data=data) for name, data in files.items()))


@dataclass
class Layout:
    """An OCI image layout that images are added to."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: list[dict[str, Any]] = field(default_factory=list)

    def blob(self, content: bytes, media_type: str, **more: object) -> dict[str, Any]:
        found = descriptor(content, media_type, **more)
        self.blobs["blobs/sha256/" + found["digest"][7:]] = content
        return found

    def manifest(
        self, *layers: bytes, config: bytes | None = None, **more: object
    ) -> dict[str, Any]:
        """Add an image's blobs; returns what names its manifest."""
        parts = [self.blob(gzip.compress(raw, mtime=0), LAYER_TYPE + "+gzip") for raw in layers]
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": self.blob(config or config_of(layers), CONFIG_TYPE),
            "layers": parts,
        }
        return self.blob(dumps(document), MANIFEST_TYPE, **more)

    def add(self, name: str, *layers: bytes, config: bytes | None = None) -> Layout:
        """Add an image with a name."""
        annotations = {"org.opencontainers.image.ref.name": name} if name else {}
        self.manifests.append(self.manifest(*layers, config=config, annotations=annotations))
        return self

    def files(self) -> dict[str, bytes]:
        index = {"schemaVersion": 2, "manifests": self.manifests}
        return {"oci-layout": b"{}", "index.json": dumps(index), **self.blobs}

    def tar(self) -> bytes:
        return files_tar(self.files())


def docker_save(name: str, *layers: bytes) -> bytes:
    """What ``docker save`` made before Docker 25: a layer that occurs again is a link."""
    config = config_of(layers)
    members, names, seen = [], [], dict[str, str]()
    for number, layer in enumerate(layers):
        names.append(f"{number:064x}/layer.tar")
        if (first := seen.setdefault(digest(layer), names[-1])) != names[-1]:
            members.append(symlink(names[-1], f"../{first}"))
        else:
            members.append(Member(names[-1], data=layer))
    members.append(Member("config.json", data=config))
    saved = [{"Config": "config.json", "RepoTags": [name], "Layers": names}]
    return tar(*members, Member("manifest.json", data=dumps(saved)))
