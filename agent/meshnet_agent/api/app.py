"""The agent's API: HTTP and JSON on a Unix socket (docs/api.md).

A thin layer: its operations (`meshnet_agent.api.routes`) read a request, call the agent's parts and
build a document.  Errors become ``{"error": {"kind", "message", "exit_status"}}`` with a status
code of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from meshnet.errors import (
    KernelRefusedError,
    MeshnetError,
    NotFoundError,
    StoreUnavailableError,
)
from meshnet_agent.api.bodies import shown_path
from meshnet_agent.api.errors import error_response, exhausted, json_response
from meshnet_agent.api.openapi import describe
from meshnet_agent.api.operation import Operation
from meshnet_agent.api.routes.containers import container_operations
from meshnet_agent.api.routes.endpoints import endpoint_operations
from meshnet_agent.api.routes.execs import exec_operations
from meshnet_agent.api.routes.hosts import host_operations
from meshnet_agent.api.routes.images import image_operations
from meshnet_agent.api.routes.networks import network_operations
from meshnet_agent.api.routes.status import probe_operations, status_operations
from meshnet_agent.api.routes.volumes import volume_operations

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from starlette.requests import Request

    from meshnet_agent.api.reports import Reports
    from meshnet_agent.containers.images import Images
    from meshnet_agent.containers.lifecycle import Containers
    from meshnet_agent.mesh.operations import MeshOperations
    from meshnet_agent.tasks.readiness import Readiness

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The parts of an agent that the API serves.

    Attributes:
        images: this host's images, which need neither the mesh nor the kernel's tables.
        containers: None: this agent does not run containers.
    """

    mesh: MeshOperations
    reports: Reports
    images: Images
    containers: Containers | None = None


def operations_of(served: Served, readiness: Readiness) -> tuple[Operation, ...]:
    """All operations of the API.

    Args:
        readiness: whether the first pass has been applied.
    """

    async def describe_all(_request: Request) -> dict[str, Any]:
        return describe(operations)

    containers = served.containers
    of_containers = (
        [
            *container_operations(containers),
            *exec_operations(containers.execs),
            *volume_operations(containers.volumes),
        ]
        if containers is not None
        else []
    )
    operations: tuple[Operation, ...] = (
        Operation(
            method="GET",
            path="/openapi.json",
            handle=describe_all,
            answer=dict[str, Any],
            always=True,
        ),
        *probe_operations(readiness),
        *network_operations(served.mesh, served.reports),
        *endpoint_operations(served.mesh),
        *host_operations(served.mesh, served.reports),
        *status_operations(served.reports),
        *of_containers,
        *image_operations(served.images),
    )
    return operations


def make_app(operations: Iterable[Operation], readiness: Readiness) -> Starlette:
    """The ASGI application.

    Args:
        readiness: until the agent is ready, operations that are not `always` served answer 503.
    """
    app = Starlette(
        routes=[
            Route(each.path, _guard(each, readiness), methods=[each.method]) for each in operations
        ],
        exception_handlers={404: _no_such_route, 405: _no_such_route},
    )
    # Otherwise a path with one slash too many is redirected, and clients that expect JSON get none.
    app.router.redirect_slashes = False
    return app


def _guard(operation: Operation, readiness: Readiness) -> Callable[[Request], Awaitable[Response]]:
    async def guarded(request: Request) -> Response:
        try:
            if not (operation.always or readiness.ready):
                raise StoreUnavailableError("the agent is still starting: try again in a moment")
            answer = await operation.handle(request)
            return answer if isinstance(answer, Response) else json_response(answer)
        except MeshnetError as error:
            return error_response(error)
        except Exception as error:
            told = exhausted(error) if isinstance(error, OSError) else None
            if told is not None:
                return error_response(told)
            # A bug in one request must not end the agent and stop the upkeep of its networks.
            _log.exception("request failed", path=shown_path(request))
            return error_response(KernelRefusedError("internal error: see the agent's log"))

    return guarded


async def _no_such_route(request: Request, _error_of_starlette: Exception) -> Response:
    return error_response(
        NotFoundError(
            f"{request.method} {shown_path(request)} is not a request of this API: see docs/api.md"
        )
    )
