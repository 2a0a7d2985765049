"""Requests to the agent's API: the real application, its agent on fakes."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshnet.store import Put
from meshnet_agent.api.app import Served, make_app, operations_of
from meshnet_agent.api.openapi import describe
from meshnet_agent.api.reports import Reports
from meshnet_agent.containers.images import Images
from meshnet_agent.containers.runtime import RuntimeProvider
from meshnet_agent.daemon import make_operations, report_sources
from meshnet_agent.tasks.readiness import Readiness
from tests.hostile.campaign import (
    TEXTS,
    Campaign,
    assert_clear,
    damage_bytes,
    damaged,
    hostile_value,
    spell,
)
from tests.hostile.store import KEYS, KINDS
from tests.unit.mesh import open_mesh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from random import Random

    from starlette.applications import Starlette
    from starlette.types import Message

    from tests.hostile.campaign import Check
    from tests.unit.mesh import Mesh, Node

_GOOD: dict[str, dict[str, Any]] = {
    "NetworkBody": {"name": "prod", "subnets": ["10.42.0.0/16", "fd00:42::/48"], "vni": 9},
    "AttachBody": {"pid": os.getppid(), "network": "prod", "ip": "10.42.0.9", "name": "web"},
    "DetachBody": {"pid": os.getppid(), "network": "prod"},
}
_WORDS = ("prod", "h1", "h2", "dev", "openapi.json", "..", "%2e%2e")
_METHODS = ("GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "PATCH", "BREW", "get", "")
_HEADERS = (
    *((b"host", b"["), (b"host", b"\xff"), (b"host", b"a]b"), (b"content-type", b"text/html")),
    *((b"content-length", b"-1"), (b"transfer-encoding", b"x"), (b"content-encoding", b"gzip")),
    *((b"cookie", b"a=b; " * 500), (b"expect", b"100-continue"), (b"x-http-method", b"DELETE")),
)
_SETTLED_S = 30
"""How long after a write behind its back the agent still writes itself."""
_ENDPOINT_KEY = "/meshnet/v1/endpoints/prod/h9/0123456789ab"


class _Requests:
    """Makes requests from the application's own description of itself."""

    def __init__(self) -> None:
        document = _description()
        self._schemas = document["components"]["schemas"]
        self._operations = [
            (path, method.upper(), _reference(operation))
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        ]

    def make(self, random: Random) -> bytes:
        """A request as JSON: method, path, headers, chunks of the body; or a key put into etcd."""
        if random.randrange(12) == 0:
            return json.dumps(_make_put(random)).encode()
        path, method, schema = random.choice(self._operations)
        for name in ("{name}", "{id}"):
            path = path.replace(name, random.choice(_WORDS if random.randrange(3) else TEXTS))
        match random.randrange(12):
            case 0:
                method = random.choice(_METHODS)
            case 1:
                path += random.choice(("/", "//", "?x=1", "/x", "\0", "é", "x" * 5000))
        body = self._body(random, schema) if schema or random.randrange(8) == 0 else b""
        cut = random.randrange(len(body) + 1)
        chunks = [body] if random.randrange(3) else [body[:cut], body[cut:]]
        headers = [random.choice(_HEADERS) for _ in range(random.choice((0, 0, 0, 1, 2)))]
        return json.dumps(
            {
                "method": method,
                # A server decodes paths and puts U+FFFD for what is not UTF-8.
                "path": path.encode("utf-8", "replace").decode(),
                "headers": [[_text(name), _text(value)] for name, value in headers],
                "chunks": [_text(chunk) for chunk in chunks],
                "broken_off": random.randrange(30) == 0,
            }
        ).encode()

    def _body(self, random: Random, schema: str | None) -> bytes:
        match random.randrange(6):
            case 0 if schema:
                properties = self._schemas[schema]["properties"]
                return spell({k: hostile_value(random) for k in properties if random.randrange(3)})
            case 1:
                return damage_bytes(random, spell(_GOOD.get(schema or "", {})))
            case 2:
                return spell(_GOOD.get(schema or "", {}))
            case _:
                return damaged(random, _GOOD.get(schema or "", {}))[:100_000]


