"""The API's requests on containers (docs/api.md), for `meshnet_agent.containers.lifecycle`."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.responses import Response, StreamingResponse

from meshnet.errors import UsageError
from meshnet.runtime.engine.conmon import StartError
from meshnet.runtime.engine.oci_runtime import exit_status_of
from meshnet.runtime.spec.options import ContainerOptions
from meshnet_agent.api.bodies import convert, read_body, shown_path
from meshnet_agent.api.openapi import takes
from meshnet_agent.containers.log import read_log

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.datastructures import QueryParams
    from starlette.requests import Request
    from starlette.routing import Route

    from meshnet_agent.containers.execs import ExecSessions
    from meshnet_agent.containers.lifecycle import Containers

    Handler = Callable[[Request], Awaitable[object]]
    MakeRoute = Callable[[str, str, Handler], Route]

_T = TypeVar("_T", int, float)
_FIELDS = frozenset(f.name for f in fields(ContainerOptions))


class SignalRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /v1/containers/NAME/kill``."""

    signal: str = "KILL"


class StopRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /v1/containers/NAME/stop``."""

    timeout_s: int | None = None


def _number(query: QueryParams, key: str, kind: Callable[[str], _T], remedy: str) -> _T | None:
    """A number, 0 or more, of a query that may have none."""
    text = query.get(key)
    if text is None:
        return None
    try:
        number = kind(text)
        if number >= 0:
            return number
    except ValueError:
        pass
    raise UsageError(f"{key} {text[:40]!r} is not usable: give {remedy}")


def container_routes(
    containers: Containers, sessions: ExecSessions, route: MakeRoute
) -> list[Route]:
    """The routes; `route` guards a handler."""

    async def options_of(request: Request) -> ContainerOptions:
        document = await read_body(request, dict[str, Any])
        for unknown in document.keys() - _FIELDS:
            raise UsageError(f"a container has no option {unknown!r}: see docs/api.md")
        return convert(document, ContainerOptions, shown_path(request))

    def name_of(request: Request) -> str:
        return str(request.path_params["name"])

    async def list_all(_request: Request) -> object:
        return containers.documents()

    @takes(ContainerOptions)
    async def create(request: Request) -> object:
        return await containers.create(await options_of(request))

    async def inspect(request: Request) -> object:
        return containers.inspect(name_of(request))

    async def remove(request: Request) -> object:
        force = request.query_params.get("force") == "1"
        volumes = request.query_params.get("volumes") == "1"
        return await containers.remove(name_of(request), force=force, volumes=volumes)

    async def start(request: Request) -> object:
        return await containers.start(name_of(request))

    async def prepare(request: Request) -> object:
        return await containers.prepare(name_of(request))

    @takes(StopRequest)
    async def restart(request: Request) -> object:
        wanted = await read_body(request, StopRequest)
        return await containers.restart(name_of(request), wanted.timeout_s)

    @takes(StopRequest)
    async def stop(request: Request) -> object:
        wanted = await read_body(request, StopRequest)
        return await containers.stop(name_of(request), wanted.timeout_s)

    @takes(SignalRequest)
    async def kill(request: Request) -> object:
        wanted = await read_body(request, SignalRequest)
        return await containers.kill(name_of(request), wanted.signal)

    async def wait(request: Request) -> object:
        return await containers.wait(name_of(request))

    async def stats(request: Request) -> object:
        return await containers.stats(name_of(request))

    async def logs(request: Request) -> Response:
        container = containers.registry.find(name_of(request))
        query = request.query_params
        tail = _number(query, "tail", int, "a number of lines")
        since_s = _number(query, "since", float, "seconds of Unix time")
        body = read_log(container, follow=query.get("follow") == "1", tail=tail, since_s=since_s)
        return StreamingResponse(body, media_type="application/octet-stream")

    @takes(ContainerOptions)
    async def exec_create(request: Request) -> object:
        return await sessions.create(name_of(request), await options_of(request))

    async def exec_start(request: Request) -> object:
        return await sessions.start(name_of(request))

    async def exec_wait(request: Request) -> object:
        return await sessions.wait(name_of(request))

    def telling_status(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def told(request: Request) -> object:
            try:
                return await handler(request)
            except StartError as error:
                # An ordinary answer: these statuses are not those of an error of the API.
                return {"failed": str(error), "exit_status": exit_status_of(str(error))}

        return told

    one = "/v1/containers/{name}"
    return [
        route("/v1/containers", "GET", list_all),
        route("/v1/containers", "POST", telling_status(create)),
        route(one, "GET", inspect),
        route(one, "DELETE", remove),
        route(f"{one}/start", "POST", telling_status(start)),
        route(f"{one}/prepare", "POST", telling_status(prepare)),
        route(f"{one}/restart", "POST", telling_status(restart)),
        route(f"{one}/stop", "POST", stop),
        route(f"{one}/kill", "POST", kill),
        route(f"{one}/wait", "GET", wait),
        route(f"{one}/stats", "GET", stats),
        route(f"{one}/logs", "GET", logs),
        route(f"{one}/exec", "POST", exec_create),
        route("/v1/exec/{name}/start", "POST", telling_status(exec_start)),
        route("/v1/exec/{name}/wait", "GET", exec_wait),
    ]
