"""The API's requests on volumes (docs/api.md), for `meshnet_agent.containers.volumes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from meshnet_agent.api.documents.volumes import RemovedVolume, VolumeDocument, volume_document
from meshnet_agent.api.operation import Operation, operation

if TYPE_CHECKING:
    from starlette.requests import Request

    from meshnet_agent.containers.volumes import Volumes


class PruneQuery(msgspec.Struct, frozen=True):
    """Parameters of ``DELETE /v1/volumes``: `all` removes the named ones, too."""

    all: bool = False


def volume_operations(volumes: Volumes) -> list[Operation]:
    """The operations on volumes."""

    async def list_all(_request: Request) -> list[VolumeDocument]:
        return list(map(volume_document, await volumes.all()))

    async def remove(request: Request) -> RemovedVolume:
        name = str(request.path_params["name"])
        await volumes.remove(name)
        return RemovedVolume(name=name)

    async def prune(_request: Request, query: PruneQuery) -> list[RemovedVolume]:
        removed = await volumes.prune(named=query.all)
        return [RemovedVolume(name=name) for name in removed]

    return [
        operation("GET", "/v1/volumes", list_all, answer=list[VolumeDocument]),
        operation("DELETE", "/v1/volumes", prune, query=PruneQuery, answer=list[RemovedVolume]),
        operation("DELETE", "/v1/volumes/{name}", remove, answer=RemovedVolume),
    ]
