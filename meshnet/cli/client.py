"""Speaks HTTP and JSON with the agent over its Unix socket."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager

from meshnet.cli.output import QUIET_S
from meshnet.errors import (
    AgentUnreachableError,
    MeshnetError,
    UsageError,
    error_classes,
)
from meshnet.system.group import GROUP
from meshnet.unix_http import HttpConnection

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO, Any

    from meshnet.unix_http import Answer

DEFAULT_SOCKET = "/run/meshnet/agent.sock"
_TIMEOUT_S = 60.0
_UNQUOTED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~")
"""Characters that a URL takes as they are (RFC 3986 §2.3)."""


class Client:
    """The agent behind a socket.

    Every method raises `AgentUnreachableError` when nothing answers there.  When the agent answers
    with an error, the method raises that error.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self, *parts: str) -> Any:  # noqa: ANN401
        """Read a resource; `parts` of its path are quoted."""
        return self._call("GET", parts, None)

    def post(self, *parts: str, body: dict[str, Any], timeout_s: float | None = _TIMEOUT_S) -> Any:  # noqa: ANN401
        """Ask for something to be done; members of `body` that are None are left out.

        Args:
            timeout_s: how long to wait for the answer; None, for ever, for what users may make
                arbitrarily long: starts, stops and restarts of containers.
        """
        given = {k: v for k, v in body.items() if v is not None}
        return self._call("POST", parts, given, timeout_s=timeout_s)

    def delete(
        self,
        *parts: str,
        query: dict[str, str] | None = None,
        timeout_s: float | None = _TIMEOUT_S,
    ) -> Any:  # noqa: ANN401
        """Remove a resource; `timeout_s` as in `post`."""
        return self._call("DELETE", parts, None, query, timeout_s=timeout_s)

    def wait(self, *parts: str) -> Any:  # noqa: ANN401
        """Read a resource that exists only once something has happened, however long it takes."""
        return self.ask(*parts).result()

    def ask(self, *parts: str) -> Question:
        """Ask for a resource as `wait` does, and return at once; the result comes later."""
        with self._errors():
            connection = HttpConnection(self._path, None)
            try:
                connection.request("GET", _target(parts, {}))
            except BaseException:
                connection.close()
                raise
        return Question(self, connection)

    def stream(self, *parts: str, query: dict[str, str]) -> Iterator[bytes]:
        """Read lines of a resource as they come."""
        with self._connected(None) as connection:
            connection.request("GET", _target(parts, query))
            yield from _good(connection.answer()).lines()

    def upload(self, *parts: str, query: dict[str, str], write: Callable[[IO[bytes]], None]) -> Any:  # noqa: ANN401
        """Send a stream of any length, which `write` writes; wait for the answer for ever."""
        with self._connected(None) as connection:
            connection.begin_upload("POST", _target(parts, query))
            write(connection)  # type: ignore[arg-type]  # writers use only the method write()
            connection.finish()
            return _document(connection.answer())

    def download(self, *parts: str, output: IO[bytes]) -> None:
        """Write a resource that is not a document to a file."""
        with self._connected(None) as connection:
            connection.request("GET", _target(parts, {}))
            for chunk in _good(connection.answer()).chunks():
                output.write(chunk)

    def _call(
        self,
        method: str,
        parts: tuple[str, ...],
        body: dict[str, Any] | None,
        query: dict[str, str] | None = None,
        *,
        timeout_s: float | None = _TIMEOUT_S,
    ) -> Any:  # noqa: ANN401
        target = _target(parts, query or {})
        document = json.dumps(body).encode() if body is not None else None
        with self._connected(timeout_s) as connection:
            connection.request(method, target, document)
            if sys.stderr.isatty() and not connection.has_answer(QUIET_S):
                # Imported only now: it needs threading, and a quick answer needs neither.
                from meshnet.cli.progress import progress

                with progress("waiting for the agent"):
                    connection.has_answer(timeout_s)
            return _document(connection.answer())

    @contextmanager
    def _connected(self, timeout_s: float | None) -> Iterator[HttpConnection]:
        with self._errors(), HttpConnection(self._path, timeout_s) as connection:
            yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Translate errors of the connection: they mean that no agent answers."""
        try:
            yield
        except PermissionError as error:
            raise AgentUnreachableError(
                f"socket {self._path} may not be opened by this user: use sudo, or join the group "
                f"{GROUP}"
            ) from error
        except (OSError, ValueError) as error:
            raise AgentUnreachableError(
                f"no agent answers on {self._path} ({error}): start meshnet-agent, or give "
                "--socket PATH"
            ) from error


class Question:
    """A question that the agent has and will answer; see `Client.ask`."""

    def __init__(self, client: Client, connection: HttpConnection) -> None:
        self._client = client
        self._connection = connection

    def result(self) -> Any:  # noqa: ANN401
        """Wait for the answer, however long that takes.  Call it once.

        Raises:
            AgentUnreachableError: the agent went away before it answered.
            MeshnetError: the agent answered with an error.
        """
        with self._client._errors(), self._connection as connection:
            return _document(connection.answer())


def _target(parts: tuple[str, ...], query: dict[str, str]) -> str:
    if "" in parts:
        raise UsageError("the name is empty: give one")
    # Only images' routes take the rest of the path as a name.  Elsewhere a '/', even quoted, would
    # name another resource: the server unquotes the path before it routes.
    for part in parts:
        if "/" in part and parts[0] not in ("images", "archives"):
            raise UsageError(f"name {part!r} has a '/': only names of images may have one")
    path = "/v1/" + "/".join(part if _UNQUOTED.issuperset(part) else _quote(part) for part in parts)
    if not query:
        return path
    from urllib.parse import urlencode

    return f"{path}?{urlencode(query)}"


def _quote(part: str) -> str:
    # Imported here: hardly any name needs it, and every command would pay for the import.
    from urllib.parse import quote

    return quote(part, safe="")


def _good(answer: Answer) -> Answer:
    if answer.status >= 400:
        _document(answer)
    return answer


def _document(answer: Answer) -> Any:  # noqa: ANN401
    document = json.loads(answer.read())
    if answer.status >= 400:
        raise _error_of(document)
    return document


def _error_of(document: Any) -> MeshnetError:  # noqa: ANN401
    found = document.get("error", {}) if isinstance(document, dict) else {}
    kind = error_classes().get(str(found.get("kind")), MeshnetError)
    return kind(str(found.get("message", "the agent answered with an error it did not explain")))