def _make_put(random: Random) -> dict[str, str]:
    key, value = random.choice(list(KEYS.items()))
    if random.randrange(2):
        key, value = _ENDPOINT_KEY, KINDS[-1][0][0]
    if random.randrange(5) == 0:
        key = "/meshnet/v1/mesh/hosts/\udcff\n"
    return {"key": key, "value": _text(damaged(random, json.loads(value))[:66_000])}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _description() -> dict[str, Any]:
    nothing = cast("Any", None)
    served = Served(mesh=nothing, reports=nothing, images=nothing)
    return describe(operations_of(served, Readiness()))


def _reference(operation: dict[str, Any]) -> str | None:
    if "requestBody" not in operation:
        return None
    reference: str = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return reference.rpartition("/")[2]


async def exchange(
    app: Starlette,
    method: str,
    path: str,
    headers: list[tuple[bytes, bytes]] | None = None,
    chunks: list[bytes] | None = None,
    *,
    broken_off: bool = False,
) -> tuple[int, Any]:
    """One request as the server makes it; returns status and document."""
    waiting: list[Message] = [
        {"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks or []
    ]
    waiting.append(
        {"type": "http.disconnect"} if broken_off else {"type": "http.request", "body": b""}
    )
    sent: list[Message] = []

    async def receive() -> Message:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers or [],
        "server": ("agent.sock", None),
        "client": None,
    }
    await app(scope, receive, send)
    start, *bodies = sent
    assert dict(start["headers"])[b"content-type"] == b"application/json"
    return start["status"], json.loads(b"".join(b.get("body", b"") for b in bodies))


def _state(node: Node) -> object:
    """All that a request may change."""
    keys = {k: v.value for k, v in node.store._database.keys.items()}
    return keys, node.kernel.dump(), node.running.endpoints.all


async def _try(mesh: Mesh, app: Starlette, data: bytes) -> str:
    request = json.loads(data)
    node = mesh.nodes[0]
    if "key" in request:
        raw = base64.b64decode(request["value"])
        await mesh.store.commit([], [Put(request["key"], raw)])
        await trio.sleep(_SETTLED_S)  # by the clock that jumps
        status, document = await exchange(app, "GET", "/v1/status")
        assert status == 200, document
        return "put"
    await wait_all_tasks_blocked()
    before = _state(node)
    with _no_jumps() if request["path"].startswith("/v1/images") else contextlib.nullcontext():
        status, document = await exchange(
            app,
            request["method"],
            request["path"],
            [(base64.b64decode(n), base64.b64decode(v)) for n, v in request["headers"]],
            [base64.b64decode(chunk) for chunk in request["chunks"]],
            broken_off=request["broken_off"],
        )
    assert status != 500, document
    if status < 400:
        return str(status)
    assert document.keys() == {"error"}
    error = document["error"]
    assert error.keys() == {"kind", "message", "exit_status"}
    assert_clear(error["message"])
    assert isinstance(error["exit_status"], int)
    await wait_all_tasks_blocked()
    assert _state(node) == before
    return str(status)


@contextlib.contextmanager
def _no_jumps() -> Iterator[None]:
    """For what waits for a child: until that has started, the clock would jump through an hour, and
    the agent do all that it does in one."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, MockClock)
    threshold, clock.autojump_threshold = clock.autojump_threshold, math.inf
    try:
        yield
    finally:
        clock.autojump_threshold = threshold


@asynccontextmanager
async def _open() -> AsyncIterator[Check]:
    with tempfile.TemporaryDirectory(prefix="meshnet-hostile-") as directory:
        async with open_mesh(Path(directory)) as mesh:
            await mesh.create_network()
            await mesh.start_many(1)
            images = Images(Path(directory, "images"), max_bytes=1 << 20, max_entries=100)
            agent = mesh.nodes[0].running
            served = Served(
                mesh=make_operations(agent),
                reports=Reports(report_sources(agent, RuntimeProvider(Path(directory, "oci")))),
                images=images,
            )
            app = make_app(operations_of(served, agent.readiness), agent.readiness)

            async def check(data: bytes) -> str:
                return await _try(mesh, app, data)

            yield check


API = Campaign("api", _Requests().make, _open, 150)
