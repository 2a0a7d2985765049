"""The volumes of this host: which containers have them, and when they may be removed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import ConflictError, KernelRefusedError, MeshnetError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.runtime.engine.volumes import StoredVolume, VolumeStore
    from meshnet.runtime.spec.mount_points import MountPoint
    from meshnet_agent.containers.directory import ContainerDirectory

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class VolumeUse:
    """A volume and the names of the containers that have it."""

    volume: StoredVolume
    containers: tuple[str, ...]


class Volumes:
    """The volumes of this host, and the containers that have them."""

    def __init__(self, store: VolumeStore, directory: ContainerDirectory) -> None:
        self._store = store
        self._directory = directory

    async def collect(self) -> None:
        """Remove what an agent that was killed left half made (`VolumeStore.collect`)."""
        await trio.to_thread.run_sync(self._store.collect)

    async def all(self) -> list[VolumeUse]:
        """All volumes, by name."""
        volumes = await trio.to_thread.run_sync(self._store.all)
        return [VolumeUse(v, self._containers(v.name)) for v in volumes]

    async def remove(self, name: str) -> None:
        """Remove a volume and its content.

        Raises:
            NotFoundError, UsageError: there is no such volume.
            ConflictError: a container has it.
            KernelRefusedError: its content cannot be removed.
        """
        having = self._containers(name)
        if having:
            raise ConflictError(
                f"volume {name} is in use by container {', '.join(having)}: remove "
                f"{'it' if len(having) == 1 else 'them'} first"
            )
        # Before anything is awaited, so that no container can take the volume after the check.  One
        # that wants a volume of this name from now on gets a new one.
        grave = self._store.set_aside(name)
        try:
            await trio.to_thread.run_sync(shutil.rmtree, grave)
        except OSError as error:
            raise KernelRefusedError(
                f"the content of volume {name} cannot be removed: {error}"
            ) from error

    async def prune(self, *, named: bool) -> list[str]:
        """Remove anonymous volumes that no container has; with `named`, all such volumes.

        Returns:
            The names of those that were removed.
        """
        removed = []
        for use in await self.all():
            name = use.volume.name
            # Ask again: a container may have taken it while another volume was removed.
            if (use.volume.anonymous or named) and not self._containers(name):
                await self.remove(name)
                removed.append(name)
        return removed

    async def remove_anonymous(self, mount_points: Iterable[MountPoint]) -> None:
        """Remove the anonymous volumes of a container that is gone; a failure is only logged."""
        for point in mount_points:
            if (
                point.anonymous
                and not self._containers(point.name)
                and self._store.data(point.name).exists()
            ):
                try:
                    await self.remove(point.name)
                except MeshnetError as error:
                    _log.error("volume stays", volume=point.name, reason=str(error))

    def _containers(self, name: str) -> tuple[str, ...]:
        return tuple(
            record.name
            for record in self._directory.records()
            if any(point.name == name for point in record.mount_points)
        )
