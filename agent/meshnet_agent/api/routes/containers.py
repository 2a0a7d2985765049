"""The API's requests on containers (docs/api.md), for `meshnet_agent.containers.lifecycle`."""

from __future__ import annotations

import dataclasses
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import msgspec
from starlette.responses import Response, StreamingResponse

from meshnet.runtime.engine.conmon import StartError
from meshnet.runtime.spec.options import ContainerOptions
from meshnet_agent.api.documents.containers import (
    ContainerDetails,
    ContainerDocument,
    EndedDocument,
    NotStartedDocument,
    UsageDocument,
    container_details,
    container_document,
    ended_document,
    not_started_document,
    usage_document,
)
from meshnet_agent.api.operation import Operation, operation
from meshnet_agent.containers.log import read_log

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request
    from starlette.types import Send

    from meshnet_agent.containers.lifecycle import Containers

_LOG = "application/octet-stream"


class SignalRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Body of ``POST /v1/containers/NAME/kill``."""

    signal: str = "KILL"


class StopRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Body of ``POST /v1/containers/NAME/stop``."""

    timeout_s: int | None = None


class LogQuery(msgspec.Struct, frozen=True):
    """Parameters of ``GET /v1/containers/NAME/logs``."""

    follow: bool = False
    tail: Annotated[int, msgspec.Meta(ge=0, description="lines")] | None = None
    since: Annotated[float, msgspec.Meta(ge=0, description="seconds of Unix time")] | None = None


class RemovalQuery(msgspec.Struct, frozen=True):
    """Parameters of ``DELETE /v1/containers/NAME``."""

    force: bool = False
    volumes: bool = False


class ClosingStream(StreamingResponse):
    """Sends the chunks of an async generator, and closes it in the task that ran it.

    Starlette leaves a generator to the garbage collector, where its clean-up cannot await anything:
    trio warns, and a file stays open.
    """

    def __init__(self, chunks: AsyncGenerator[bytes], media_type: str) -> None:
        super().__init__(chunks, media_type=media_type)
        self._chunks = chunks

    async def stream_response(self, send: Send) -> None:
        """Send all chunks; cancelled if the client goes away."""
        async with aclosing(self._chunks):
            await super().stream_response(send)


def _name_of(request: Request) -> str:
    return str(request.path_params["name"])


def telling_status(starts: Operation) -> Operation:
    """The operation, with an answer to a failed start: the exit status for the client."""

    async def handle(request: Request) -> object:
        try:
            return await starts.handle(request)
        except StartError as error:
            # An ordinary answer: 125 to 127 are not exit statuses of an error of the API.
            return not_started_document(error)

    answers = (starts.answer, NotStartedDocument)
    return dataclasses.replace(starts, handle=handle, answer=answers)


def container_operations(containers: Containers) -> list[Operation]:
    """The operations on containers."""
    return [*_looking(containers), *_starting(containers), *_ending(containers)]


def _looking(containers: Containers) -> list[Operation]:
    async def list_all(_request: Request) -> list[ContainerDocument]:
        return list(map(container_document, containers.all()))

    async def inspect(request: Request) -> ContainerDetails:
        return container_details(containers.inspect(_name_of(request)))

    async def stats(request: Request) -> UsageDocument:
        return usage_document(*await containers.usage(_name_of(request)))

    async def logs(request: Request, query: LogQuery) -> Response:
        container = containers.directory.find(_name_of(request))
        body = read_log(container, follow=query.follow, tail=query.tail, since_s=query.since)
        return ClosingStream(body, _LOG)

    return [
        operation("GET", "/v1/containers", list_all, answer=list[ContainerDocument]),
        operation("GET", "/v1/containers/{name}", inspect, answer=ContainerDetails),
        operation("GET", "/v1/containers/{name}/stats", stats, answer=UsageDocument),
        operation(
            "GET", "/v1/containers/{name}/logs", logs, query=LogQuery, answer=None, media=_LOG
        ),
    ]


def _starting(containers: Containers) -> list[Operation]:
    async def create(_request: Request, options: ContainerOptions) -> ContainerDetails:
        return container_details(await containers.create(options))

    async def start(request: Request) -> ContainerDocument:
        return container_document(await containers.start(_name_of(request)))

    async def prepare(request: Request) -> ContainerDetails:
        return container_details(await containers.prepare(_name_of(request)))

    async def restart(request: Request, wanted: StopRequest) -> ContainerDocument:
        return container_document(await containers.restart(_name_of(request), wanted.timeout_s))

    one = "/v1/containers/{name}"
    found = [
        operation("POST", "/v1/containers", create, body=ContainerOptions, answer=ContainerDetails),
        operation("POST", f"{one}/start", start, answer=ContainerDocument),
        operation("POST", f"{one}/prepare", prepare, answer=ContainerDetails),
        operation("POST", f"{one}/restart", restart, body=StopRequest, answer=ContainerDocument),
    ]
    return list(map(telling_status, found))


def _ending(containers: Containers) -> list[Operation]:
    async def stop(request: Request, wanted: StopRequest) -> ContainerDocument:
        return container_document(await containers.stop(_name_of(request), wanted.timeout_s))

    async def kill(request: Request, wanted: SignalRequest) -> ContainerDocument:
        return container_document(await containers.kill(_name_of(request), wanted.signal))

    async def wait(request: Request) -> EndedDocument:
        return ended_document(await containers.wait(_name_of(request)))

    async def remove(request: Request, query: RemovalQuery) -> ContainerDocument:
        name = _name_of(request)
        removed = await containers.remove(name, force=query.force, volumes=query.volumes)
        return container_document(removed)

    one = "/v1/containers/{name}"
    return [
        operation("POST", f"{one}/stop", stop, body=StopRequest, answer=ContainerDocument),
        operation("POST", f"{one}/kill", kill, body=SignalRequest, answer=ContainerDocument),
        operation("GET", f"{one}/wait", wait, answer=EndedDocument),
        operation("DELETE", one, remove, query=RemovalQuery, answer=ContainerDocument),
    ]
