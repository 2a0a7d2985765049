"""What of a container is mounted on the host while it runs: its root and its volumes.

If a container has ids of its own, they are where its root may enter: below RUN, because the state
directory is closed to all but the host's root::

    RUN/userns/ID/        owner root, group the container's root; nobody else may enter
        rootfs/           layers shown with the container's ids, below the writable layer
        volume-N/         volumes of the store, shown with these ids, too
        lower/            the layers alone, only while rootfs is being mounted
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError
from meshnet.runtime.engine.idmap import mount_idmapped, user_namespace
from meshnet.runtime.engine.overlayfs import mount_overlay, mounts_below, unmount
from meshnet.runtime.spec.options import Volume

if TYPE_CHECKING:
    from meshnet.runtime.engine.volumes import VolumeStore
    from meshnet.runtime.spec.id_ranges import IdRange
    from meshnet_agent.containers.record import ContainerRecord

_ROOTFS, _LOWER = "rootfs", "lower"


class Mounts:
    """The mounts of one container.

    Args:
        state: its directory on the disk, with its writable layer.
        outer: where its mounts are if the container has ids of its own.
    """

    def __init__(self, state: Path, outer: Path) -> None:
        self._state = state
        self._outer = outer

    def root_of(self, record: ContainerRecord) -> Path:
        """Where its root file system is."""
        return (self._state if record.ids is None else self._outer) / _ROOTFS

    def mount(self, record: ContainerRecord, store: VolumeStore) -> tuple[Volume, ...]:
        """Mount the root file system and the volumes; returns these with their sources.

        Raises:
            MeshnetError: something is missing, or the kernel refused.
        """
        lower = [Path(path) for path in record.lowerdirs]
        plain = self._state / _ROOTFS
        upper, work = self._state / "upper", self._state / "work"
        for directory in (plain, upper, work):
            directory.mkdir(exist_ok=True)
        missing = [p for p in record.mount_points if not store.data(p.name).exists()]
        # A new volume is filled from the image, with the owners that the container sees.  So this
        # needs a mount that maps no ids, even if the container has ids of its own.
        if record.ids is None or missing:
            mount_overlay(lower, upper, work, plain)
            for point in missing:
                store.make(
                    point.name,
                    plain,
                    point.destination,
                    anonymous=point.anonymous,
                    created_s=time.time(),
                )
        sources = [store.data(point.name) for point in record.mount_points]
        if record.ids is not None:
            if missing:
                unmount(plain)
            with user_namespace(record.ids) as namespace:
                self._mount_mapped(lower, upper, work, record.ids, namespace)
                sources = [
                    self._map(source, f"volume-{number}", namespace)
                    for number, source in enumerate(sources)
                ]
        return tuple(
            Volume(str(source), point.destination, point.read_only)
            for source, point in zip(sources, record.mount_points, strict=True)
        )

    def _mount_mapped(
        self, lower: list[Path], upper: Path, work: Path, ids: IdRange, namespace: int
    ) -> None:
        self._make_outer(ids)
        # One idmapped mount shows all layers: overlayfs accepts directories below it.
        common = Path(os.path.commonpath(lower))
        mapped = self._map(common, _LOWER, namespace)
        os.chown(upper, ids.first, ids.first)
        rootfs = self._outer / _ROOTFS
        rootfs.mkdir(exist_ok=True)
        try:
            mount_overlay(
                [mapped / path.relative_to(common) for path in lower], upper, work, rootfs
            )
        finally:
            unmount(mapped)  # overlayfs holds the layers by itself now

    def _map(self, source: Path, name: str, namespace: int) -> Path:
        target = self._outer / name
        target.mkdir(exist_ok=True)
        mount_idmapped(source, target, namespace)
        return target

    def _make_outer(self, ids: IdRange) -> None:
        self._outer.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._outer.parent.chmod(0o711)
        os.chown(self._outer, 0, ids.first)
        self._outer.chmod(0o710)
        for directory in self._outer.parent.parents:
            if not directory.stat().st_mode & 0o001:
                raise KernelRefusedError(
                    f"root of a user namespace may not enter {directory}: chmod o+x it, or give "
                    "the agent another --run-dir"
                )

    def unmount(self) -> None:
        """Undo `mount`.  Idempotent.

        Raises:
            KernelRefusedError: the kernel refused.
        """
        for directory in (self._state, self._outer):
            for mounted in reversed(mounts_below(directory)):
                unmount(mounted)
        # rmdir, never rmtree: behind a mount that stayed are the image's layers.
        if self._outer.exists():
            try:
                for directory in self._outer.iterdir():
                    directory.rmdir()
                self._outer.rmdir()
            except OSError as error:
                raise KernelRefusedError(f"{self._outer} cannot be removed: {error}") from error
