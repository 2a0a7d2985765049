"""The API's description of itself, and what a server hands over that no client of ours sends."""

from __future__ import annotations

import errno
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import structlog
from starlette.routing import Route
from structlog.testing import capture_logs

from meshnet_agent.api import make_app
from meshnet_agent.logs import configure_logs
from meshnet_agent.openapi import describe
from tests.hostile.api import exchange

if TYPE_CHECKING:
    from collections.abc import Iterator

_DOCS = Path(__file__).parents[2] / "docs" / "api.md"
APP = make_app(cast("Any", None), lambda: True)


async def test_the_document_has_every_route_and_body() -> None:
    status, document = await exchange(APP, "GET", "/openapi.json")
    assert status == 200
    described = {
        (method.upper(), path) for path, found in document["paths"].items() for method in found
    }
    routes = [route for route in APP.routes if isinstance(route, Route)]
    assert described == {(m, r.path) for r in routes for m in r.methods or () if m != "HEAD"}
    body = document["paths"]["/v1/networks"]["post"]["requestBody"]
    reference = body["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert schema["required"] == ["name", "subnets"]
    assert schema["additionalProperties"] is False
    assert document == describe(APP.routes)


def test_the_documentation_has_every_route() -> None:
    text = _DOCS.read_text()
    for path, operations in describe(APP.routes)["paths"].items():
        for method in operations:
            shown = re.sub(r"\{(\w+)(:path)?\}", lambda found: found[1].upper(), path)
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


async def test_a_body_that_breaks_off() -> None:
    status, document = await exchange(APP, "POST", "/v1/detach", [], [b'{"pid"'], broken_off=True)
    assert (status, document["error"]["kind"]) == (400, "UsageError")


class _OutOfDescriptors:
    """A service that can open nothing more."""

    async def status_document(self) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/proc/7/stat")


async def test_an_agent_out_of_descriptors_says_so() -> None:
    app = make_app(cast("Any", _OutOfDescriptors()), lambda: True)
    status, document = await exchange(app, "GET", "/v1/status")
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
