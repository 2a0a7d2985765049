"""The API's requests on endpoints (docs/api.md)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from meshnet.errors import UsageError
from meshnet.ports import parse_all_published
from meshnet_agent.api.bodies import (
    AttachBody,
    CollectBody,
    DetachBody,
    PublishBody,
    ReleaseBody,
    attach_request,
)
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
        if body.netns is not None and body.pid is None:
            endpoint = await mesh.attach_bound(body.netns.value, body.owner, request)
        elif body.pid is not None and body.netns is None and body.owner is None:
            endpoint = await mesh.attach(body.pid, request)
        else:
            raise UsageError("an attach takes a pid, or a netns with or without an owner")
        took_ms = (time.perf_counter() - started) * 1000
        return attached_document(endpoint, took_ms, mesh.warn_of(endpoint.network))

    async def detach(_request: Request, body: DetachBody) -> EndpointDocument:
        if body.netns is not None and body.pid is None:
            return endpoint_document(await mesh.detach_bound(body.netns.value, body.network))
        if body.pid is not None and body.netns is None:
            return endpoint_document(await mesh.detach(body.pid, body.network))
        raise UsageError("a detach takes a pid, or a netns")

    async def release(_request: Request, body: ReleaseBody) -> list[EndpointDocument]:
        return list(map(endpoint_document, await mesh.release(body.owner, body.network)))

    async def collect(_request: Request, body: CollectBody) -> list[EndpointDocument]:
        return list(map(endpoint_document, await mesh.collect(body.prefix, body.valid)))

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
        operation("POST", "/v1/release", release, body=ReleaseBody, answer=list[EndpointDocument]),
        operation("POST", "/v1/collect", collect, body=CollectBody, answer=list[EndpointDocument]),
        operation("POST", "/v1/publish", publish, body=PublishBody, answer=EndpointDocument),
        operation("POST", "/v1/unpublish", unpublish, body=PublishBody, answer=EndpointDocument),
        operation("GET", "/v1/endpoints", list_all, answer=EndpointsDocument),
    ]
