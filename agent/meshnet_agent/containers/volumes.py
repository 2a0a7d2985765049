"""Volumes of this host, for containers and for the API."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import ConflictError, KernelRefusedError, MeshnetError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from starlette.requests import Request
    from starlette.routing import Route

    from meshnet.runtime.engine.volumes import VolumeStore
    from meshnet.runtime.spec.mount_points import MountPoint
    from meshnet_agent.api.documents import Document

    MakeRoute = Callable[[str, str, Callable[[Request], Awaitable[object]]], Route]

_log = structlog.get_logger()


class Volumes:
    """The volumes of this host, and who has them.

    Args:
        mount_points: those of all containers, by the container's name.
    """

    def __init__(
        self, store: VolumeStore, mount_points: Callable[[], Mapping[str, Iterable[MountPoint]]]
    ) -> None:
        self.store = store
        self._mount_points = mount_points

    async def documents(self) -> list[Document]:
        """All volumes."""
        volumes = await trio.to_thread.run_sync(self.store.all)
        return [asdict(v) | {"containers": self._containers(v.name)} for v in volumes]

    async def remove(self, name: str) -> Document:
        """Remove a volume and its content.

        Raises:
            NotFoundError, UsageError: there is none.
            ConflictError: a container has it.
        """
        having = self._containers(name)
        if having:
            raise ConflictError(
                f"volume {name} is in use by container {', '.join(having)}: remove "
                f"{'it' if len(having) == 1 else 'them'} first"
            )
        # At once, here: a container that wants it from now on gets another one.
        grave = self.store.set_aside(name)
        try:
            await trio.to_thread.run_sync(shutil.rmtree, grave)
        except OSError as error:
            raise KernelRefusedError(
                f"the content of volume {name} cannot be removed: {error}"
            ) from error
        return {"name": name}

    async def prune(self, *, named: bool) -> list[Document]:
        """Remove the volumes that no container has: anonymous ones, with `named` any."""
        return [
            await self.remove(document["name"])
            for document in await self.documents()
            if (document["anonymous"] or named) and not self._containers(document["name"])
        ]

    async def remove_anonymous(self, mount_points: Iterable[MountPoint]) -> None:
        """Remove what a container had for itself alone; a failure is only logged."""
        for point in mount_points:
            if (
                point.anonymous
                and not self._containers(point.name)
                and self.store.data(point.name).exists()
            ):
                try:
                    await self.remove(point.name)
                except MeshnetError as error:
                    _log.error("volume stays", volume=point.name, reason=str(error))

    def _containers(self, name: str) -> list[str]:
        return [
            container
            for container, points in self._mount_points().items()
            if any(point.name == name for point in points)
        ]


def volume_routes(volumes: Volumes, route: MakeRoute) -> list[Route]:
    """The API's requests on volumes (docs/api.md); `route` guards a handler."""

    async def list_all(_request: Request) -> object:
        return await volumes.documents()

    async def remove(request: Request) -> object:
        return await volumes.remove(request.path_params["name"])

    async def prune(request: Request) -> object:
        return await volumes.prune(named=request.query_params.get("all") == "1")

    return [
        route("/v1/volumes", "GET", list_all),
        route("/v1/volumes", "DELETE", prune),
        route("/v1/volumes/{name}", "DELETE", remove),
    ]
