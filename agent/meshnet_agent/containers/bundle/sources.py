"""Where root file systems come from: images by reference, directories by path.

Everything here blocks, so call it in threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import UsageError
from meshnet.runtime.images.oci import Digest, ImageConfig
from meshnet.runtime.images.store import ImageStore

if TYPE_CHECKING:
    from meshnet.runtime.spec.options import ContainerOptions
    from meshnet_agent.containers.record import ContainerRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a container is made from: a directory, or an image that is held for it."""

    lowerdirs: tuple[str, ...]
    config: ImageConfig = field(default_factory=ImageConfig)
    image_id: Digest | None = None


class Sources:
    """The images and directories that containers of this host are made from.

    Args:
        images: the image store's directory.
    """

    def __init__(self, images: Path) -> None:
        self._store = ImageStore(images)
        self._empty = images / "empty"

    def hold(self, options: ContainerOptions, container: str) -> Source:
        """Find what to run, and keep it until `release`.

        Raises:
            NotFoundError: there is no such image.
            UsageError: the path is not a directory.
        """
        if options.image is None:
            rootfs = str(options.rootfs)
            if not Path(rootfs).is_dir():
                raise UsageError(f"rootfs {rootfs} is not a directory: give one with a file system")
            return Source(lowerdirs=(rootfs,))
        image = self._store.hold(options.image, container)
        lowerdirs = self._store.lowerdirs(image)
        # overlayfs wants at least one lower directory, and an image may have no layers.
        if not lowerdirs:
            self._empty.mkdir(exist_ok=True)
        return Source(
            lowerdirs=tuple(map(str, lowerdirs or (self._empty,))),
            config=image.document.config or ImageConfig(),
            image_id=image.id,
        )

    def release(self, record: ContainerRecord) -> None:
        """Let go of a container's image, if it holds one.  Idempotent."""
        if record.options.image is not None and record.image_id is not None:
            self._store.release(Digest(record.image_id), record.id)
