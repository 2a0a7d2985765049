"""The agent's API: HTTP and JSON on a Unix socket (docs/api.md).

A thin layer: reads a request, calls `meshnet_agent.api.service`, writes its document.  Errors
become ``{"error": {"kind", "message", "exit_status"}}`` with a status code of their own.
"""

from __future__ import annotations

import errno
import functools
import os
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route

from meshnet.errors import (
    ConflictError,
    KernelRefusedError,
    MeshnetError,
    NotFoundError,
    PolicyRefusedError,
    PoolExhaustedError,
    StoreUnavailableError,
    UsageError,
)
from meshnet.model import (
    DEFAULT_HOST_PREFIX,
    DEFAULT_HOST_PREFIX6,
    AddressRange,
    IpAddress,
    IpNetwork,
    Mode,
    Network,
    NetworkName,
    Vni,
    default_port,
)
from meshnet.ports import parse_all_published
from meshnet.runtime.spec.options import NO_NETWORKS
from meshnet.text import parse_address, parse_network, printable
from meshnet_agent.api.bodies import read_body, shown_path
from meshnet_agent.api.openapi import describe, takes
from meshnet_agent.api.routes.containers import container_routes
from meshnet_agent.containers.execs import ExecSessions
from meshnet_agent.containers.volumes import volume_routes
from meshnet_agent.endpoints.request import AttachRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from meshnet_agent.api.service import Service
    from meshnet_agent.containers.images import Images
    from meshnet_agent.containers.lifecycle import Containers

_log = structlog.get_logger()

_STATUS_CODES: dict[type[MeshnetError], int] = {
    UsageError: 400,
    PolicyRefusedError: 403,
    NotFoundError: 404,
    ConflictError: 409,
    PoolExhaustedError: 507,
    KernelRefusedError: 500,
    StoreUnavailableError: 503,
}

_EXHAUSTED = {
    errno.EMFILE: "the agent has as many files open as it may: raise its limit (LimitNOFILE= of "
    "the unit) and restart it",
    errno.ENFILE: "this machine has as many files open as it may: raise fs.file-max",
    errno.ENOMEM: "this machine, or the agent's cgroup, is out of memory",
}
"""What a call may run out of anywhere, and the remedy."""


_Pid = Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]
"""linux/threads.h: PID_MAX_LIMIT."""


class NetworkRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /v1/networks``."""

    name: str
    subnets: list[str]
    mode: Mode = Mode.VXLAN
    host_prefix: int | None = None
    host_prefix6: int | None = None
    vni: int | None = None
    port: int | None = None
    mtu: int | None = None
    direct_routing: bool = False
    fallback: Literal["auto", "never"] = "never"
    parent: str | None = None
    ranges: list[str] = []
    gateways: list[str] = []
    internal: bool = False
    host_access: bool = False


class EndpointRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /v1/attach``."""

    pid: _Pid
    network: str
    ifname: str = "eth0"
    ip: str | None = None
    name: str | None = None
    default_route: bool = True
    publish: list[str] = []


class DetachRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /v1/detach``."""

    pid: _Pid
    network: str


class PublishRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of ``POST /v1/publish`` and of ``POST /v1/unpublish``."""

    endpoint: str
    ports: list[str]


_LONGEST_MESSAGE = 1000
"""Characters of what a request said that are repeated, and of a whole message."""


def make_app(
    service: Service, is_ready: Callable[[], bool], containers: Containers | None = None
) -> Starlette:
    """The ASGI application.

    Args:
        is_ready: whether the first pass has been applied; until then requests that need the mesh
            get 503.
    """

    def route(path: str, method: str, handler: Callable[[Request], Awaitable[object]]) -> Route:
        return Route(path, _guard(handler, is_ready), methods=[method])

    handlers = _Handlers(service)
    app = Starlette(
        routes=[
            Route("/openapi.json", lambda request: _json(describe(request.app.routes))),
            Route("/healthz", lambda _: _json({"status": "ok"})),
            Route("/readyz", lambda _: _ready(is_ready())),
            route("/v1/networks", "GET", handlers.list_networks),
            route("/v1/networks", "POST", handlers.create_network),
            route("/v1/networks/{name}", "GET", handlers.inspect_network),
            route("/v1/networks/{name}", "DELETE", handlers.remove_network),
            route("/v1/attach", "POST", handlers.attach),
            route("/v1/detach", "POST", handlers.detach),
            route("/v1/publish", "POST", handlers.publish),
            route("/v1/unpublish", "POST", handlers.unpublish),
            route("/v1/endpoints", "GET", handlers.list_endpoints),
            route("/v1/hosts", "GET", handlers.list_hosts),
            route("/v1/hosts/{id}", "DELETE", handlers.remove_host),
            route("/v1/status", "GET", handlers.status),
            *(
                [
                    *container_routes(containers, ExecSessions(containers), route),
                    *volume_routes(containers.volumes, route),
                ]
                if containers is not None
                else []
            ),
            route("/v1/images", "GET", handlers.list_images),
            route("/v1/images", "POST", handlers.load_images),
            # Names of images have slashes.
            route("/v1/images/{image:path}", "GET", handlers.inspect_image),
            route("/v1/images/{image:path}", "DELETE", handlers.remove_image),
            route("/v1/archives/{image:path}", "GET", handlers.export_image),
        ],
        exception_handlers={404: _no_such_route, 405: _no_such_route},
    )
    app.router.redirect_slashes = False
    return app


