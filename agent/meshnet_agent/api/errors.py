"""Errors as HTTP: the status of each, and the response that tells of it (docs/api.md)."""

from __future__ import annotations

import errno
import os

import msgspec
from starlette.responses import Response

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
from meshnet.text import printable
from meshnet_agent.api.documents.errors import ErrorDetails, ErrorDocument
from meshnet_agent.api.operation import JSON

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
"""What any call may run out of, and the remedy."""

_LONGEST_MESSAGE = 1000
"""Characters: a request may quote much of itself."""


def json_response(document: object, status: int = 200) -> Response:
    """A document as a response."""
    return Response(msgspec.json.encode(document), status, media_type=JSON)


def error_response(error: MeshnetError) -> Response:
    """The response of a request that was refused or failed."""
    # A subclass goes by the nearest class that the contract names.
    kind = next((c for c in type(error).__mro__ if c in _STATUS_CODES), KernelRefusedError)
    details = ErrorDetails(
        kind=kind.__name__,
        message=printable(str(error), _LONGEST_MESSAGE),
        exit_status=error.exit_status,
    )
    return json_response(ErrorDocument(error=details), _STATUS_CODES.get(kind, 500))


def exhausted(error: OSError) -> KernelRefusedError | None:
    """The error with its remedy if the agent or the machine ran out of something; else None."""
    if error.errno not in _EXHAUSTED:
        return None
    return KernelRefusedError(f"{error}: {_EXHAUSTED[error.errno]}")


def raw_refusal(code: int) -> bytes:
    """The HTTP response for a client that cannot be accepted, given the errno of accept(2)."""
    code = code if code in _EXHAUSTED else errno.EMFILE
    error = KernelRefusedError(f"{OSError(code, os.strerror(code))}: {_EXHAUSTED[code]}")
    body = error_response(error).body
    head = (
        "HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + bytes(body)
