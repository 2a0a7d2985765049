"""Writes to an etcd by its HTTP and JSON gateway.

Independent of what is measured: nothing of `meshnet.store` is in the way, and no gRPC, whose
threads would live in whatever network namespace they happened to be started in.  The connection is
made inside the namespace it is given, the calling thread comes back at once.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from base64 import b64encode
from typing import TYPE_CHECKING, Any

from meshnet.kernel.netns import inside

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

OPERATIONS = 128
"""What etcd takes in one transaction (``--max-txn-ops``)."""
_TIMEOUT_S = 30.0

Write = tuple[str, bytes | None]
"""A key and its new value; None deletes it."""


class Gateway:
    """One connection to an etcd.  Not thread-safe.

    Args:
        address: IP address and port that etcd listens on.
        netns: path of the namespace to connect from.

    Attributes:
        revision: of the last write.
    """

    def __init__(self, address: tuple[str, int], netns: Path) -> None:
        self.revision = 0
        self._connection = http.client.HTTPConnection(*address, timeout=_TIMEOUT_S)
        fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with inside(fd):
                self._connection.connect()
        finally:
            os.close(fd)
        # Without it the kernel keeps a request's body until the header is acknowledged (40 ms).
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._connection.close()

    def commit(self, writes: Sequence[Write], lease: int = 0) -> int:
        """Write at most `OPERATIONS` keys in one transaction; returns its revision."""
        operations = [_operation(key, value, lease) for key, value in writes]
        answer = self._post("kv/txn", {"success": operations})
        self.revision = int(answer["header"]["revision"])
        return self.revision

    def write_all(self, groups: Iterable[Sequence[Write]], lease: int = 0) -> int:
        """Write any number of keys in full transactions; those of one group go together."""
        batch: list[Write] = []
        for group in groups:
            if len(batch) + len(group) > OPERATIONS:
                self.commit(batch, lease)
                batch = []
            batch += group
        if batch:
            self.commit(batch, lease)
        return self.revision

    def grant_lease(self, ttl_s: int) -> int:
        """A lease that nobody renews."""
        return int(self._post("lease/grant", {"TTL": ttl_s})["ID"])

    def revoke_lease(self, lease: int) -> None:
        """End a lease: its keys go."""
        self._post("lease/revoke", {"ID": lease})

    def _post(self, path: str, body: Mapping[str, object]) -> Any:  # noqa: ANN401
        self._connection.request("POST", f"/v3/{path}", json.dumps(body))
        response = self._connection.getresponse()
        text = response.read()
        if response.status != http.client.OK:
            raise RuntimeError(f"etcd answers {response.status} to {path}: {text[:300]!r}")
        return json.loads(text)


def _operation(key: str, value: bytes | None, lease: int) -> dict[str, object]:
    name = b64encode(key.encode()).decode()
    if value is None:
        return {"request_delete_range": {"key": name}}
    put: dict[str, object] = {"key": name, "value": b64encode(value).decode()}
    if lease:
        put["lease"] = lease
    return {"request_put": put}
