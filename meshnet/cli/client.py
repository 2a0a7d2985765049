"""Speaks HTTP and JSON with the agent over its Unix socket."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlencode

from meshnet.errors import (
    AgentUnreachableError,
    MeshnetError,
    UsageError,
    error_classes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT_SOCKET = "/run/meshnet/agent.sock"
_TIMEOUT_S = 60.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("meshnet", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """The agent behind a socket.

    Every method raises `AgentUnreachableError` when nothing answers there, and the error the agent
    answered with otherwise.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self, *parts: str) -> Any:  # noqa: ANN401
        """Read a resource; `parts` of its path are quoted."""
        return self._call("GET", parts, None)

    def post(self, *parts: str, body: dict[str, Any], timeout_s: float | None = _TIMEOUT_S) -> Any:  # noqa: ANN401
        """Ask for something to be done; members of `body` that are None are left out.

        Args:
            timeout_s: None for what takes as long as others want: the life of containers.
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
        """Read a resource that is there when something has happened, however long that takes."""
        return self._call("GET", parts, None, timeout_s=None)

    def stream(self, *parts: str, query: dict[str, str]) -> Iterator[bytes]:
        """Read lines of a resource as they come."""
        with self._connected(parts, query, timeout_s=None) as (connection, url):
            connection.request("GET", url)
            response = connection.getresponse()
            if response.status >= 400:
                _document(response)
            yield from response

    def upload(self, *parts: str, query: dict[str, str], write: Callable[[IO[bytes]], None]) -> Any:  # noqa: ANN401
        """Send a stream of any length, which `write` writes.  Waits for the answer for ever."""
        with self._connected(parts, query, timeout_s=None) as (connection, url):
            connection.putrequest("POST", url)
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            write(cast("IO[bytes]", _Chunks(connection)))
            connection.send(b"0\r\n\r\n")
            return _document(connection.getresponse())

    def download(self, *parts: str, output: IO[bytes]) -> None:
        """Write a resource that is no document to a file."""
        with self._connected(parts, {}, timeout_s=None) as (connection, url):
            connection.request("GET", url)
            response = connection.getresponse()
            if response.status >= 400:
                _document(response)
            shutil.copyfileobj(response, output)

    def _call(
        self,
        method: str,
        parts: tuple[str, ...],
        body: dict[str, Any] | None,
        query: dict[str, str] | None = None,
        timeout_s: float | None = _TIMEOUT_S,
    ) -> Any:  # noqa: ANN401
        payload = json.dumps(body).encode() if body is not None else None
        with self._connected(parts, query or {}, timeout_s) as (connection, url):
            connection.request(method, url, payload, {"Content-Type": "application/json"})
            return _document(connection.getresponse())

    @contextmanager
    def _connected(
        self, parts: tuple[str, ...], query: dict[str, str], timeout_s: float | None = _TIMEOUT_S
    ) -> Iterator[tuple[_UnixConnection, str]]:
        if "" in parts:
            raise UsageError("the name is empty: give one")
        connection = _UnixConnection(self._path, timeout_s)
        url = "/v1/" + "/".join(quote(part, safe="") for part in parts)
        try:
            yield connection, f"{url}?{urlencode(query)}" if query else url
        except PermissionError as error:
            raise AgentUnreachableError(
                f"socket {self._path} may not be opened by this user: use sudo, or join the group "
                "meshnet"
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise AgentUnreachableError(
                f"no agent answers on {self._path} ({error}): start meshnet-agent, or give "
                "--socket PATH"
            ) from error
        finally:
            connection.close()


class _Chunks:
    """A file that sends what is written to it, in HTTP's chunked coding (RFC 9112 §7.1)."""

    def __init__(self, connection: _UnixConnection) -> None:
        self._connection = connection

    def write(self, data: bytes) -> int:
        """Send some bytes."""
        if data:  # an empty chunk would be the end
            self._connection.send(b"%x\r\n%b\r\n" % (len(data), data))
        return len(data)


def _document(response: http.client.HTTPResponse) -> Any:  # noqa: ANN401
    document = json.loads(response.read())
    if response.status >= 400:
        raise _error_of(document)
    return document


def _error_of(document: Any) -> MeshnetError:  # noqa: ANN401
    found = document.get("error", {}) if isinstance(document, dict) else {}
    kind = error_classes().get(str(found.get("kind")), MeshnetError)
    return kind(str(found.get("message", "the agent answered with an error it did not explain")))
