"""The API's requests on programs in containers, for `meshnet_agent.containers.execs`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.runtime.spec.options import ContainerOptions
from meshnet_agent.api.documents.containers import (
    ExecDocument,
    ExecEndedDocument,
    ExecStartedDocument,
    exec_document,
)
from meshnet_agent.api.operation import Operation, operation
from meshnet_agent.api.routes.containers import telling_status

if TYPE_CHECKING:
    from starlette.requests import Request

    from meshnet_agent.containers.execs import ExecSessions


def exec_operations(sessions: ExecSessions) -> list[Operation]:
    """The operations on programs; their `name` is that of the container, or the program's id."""

    async def create(request: Request, wanted: ContainerOptions) -> ExecDocument:
        return exec_document(await sessions.create(request.path_params["name"], wanted))

    async def start(request: Request) -> ExecStartedDocument:
        return ExecStartedDocument(pid=await sessions.start(request.path_params["name"]))

    async def wait(request: Request) -> ExecEndedDocument:
        return ExecEndedDocument(exit_code=await sessions.wait(request.path_params["name"]))

    return [
        operation(
            "POST",
            "/v1/containers/{name}/exec",
            create,
            body=ContainerOptions,
            answer=ExecDocument,
        ),
        telling_status(
            operation("POST", "/v1/exec/{name}/start", start, answer=ExecStartedDocument)
        ),
        operation("GET", "/v1/exec/{name}/wait", wait, answer=ExecEndedDocument),
    ]