class _Handlers:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def list_networks(self, _request: Request) -> object:
        return self._service.network_documents()

    @takes(NetworkRequest)
    async def create_network(self, request: Request) -> object:
        wanted = await read_body(request, NetworkRequest)
        subnets = sorted((_cidr(s) for s in wanted.subnets), key=lambda s: s.version)
        _check_given(wanted, subnets)

        def build(vni: Vni) -> Network:
            return Network(
                name=NetworkName(wanted.name),
                mode=wanted.mode,
                subnets=tuple(subnets),
                vni=vni,
                port=wanted.port if wanted.port is not None else default_port(wanted.mode, vni),
                host_prefix=_given(wanted.host_prefix, DEFAULT_HOST_PREFIX),
                host_prefix6=_given(wanted.host_prefix6, DEFAULT_HOST_PREFIX6),
                mtu_bytes=wanted.mtu,
                direct_routing=wanted.direct_routing,
                fallback=wanted.fallback == "auto",
                parent=wanted.parent,
                ranges=tuple(sorted(map(_range, wanted.ranges), key=lambda r: r.version)),
                gateways=tuple(sorted(map(_address, wanted.gateways), key=lambda g: g.version)),
                internal=wanted.internal,
                host_access=wanted.host_access,
            )

        return await self._service.create_network(build, wanted.vni)

    async def inspect_network(self, request: Request) -> object:
        return await self._service.inspect_network(request.path_params["name"])

    async def remove_network(self, request: Request) -> object:
        await self._service.remove_network(request.path_params["name"])
        return {"name": request.path_params["name"]}

    @takes(EndpointRequest)
    async def attach(self, request: Request) -> object:
        wanted = await read_body(request, EndpointRequest)
        return await self._service.attach(
            wanted.pid,
            AttachRequest(
                network=wanted.network,
                ifname=wanted.ifname,
                ip=_address(wanted.ip) if wanted.ip is not None else None,
                name=wanted.name,
                default_route=wanted.default_route,
                publish=parse_all_published(wanted.publish),
            ),
        )

    @takes(DetachRequest)
    async def detach(self, request: Request) -> object:
        wanted = await read_body(request, DetachRequest)
        return await self._service.detach(wanted.pid, wanted.network)

    @takes(PublishRequest)
    async def publish(self, request: Request) -> object:
        wanted = await read_body(request, PublishRequest)
        return await self._service.publish(wanted.endpoint, parse_all_published(wanted.ports))

    @takes(PublishRequest)
    async def unpublish(self, request: Request) -> object:
        wanted = await read_body(request, PublishRequest)
        return await self._service.unpublish(wanted.endpoint, wanted.ports)

    async def list_endpoints(self, _request: Request) -> object:
        return await self._service.endpoint_documents()

    async def list_hosts(self, _request: Request) -> object:
        return await self._service.host_documents()

    async def remove_host(self, request: Request) -> object:
        return await self._service.remove_host(request.path_params["id"])

    async def status(self, _request: Request) -> object:
        return await self._service.status_document()

    async def list_images(self, _request: Request) -> object:
        return await self._service.images.documents()

    async def load_images(self, request: Request) -> object:
        return await self._service.images.load(_chunks(request), request.query_params.get("name"))

    async def inspect_image(self, request: Request) -> object:
        return await self._service.images.inspect(request.path_params["image"])

    async def remove_image(self, request: Request) -> object:
        return await self._service.images.remove(request.path_params["image"])

    async def export_image(self, request: Request) -> object:
        image = request.path_params["image"]
        await self._service.images.inspect(image)  # or the error, while there is still time
        return _ArchiveResponse(self._service.images, image)


