"""One watch on etcd: from its stream's responses to batches, and noticing that it broke.

Job: the iterator behind `meshnet.store.etcd.EtcdStore.watch_prefix`.  Place: control plane.  May
import of meshnet only `meshnet.store` and the etcd files beside it.

Two things of etcd shape it.  It reports "compacted" only for revisions *before* the compacted one,
although compaction also removes the deletions made *at* it; so the stream starts one revision
early, and that one is dropped here.  And a frozen or unplugged etcd looks just like one with
nothing to say; so when it is quiet it is asked for a sign of life.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import trio

from meshnet.errors import StoreUnavailableError
from meshnet.store import CompactedError, WatchBatch
from meshnet.store._etcd_rpc import RpcFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from meshnet.store._etcd_messages import WatchResponse
    from meshnet.store._etcd_rpc import Connection, WatchStream

PERMISSION_DENIED = "permission denied"

_PREAMBLE = re.compile(r"^(?:[A-Z_]+: )?(?:ipv[46]:\S+: )?")


class Watch:
    """The iterator of one watch stream.

    Args:
        stream: the stream; the creator of the iterator closes it.
        url: the endpoint at its other end, for messages.
        prefix: what is watched, for messages.
        after_revision: the last revision that the caller has.
        silence_s: how long to hear nothing before the stream counts as broken.
        on_broken: called when the stream broke and the endpoint is to blame.
    """

    def __init__(
        self,
        stream: WatchStream,
        *,
        url: str,
        prefix: str,
        after_revision: int,
        silence_s: float,
        on_broken: Callable[[], None],
    ) -> None:
        self.stream = stream
        self._url = url
        self._prefix = prefix
        self._revision = after_revision
        self._silence_s = silence_s
        self._on_broken = on_broken
        self._heard_at = trio.current_time()
        self._asked_at: float | None = None
        self._end: StoreUnavailableError | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchBatch:
        if self._end is not None:
            raise self._end
        try:
            while True:
                batch = self._batch(await self._next_response())
                if batch is not None:
                    return batch
        except RpcFailedError as exc:
            self._on_broken()
            reason = reason_of(exc, self._silence_s)
            self._end = StoreUnavailableError(
                f"the watch of {self._prefix} broke: {self._url}: {reason}; "
                "check --etcd and that etcd is running"
            )
            raise self._end from exc

    async def _next_response(self) -> WatchResponse:
        """Wait for a response, asking for a sign of life when there is none.

        Only time spent here counts as silence: a caller that is busy elsewhere finds what
        arrived meanwhile first.

        Raises:
            RpcFailedError: the stream ended, or etcd did not answer the question.
        """
        await trio.lowlevel.checkpoint()
        response = self.stream.receive_nowait()
        while response is None:
            if self._asked_at is None:
                deadline = self._heard_at + self._silence_s / 4
            else:
                deadline = self._asked_at + self._silence_s * 3 / 4
            with trio.move_on_at(deadline):
                response = await self.stream.receive()
            if response is not None:
                break
            if self._asked_at is not None:
                raise RpcFailedError("DEADLINE_EXCEEDED", "")
            self.stream.request_progress()
            self._asked_at = trio.current_time()
        self._heard_at = trio.current_time()
        self._asked_at = None
        return response

    def _batch(self, response: WatchResponse) -> WatchBatch | None:
        """What of a response is new to the caller, if anything."""
        if response.compact_revision:
            self._end = CompactedError(
                f"cannot watch {self._prefix} after revision {self._revision}: {self._url} has "
                f"compacted up to {response.compact_revision}: list again"
            )
            raise self._end
        if response.canceled:
            raise RpcFailedError("CANCELLED", response.cancel_reason or "etcd ended the watch")
        changes = tuple(c for c in response.changes if c.revision > self._revision)
        if response.changes and not changes:
            return None  # the one revision that the stream started early
        self._revision = max(self._revision, response.revision)
        return WatchBatch(changes, self._revision)


async def open_stream(
    connection: Connection,
    prefix: str,
    *,
    after_revision: int,
    token: str | None,
    timeout_s: float,
) -> WatchStream:
    """Start a watch stream and wait until etcd says that it made the watch.

    Raises:
        RpcFailedError: it did not, or not within `timeout_s` seconds; the stream is closed.
    """
    # One revision early (see above).  0 would mean "from now on" to etcd; its first one is 1.
    stream = connection.open_watch(prefix, start_revision=max(after_revision, 1), token=token)
    try:
        response = None
        with trio.move_on_after(timeout_s):
            response = await stream.receive()
        if response is None:
            raise RpcFailedError("DEADLINE_EXCEEDED", "")
        if PERMISSION_DENIED in response.cancel_reason:
            # etcd 3.4 says so for a stale token, too; as such it gets a second try.
            raise RpcFailedError("UNAUTHENTICATED", response.cancel_reason)
        if response.canceled:
            raise RpcFailedError("CANCELLED", response.cancel_reason)
    except BaseException:
        await stream.aclose()
        raise
    return stream


def reason_of(failure: RpcFailedError, timeout_s: float) -> str:
    """gRPC's or etcd's words, on one short line."""
    if failure.code == "DEADLINE_EXCEEDED":
        return f"no answer within {timeout_s:.2g} s"
    # gRPC: "failed to …; last error: UNKNOWN: ipv4:127.0.0.1:2379: Failed to …".
    details = _PREAMBLE.sub("", failure.details.rpartition("last error: ")[2])
    return " ".join(details.split())[:300] or failure.code


def remedy_for(reasons: Sequence[str]) -> str:
    """What the operator should look at, from URL and `reason_of` of each endpoint that failed."""
    text = " ".join(reasons).lower()
    # With TLS 1.3 a server that dislikes the client's certificate says so after the handshake:
    # gRPC reports what it cannot decrypt, or just the end of the connection.
    signs = ("socket closed", "reset", "handshake", "ssl", "tsi_")
    if "https:" in text and any(sign in text for sign in signs):
        return "check --etcd-ca, --etcd-cert and --etcd-key"
    return "check --etcd and that etcd is running"
