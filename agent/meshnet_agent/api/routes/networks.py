"""The API's requests on networks (docs/api.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet_agent.api.bodies import NetworkBody, network_builder
from meshnet_agent.api.documents.networks import (
    CreatedNetworkDocument,
    InspectedNetworkDocument,
    NetworkDocument,
    RemovedNetworkDocument,
    created_document,
    inspected_document,
    network_document,
)
from meshnet_agent.api.operation import Operation, operation

if TYPE_CHECKING:
    from starlette.requests import Request

    from meshnet_agent.api.reports import Reports
    from meshnet_agent.mesh.operations import MeshOperations


def network_operations(mesh: MeshOperations, reports: Reports) -> list[Operation]:
    """The operations on networks."""

    async def list_all(_request: Request) -> list[NetworkDocument]:
        return [network_document(network, mtu) for network, mtu in reports.networks()]

    async def create(_request: Request, body: NetworkBody) -> CreatedNetworkDocument:
        build = network_builder(body)
        return created_document(await mesh.create_network(build, body.vni))

    async def inspect(request: Request) -> InspectedNetworkDocument:
        return inspected_document(await reports.network(request.path_params["name"]))

    async def remove(request: Request) -> RemovedNetworkDocument:
        name = request.path_params["name"]
        await mesh.remove_network(name)
        return RemovedNetworkDocument(name=name)

    every, one = "/v1/networks", "/v1/networks/{name}"
    return [
        operation("GET", every, list_all, answer=list[NetworkDocument]),
        operation("POST", every, create, body=NetworkBody, answer=CreatedNetworkDocument),
        operation("GET", one, inspect, answer=InspectedNetworkDocument),
        operation("DELETE", one, remove, answer=RemovedNetworkDocument),
    ]
