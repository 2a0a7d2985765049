"""Documents of images (docs/cli.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from meshnet.runtime.images.oci import ImageConfig

if TYPE_CHECKING:
    from meshnet.runtime.images.store import Image, Removed


class ImageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """An image; `size_bytes` is that of its layers, which it may share with others."""

    id: str
    names: tuple[str, ...]
    size_bytes: int
    created: str | None
    layers: int
    in_use: bool
    containers: tuple[str, ...]


class ImageConfigDocument(msgspec.Struct, frozen=True, kw_only=True):
    """How an image wants to be run."""

    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    env: tuple[str, ...]
    user: str
    working_dir: str
    volumes: list[str]
    exposed_ports: list[str]
    stop_signal: str
    labels: dict[str, str]


class ImageDetails(ImageSummary, frozen=True, kw_only=True):
    """An image, with what it is made of and how it wants to be run."""

    digest: str
    os: str
    architecture: str
    diff_ids: tuple[str, ...]
    config: ImageConfigDocument


class RemovedImage(msgspec.Struct, frozen=True, kw_only=True):
    """What removing an image or a name of it did."""

    id: str
    untagged: tuple[str, ...]
    deleted: bool


def image_summary(image: Image) -> ImageSummary:
    """An image, as ``image ls`` shows it."""
    return ImageSummary(**_fields(image))


def image_details(image: Image) -> ImageDetails:
    """An image, as ``image inspect`` shows it."""
    config = image.document.config or ImageConfig()
    return ImageDetails(
        **_fields(image),
        digest=image.manifest.digest,
        os=image.document.os,
        architecture=image.document.architecture,
        diff_ids=image.layers,
        config=ImageConfigDocument(
            entrypoint=config.entrypoint or (),
            cmd=config.cmd or (),
            env=config.env or (),
            user=config.user or "",
            working_dir=config.working_dir or "",
            volumes=sorted(config.volumes or ()),
            exposed_ports=sorted(config.exposed_ports or ()),
            stop_signal=config.stop_signal or "",
            labels=config.labels or {},
        ),
    )


def _fields(image: Image) -> dict[str, Any]:
    """What both documents of an image have."""
    return {
        "id": image.id,
        "names": image.names,
        "size_bytes": image.size_bytes,
        "created": image.document.created,
        "layers": len(image.layers),
        "in_use": bool(image.containers),
        "containers": image.containers,
    }


def removed_image(removed: Removed) -> RemovedImage:
    """What was removed."""
    return RemovedImage(id=removed.id, untagged=removed.untagged, deleted=removed.deleted)
