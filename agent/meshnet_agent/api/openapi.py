"""The API's OpenAPI document, made from its operations."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import msgspec

from meshnet_agent.api.documents.errors import ErrorDocument
from meshnet_agent.api.operation import JSON

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet_agent.api.operation import Operation

_OPENAPI = "3.1.0"
_REFERENCE = "#/components/schemas/{name}"


def describe(operations: Iterable[Operation]) -> dict[str, Any]:
    """The document of these operations."""
    operations = tuple(operations)
    types: list[Any] = [ErrorDocument]
    for operation in operations:
        for kind in (operation.body, operation.answer, *operation.otherwise.values()):
            types += _alternatives(kind)
    found, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    schemas = dict(zip(types, found, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described = _describe_one(operation, schemas)
        paths.setdefault(operation.template, {})[operation.method.lower()] = described
    return {
        "openapi": _OPENAPI,
        "info": {"title": "meshnet-agent", "version": version("meshnet")},
        "paths": paths,
        "components": {"schemas": components},
    }


def _describe_one(operation: Operation, schemas: dict[Any, Any]) -> dict[str, Any]:
    def content(kind: Any) -> dict[str, Any]:  # noqa: ANN401
        found = [schemas[each] for each in _alternatives(kind)]
        return {JSON: {"schema": found[0] if len(found) == 1 else {"anyOf": found}}}

    answer = content(operation.answer) if operation.answer is not None else {operation.media: {}}
    described: dict[str, Any] = {
        "operationId": f"{operation.method.lower()}{re.sub('[^A-Za-z]+', '_', operation.path)}",
        "responses": {
            "200": {"description": "done", "content": answer},
            **{
                str(status): {"description": "another answer", "content": content(kind)}
                for status, kind in operation.otherwise.items()
            },
            "default": {"description": "an error", "content": content(ErrorDocument)},
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", operation.template)
    ]
    if operation.query is not None:
        parameters += _query_parameters(operation.query)
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": content(operation.body)}
    return described


def _alternatives(kind: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """The types of which a document is one: msgspec has no unions of structs without a tag."""
    if kind is None:
        return ()
    return kind if isinstance(kind, tuple) else (kind,)


def _query_parameters(query: type[msgspec.Struct]) -> list[dict[str, Any]]:
    """One parameter per field; defaults and null are left out, since a query cannot say null."""
    parameters = []
    for field in msgspec.structs.fields(query):
        schema = msgspec.json.schema(field.type)
        kinds = [kind for kind in schema.get("anyOf", [schema]) if kind != {"type": "null"}]
        parameters.append(
            {
                "name": field.encode_name,
                "in": "query",
                "required": field.required,
                "schema": kinds[0] if len(kinds) == 1 else {"anyOf": kinds},
            }
        )
    return parameters
