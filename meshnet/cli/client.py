"""Speaks HTTP and JSON with the agent over its Unix socket."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from urllib.parse import quote

from meshnet.errors import (
    AgentUnreachableError,
    MeshnetError,
    UsageError,
    error_classes,
)

DEFAULT_SOCKET = "/run/meshnet/agent.sock"
_TIMEOUT_S = 60.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("meshnet", timeout=_TIMEOUT_S)
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

    def post(self, *parts: str, body: dict[str, Any]) -> Any:  # noqa: ANN401
        """Ask for something to be done; members of `body` that are None are left out."""
        return self._call("POST", parts, {k: v for k, v in body.items() if v is not None})

    def delete(self, *parts: str) -> Any:  # noqa: ANN401
        """Remove a resource."""
        return self._call("DELETE", parts, None)

    def _call(self, method: str, parts: tuple[str, ...], body: dict[str, Any] | None) -> Any:  # noqa: ANN401
        if "" in parts:
            raise UsageError("the name is empty: give one")
        connection = _UnixConnection(self._path)
        url = "/v1/" + "/".join(quote(part, safe="") for part in parts)
        payload = json.dumps(body).encode() if body is not None else None
        try:
            connection.request(method, url, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            document = json.loads(response.read())
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
        if response.status >= 400:
            raise _error_of(document)
        return document


def _error_of(document: Any) -> MeshnetError:  # noqa: ANN401
    found = document.get("error", {}) if isinstance(document, dict) else {}
    kind = error_classes().get(str(found.get("kind")), MeshnetError)
    return kind(str(found.get("message", "the agent answered with an error it did not explain")))
