"""Bodies of the API's requests: read up to a limit, decoded, and what is wrong with them said."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect

from meshnet.codec.document import MAX_VALUE_BYTES
from meshnet.errors import UsageError
from meshnet.text import printable

if TYPE_CHECKING:
    from starlette.requests import Request

_T = TypeVar("_T")
_SHOWN = 300
_PLACE = re.compile(r"(.+) - at `\$\.(.+)`")
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")


def shown_path(request: Request) -> str:
    """The request's path.  Not ``request.url``, which cannot be had of some ``Host`` headers."""
    return printable(str(request.scope["path"]), _SHOWN)


async def read_body(request: Request, kind: type[_T]) -> _T:
    """The body of a request, as a value of a type.

    Raises:
        UsageError: it is too large, breaks off, is no JSON, or not of that type.
    """
    path = shown_path(request)
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > MAX_VALUE_BYTES:
                raise UsageError(f"request body is larger than {MAX_VALUE_BYTES} bytes")
    except ClientDisconnect as error:
        raise UsageError(f"request body of {path} breaks off") from error
    try:
        document = msgspec.json.decode(bytes(raw))
    except (ValueError, RecursionError) as error:  # DecodeError, UnicodeDecodeError
        reason = printable(str(error), _SHOWN)
        raise UsageError(f"request body of {path}: {reason}") from error
    return convert(document, kind, path)


def convert(document: Any, kind: type[_T], path: str) -> _T:  # noqa: ANN401
    """A JSON value as a value of a type.

    Raises:
        UsageError: it is none; names the member and its value.
    """
    try:
        return msgspec.convert(document, kind)
    except (ValueError, RecursionError) as error:
        found = _PLACE.fullmatch(str(error))
        if found is None:
            reason = printable(str(error), _SHOWN)
            raise UsageError(f"request body of {path}: {reason}") from error
        value = document
        for name, index in _STEP.findall(found[2]):
            value = value[int(index)] if index else value[name]
        raise UsageError(
            printable(f"{found[2]} {value!r:.80} is not usable: {found[1].lower()}", _SHOWN)
        ) from error
