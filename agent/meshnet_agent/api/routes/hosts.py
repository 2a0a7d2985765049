"""The API's requests on hosts (docs/api.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.model import HostId
from meshnet_agent.api.documents.hosts import (
    HostDocument,
    RemovedHostDocument,
    host_document,
    paths_to,
    removed_host_document,
)
from meshnet_agent.api.operation import Operation, operation
from meshnet_agent.api.reports import Reports, let_others_run

if TYPE_CHECKING:
    from starlette.requests import Request

    from meshnet_agent.mesh.operations import MeshOperations


def host_operations(mesh: MeshOperations, reports: Reports) -> list[Operation]:
    """The operations on hosts."""

    async def list_all(_request: Request) -> list[HostDocument]:
        paths = reports.paths()
        documents = []
        for number, (_, host) in enumerate(sorted(paths.snapshot.hosts.items())):
            await let_others_run(number)
            found = paths_to(host, paths)
            dead_s = paths.dead_for_s.get(host.id)
            documents.append(host_document(host, paths.snapshot, *found, dead_s=dead_s))
        return documents

    async def remove(request: Request) -> RemovedHostDocument:
        host = HostId(request.path_params["id"])
        return removed_host_document(host, await mesh.remove_host(host))

    return [
        operation("GET", "/v1/hosts", list_all, answer=list[HostDocument]),
        operation("DELETE", "/v1/hosts/{id}", remove, answer=RemovedHostDocument),
    ]
