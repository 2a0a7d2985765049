"""The API's description of itself, and what a server hands over that no client of ours sends."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest
import structlog
from starlette.routing import Route
from structlog.testing import capture_logs

from meshnet_agent.api.app import Served, make_app, operations_of
from meshnet_agent.api.openapi import describe
from meshnet_agent.logs import configure_logs
from meshnet_agent.tasks.readiness import Readiness
from tests.hostile.api import exchange

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.applications import Starlette

    from meshnet_agent.api.operation import Operation

_DOCS = Path(__file__).parents[4] / "docs" / "api.md"


def make_api(*, mesh: object = None, reports: object = None, containers: object = None) -> Api:
    """The API of these parts, ready."""
    served = Served(
        mesh=cast("Any", mesh),
        reports=cast("Any", reports),
        images=cast("Any", None),
        containers=cast("Any", containers),
    )
    readiness = Readiness()
    readiness.ready = True
    operations = operations_of(served, readiness)
    return Api(operations, make_app(operations, readiness))


class Api(NamedTuple):
    """Operations, and the application that serves them."""

    operations: tuple[Operation, ...]
    app: Starlette


OPERATIONS, APP = make_api()


async def test_the_document_has_every_route_and_body() -> None:
    status, document = await exchange(APP, "GET", "/openapi.json")
    assert status == 200
    described = {
        (method.upper(), path) for path, found in document["paths"].items() for method in found
    }
    routes = [route for route in APP.routes if isinstance(route, Route)]
    assert described == {
        (method, route.path.replace(":path}", "}"))
        for route in routes
        for method in route.methods or ()
        if method != "HEAD"
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            parameters = operation.get("parameters", ())
            named = [each["name"] for each in parameters if each["in"] == "path"]
            assert named == re.findall(r"{(.*?)}", path)
    body = document["paths"]["/v1/networks"]["post"]["requestBody"]
    reference = body["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert schema["required"] == ["name", "subnets"]
    assert schema["additionalProperties"] is False
    assert document == describe(OPERATIONS)


def test_the_documentation_has_every_route() -> None:
    text = _DOCS.read_text()
    for path, operations in describe(OPERATIONS)["paths"].items():
        for method in operations:
            shown = re.sub(r"\{(\w+)\}", lambda found: found[1].upper(), path)
            assert re.search(rf"`{method.upper()} {re.escape(shown)}[`?]", text), shown


@pytest.mark.parametrize("host", [b"[", b"a]b", b"\xff", b""])
@pytest.mark.parametrize(("path", "body"), [("/nothing", b""), ("/v1/detach", b"{")])
async def test_a_malformed_host_header(host: bytes, path: str, body: bytes) -> None:
    status, document = await exchange(APP, "POST", path, [(b"host", host)], [body])
    assert status in (400, 404)
    assert path in document["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b'{"pid":1,"network":"\xff"}', b'{"network":"a","pid":' + b"1" * 5000 + b"}", b"[" * 9000],
)
async def test_bodies_that_cannot_be_read(body: bytes) -> None:
    status, document = await exchange(APP, "POST", "/v1/detach", [], [body])
    assert (status, document["error"]["kind"]) == (400, "UsageError")
    assert len(document["error"]["message"]) < 500


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("detach", {"pid": -5, "network": "a"}, "pid -5 is not usable: expected `int` >= 1"),
        ("networks", {"name": "a", "subnets": [7]}, "subnets[0] 7 is not usable"),
        ("networks", {"name": "a", "subnets": [], "vni": "x" * 999}, "vni 'xxxxx"),
        ("detach", {"pid": 1}, "request body of /v1/detach: Object missing required field"),
    ],
)
async def test_a_wrong_member_is_named_with_its_value(
    path: str, body: dict[str, Any], message: str
) -> None:
    raw = json.dumps(body).encode()
    status, document = await exchange(APP, "POST", f"/v1/{path}", [], [raw])
    assert (status, document["error"]["kind"]) == (400, "UsageError")
    assert message in document["error"]["message"]
    assert len(document["error"]["message"]) < 500


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"name": "none"}, "has another meaning in meshnet run --net"),
        ({"mode": "bridge", "port": 4444}, "mode bridge has no --port"),
        ({"mode": "macvlan", "host_prefix": 26}, "mode macvlan has no --host-prefix"),
        ({"host_prefix6": 64}, "--host-prefix6 64 is for an IPv6 subnet"),
        ({"subnets": ["fd00::/48"], "host_prefix": 24}, "--host-prefix 24 is for an IPv4 subnet"),
    ],
)
async def test_settings_without_effect_are_refused(body: dict[str, Any], message: str) -> None:
    raw = json.dumps({"name": "a", "subnets": ["10.9.0.0/16"]} | body).encode()
    status, document = await exchange(APP, "POST", "/v1/networks", [], [raw])
    assert (status, document["error"]["kind"]) == (400, "UsageError")
    assert message in document["error"]["message"]


async def test_a_body_that_breaks_off() -> None:
    status, document = await exchange(APP, "POST", "/v1/detach", [], [b'{"pid"'], broken_off=True)
    assert (status, document["error"]["kind"]) == (400, "UsageError")


class _OutOfDescriptors:
    """Reports of an agent that can open nothing more."""

    async def status(self) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/proc/7/stat")


async def test_an_agent_out_of_descriptors_says_so() -> None:
    api = make_api(reports=_OutOfDescriptors())
    status, document = await exchange(api.app, "GET", "/v1/status")
    assert (status, document["error"]["exit_status"]) == (500, 7)
    message = document["error"]["message"]
    assert "Too many open files: '/proc/7/stat'" in message
    assert "LimitNOFILE" in message


@pytest.fixture
def accepting() -> Iterator[logging.Logger]:
    """The logger of trio's listeners, as the agent sets it up."""
    logger = logging.getLogger("trio.serve_listeners")
    configure_logs("info", "json")
    yield logger
    structlog.reset_defaults()
    logger.handlers, logger.propagate = [], True


def test_clients_that_cannot_be_taken_are_logged_seldom(accepting: logging.Logger) -> None:
    with capture_logs() as said:
        for _ in range(50):
            try:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            except OSError:
                accepting.exception("accept returned EMFILE")
    (entry,) = said
    assert entry["event"] == "clients have to wait"
    assert "Too many open files" in entry["reason"]
