"""The API's requests on how this host's agent is doing (docs/api.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet_agent.api.documents.errors import HealthDocument, ReadyDocument
from meshnet_agent.api.documents.status import StatusDocument
from meshnet_agent.api.errors import json_response
from meshnet_agent.api.operation import Operation, operation
from meshnet_agent.api.status import status_document

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from meshnet_agent.api.reports import Reports
    from meshnet_agent.tasks.readiness import Readiness


def status_operations(reports: Reports) -> list[Operation]:
    """The operation behind ``meshnet status``."""

    async def status(_request: Request) -> StatusDocument:
        return status_document(await reports.status())

    return [operation("GET", "/v1/status", status, answer=StatusDocument)]


def probe_operations(readiness: Readiness) -> list[Operation]:
    """The operations for probes, answered even while the agent is not ready."""

    async def health(_request: Request) -> HealthDocument:
        return HealthDocument()

    async def ready(_request: Request) -> Response:
        return json_response(ReadyDocument(ready=readiness.ready), 200 if readiness.ready else 503)

    return [
        Operation(method="GET", path="/healthz", handle=health, answer=HealthDocument, always=True),
        Operation(
            method="GET",
            path="/readyz",
            handle=ready,
            answer=ReadyDocument,
            otherwise={503: ReadyDocument},
            always=True,
        ),
    ]
