"""Documents of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.runtime.images.oci import ImageConfig

if TYPE_CHECKING:
    from meshnet.runtime.images.store import Image, Removed
    from meshnet_agent.api.documents import Document


def image_document(image: Image) -> Document:
    """An image; `size_bytes` is that of its layers, which it may share with others."""
    return {
        "id": image.id,
        "names": image.names,
        "size_bytes": image.size_bytes,
        "created": image.document.created,
        "layers": len(image.layers),
        "in_use": bool(image.containers),
        "containers": image.containers,
    }


def image_details(image: Image) -> Document:
    """An image, with what it is made of and how it wants to be run."""
    config = image.document.config or ImageConfig()
    return image_document(image) | {
        "digest": image.manifest.digest,
        "os": image.document.os,
        "architecture": image.document.architecture,
        "diff_ids": image.layers,
        "config": {
            "entrypoint": config.entrypoint or (),
            "cmd": config.cmd or (),
            "env": config.env or (),
            "user": config.user or "",
            "working_dir": config.working_dir or "",
            "volumes": sorted(config.volumes or ()),
            "exposed_ports": sorted(config.exposed_ports or ()),
            "stop_signal": config.stop_signal or "",
            "labels": config.labels or {},
        },
    }


def removed_document(removed: Removed) -> Document:
    """What removing an image or a name of it did."""
    return {"id": removed.id, "untagged": removed.untagged, "deleted": removed.deleted}
