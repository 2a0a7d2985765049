"""The API's OpenAPI document, made from its routes and the types of its bodies.

A route that a handler's `takes` says nothing of has no body.
"""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from starlette.routing import BaseRoute

_Handler = TypeVar("_Handler", bound="Callable[..., object]")

_OPENAPI = "3.1.0"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["kind", "message", "exit_status"],
            "properties": {
                "kind": {"type": "string"},
                "message": {"type": "string"},
                "exit_status": {"type": "integer"},
            },
        }
    },
}


def takes(body: type[Any]) -> Callable[[_Handler], _Handler]:
    """Say what a handler's request body is."""

    def mark(handler: _Handler) -> _Handler:
        handler.body = body  # type: ignore[attr-defined]
        return handler

    return mark


def describe(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """The document, of the routes that there are."""
    paths: dict[str, dict[str, Any]] = {}
    bodies: dict[str, type[Any]] = {}
    for route in routes:
        if isinstance(route, Route):
            for method in sorted((route.methods or set()) - {"HEAD"}):
                operation = _operation(route, method, bodies)
                # Starlette's ``{image:path}`` is ``{image}`` in a document.
                path = re.sub(r"{(\w+):\w+}", r"{\1}", route.path)
                paths.setdefault(path, {})[method.lower()] = operation
    template = "#/components/schemas/{name}"
    _, schemas = msgspec.json.schema_components(bodies.values(), ref_template=template)
    return {
        "openapi": _OPENAPI,
        "info": {"title": "meshnet-agent", "version": version("meshnet")},
        "paths": paths,
        "components": {"schemas": {**schemas, "Error": _ERROR}},
    }


def _operation(route: Route, method: str, bodies: dict[str, type[Any]]) -> Any:  # noqa: ANN401
    handler = inspect.unwrap(route.endpoint)
    error = {"$ref": "#/components/schemas/Error"}
    found: dict[str, Any] = {
        "operationId": f"{method.lower()}{re.sub('[^A-Za-z]+', '_', route.path)}",
        "responses": {
            "200": {"description": "done", "content": _json({})},
            "default": {"description": "an error", "content": _json(error)},
        },
    }
    names = re.findall(r"{(\w+)", route.path)
    if names:
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    body = getattr(handler, "body", None)
    if body is not None:
        bodies[body.__name__] = body
        reference = {"$ref": f"#/components/schemas/{body.__name__}"}
        found["requestBody"] = {"required": True, "content": _json(reference)}
    return found


def _json(schema: object) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