class _ArchiveResponse(Response):
    """Streams an image as a tar."""

    media_type = "application/x-tar"

    def __init__(self, images: Images, image: str) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._images = images
        self._image = image

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        async def write(chunk: bytes) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._images.export(self._image, write)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _guard(
    handler: Callable[[Request], Awaitable[object]], is_ready: Callable[[], bool]
) -> Callable[[Request], Awaitable[Response]]:
    @functools.wraps(handler)
    async def guarded(request: Request) -> Response:
        try:
            if not is_ready():
                raise StoreUnavailableError("the agent is still starting: try again in a moment")
            answer = await handler(request)
            return answer if isinstance(answer, Response) else _json(answer)
        except MeshnetError as error:
            return _error(error)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _EXHAUSTED:
                return _error(_exhausted(error))
            # The agent must outlive a bug in one request; the next pass and the log tell of it.
            _log.exception("request failed", path=shown_path(request))
            return _error(KernelRefusedError("internal error: see the agent's log"))

    return guarded


async def _no_such_route(request: Request, _error_of_starlette: Exception) -> Response:
    return _error(
        NotFoundError(
            f"{request.method} {shown_path(request)} is no request of this API: see docs/api.md"
        )
    )


def _error(error: MeshnetError) -> Response:
    kind = next((c for c in type(error).__mro__ if c in _STATUS_CODES), KernelRefusedError)
    document = {
        "kind": kind.__name__,
        "message": printable(str(error), _LONGEST_MESSAGE),
        "exit_status": error.exit_status,
    }
    return _json({"error": document}, _STATUS_CODES.get(kind, 500))


def _exhausted(error: OSError) -> KernelRefusedError:
    return KernelRefusedError(f"{error}: {_EXHAUSTED[error.errno or errno.EMFILE]}")


def raw_refusal(code: int) -> bytes:
    """The HTTP response to a client that cannot be taken, given the errno of accept(2)."""
    code = code if code in _EXHAUSTED else errno.EMFILE
    body = _error(_exhausted(OSError(code, os.strerror(code)))).body
    head = (
        "HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + bytes(body)


def _ready(ready: bool) -> Response:
    return _json({"ready": ready}, 200 if ready else 503)


def _json(document: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status, media_type="application/json")


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect as error:
        raise UsageError("the archive was cut off while it was sent: send it again") from error


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _check_given(wanted: NetworkRequest, subnets: list[IpNetwork]) -> None:
    """Refuse settings of a new network that have no effect, and names that mean something else.

    Raises:
        UsageError: says what.
    """
    if wanted.name in NO_NETWORKS:
        raise UsageError(
            f"network name {wanted.name} is a word of meshnet run --net: choose another"
        )
    for option, value in (
        ("--port", wanted.port),
        ("--host-prefix", wanted.host_prefix),
        ("--host-prefix6", wanted.host_prefix6),
    ):
        if value is not None and not wanted.mode.is_overlay:
            raise UsageError(f"mode {wanted.mode} has no {option}: it is for modes vxlan and udp")
    for option, value, version in (
        ("--host-prefix", wanted.host_prefix, 4),
        ("--host-prefix6", wanted.host_prefix6, 6),
    ):
        if value is not None and version not in {s.version for s in subnets}:
            raise UsageError(
                f"{option} {value} is of a subnet of IPv{version}, which {wanted.name} has not"
            )


def _cidr(text: str) -> IpNetwork:
    try:
        return parse_network(text)
    except ValueError as error:
        raise UsageError(
            f"subnet {text!r} is not usable ({error}): give a CIDR such as 10.42.0.0/16"
        ) from error


def _range(text: str) -> AddressRange:
    first, _, last = text.partition("-")
    try:
        return AddressRange(parse_address(first), parse_address(last))
    except ValueError as error:
        raise UsageError(
            f"range {text!r} is not usable ({error}): give the first and the last address, such as "
            "192.0.2.100-192.0.2.199"
        ) from error


def _address(text: str) -> IpAddress:
    try:
        return parse_address(text)
    except ValueError as error:
        raise UsageError(
            f"address {text!r} is not an IP address: give one such as 10.42.1.7"
        ) from error
