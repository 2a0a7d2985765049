"""The API's requests on endpoints (docs/api.md)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from meshnet.ports import parse_all_published
from meshnet_agent.api.bodies import AttachBody, DetachBody, PublishBody, attach_request
from meshnet_agent.api.documents.endpoints import (
    AttachedDocument,
    EndpointDocument,
    EndpointsDocument,
    attached_document,
    endpoint_document,
)
from meshnet_agent.api.operation import Operation, operation

if TYPE_CHECKING:
    from starlette.requests import Request

    from meshnet_agent.mesh.operations import MeshOperations


def endpoint_operations(mesh: MeshOperations) -> list[Operation]:
    """The operations on endpoints."""

    async def attach(_request: Request, body: AttachBody) -> AttachedDocument:
        request = attach_request(body)
        started = time.perf_counter()
        endpoint = await mesh.attach(body.pid, request)
        return attached_document(endpoint, (time.perf_counter() - started) * 1000)

    async def detach(_request: Request, body: DetachBody) -> EndpointDocument:
        return endpoint_document(await mesh.detach(body.pid, body.network))

    async def publish(_request: Request, body: PublishBody) -> EndpointDocument:
        ports = parse_all_published(body.ports)
        return endpoint_document(await mesh.publish(body.endpoint, ports))

    async def unpublish(_request: Request, body: PublishBody) -> EndpointDocument:
        return endpoint_document(await mesh.unpublish(body.endpoint, body.ports))

    async def list_all(_request: Request) -> EndpointsDocument:
        found = await mesh.list_endpoints()
        return EndpointsDocument(
            endpoints=[endpoint_document(e) for e in found.endpoints], warning=found.warning
        )

    return [
        operation("POST", "/v1/attach", attach, body=AttachBody, answer=AttachedDocument),
        operation("POST", "/v1/detach", detach, body=DetachBody, answer=EndpointDocument),
        operation("POST", "/v1/publish", publish, body=PublishBody, answer=EndpointDocument),
        operation("POST", "/v1/unpublish", unpublish, body=PublishBody, answer=EndpointDocument),
        operation("GET", "/v1/endpoints", list_all, answer=EndpointsDocument),
    ]
