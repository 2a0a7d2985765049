"""Documents of errors, and of whether the agent lives and is ready."""

from __future__ import annotations

from typing import Literal

import msgspec


class ErrorDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong.

    Attributes:
        kind: a class of `meshnet.errors`.
        exit_status: the exit status of a command that meets it.
    """

    kind: str
    message: str
    exit_status: int


class ErrorDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a request that is refused or fails."""

    error: ErrorDetails


class HealthDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The process serves requests."""

    status: Literal["ok"] = "ok"


class ReadyDocument(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the first snapshot is in the kernel."""

    ready: bool
