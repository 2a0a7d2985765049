"""An operation of the API: one method of one path, what it takes and what it answers.

The only way to declare one.  The application serves it, and the OpenAPI document describes it, from
the same value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from meshnet_agent.api.bodies import read_body, read_query

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import msgspec
    from starlette.requests import Request

JSON = "application/json"
_T = TypeVar("_T")
_Q = TypeVar("_Q", bound="msgspec.Struct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path.

    Attributes:
        path: as Starlette takes it: ``{name}``, and ``{name:path}`` for a name with slashes.
        handle: answers a request with a document, or with a response that it made itself.
        answer: the type of the document (anything that msgspec takes for one), or a tuple of types
            of which it is one; None: the answer is not JSON.
        media: the answer's media type.
        body: the type of the request's body; None: it has none, or it is not JSON.
        query: a struct of the parameters after the ``?``, or None.
        otherwise: types of the documents of statuses other than 200, but for errors.
        always: whether it is served while the agent is not ready.
    """

    method: str
    path: str
    handle: Callable[[Request], Awaitable[object]]
    answer: Any
    media: str = JSON
    body: type[Any] | None = None
    query: type[msgspec.Struct] | None = None
    otherwise: Mapping[int, Any] = field(default_factory=dict)
    always: bool = False

    @property
    def template(self) -> str:
        """The path as OpenAPI writes it."""
        return re.sub(r"{(\w+):\w+}", r"{\1}", self.path)


@overload
def operation(
    method: str,
    path: str,
    handler: Callable[[Request], Awaitable[object]],
    *,
    answer: object,
    media: str = JSON,
) -> Operation: ...


@overload
def operation(
    method: str,
    path: str,
    handler: Callable[[Request, _T], Awaitable[object]],
    *,
    answer: object,
    body: type[_T],
) -> Operation: ...


@overload
def operation(
    method: str,
    path: str,
    handler: Callable[[Request, _Q], Awaitable[object]],
    *,
    answer: object,
    media: str = JSON,
    query: type[_Q],
) -> Operation: ...


def operation(
    method: str,
    path: str,
    handler: Callable[..., Awaitable[object]],
    *,
    answer: object,
    media: str = JSON,
    body: type[Any] | None = None,
    query: type[Any] | None = None,
) -> Operation:
    """Declare an operation (see `Operation`).

    Args:
        handler: called with the request, and with what it takes of the type `body` or `query`.
    """

    async def handle(request: Request) -> object:
        if body is not None:
            return await handler(request, await read_body(request, body))
        if query is not None:
            return await handler(request, read_query(request, query))
        return await cast("Callable[[Request], Awaitable[object]]", handler)(request)

    return Operation(
        method=method,
        path=path,
        handle=handle,
        answer=answer,
        media=media,
        body=body,
        query=query,
    )
