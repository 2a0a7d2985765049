"""etcd's gRPC calls from trio.

Job: bridge gRPC's threads to trio, cancellably.  A unary call is a gRPC future whose callback
wakes the task (`Connection.call`); a watch is a stream with one reader thread (`WatchStream`).
Responses are decoded on gRPC's threads, so that a large one does not hold up the event loop.
Place: control plane; below `meshnet.store.etcd`, which has the policy (endpoints, log-in, what to
say).  May import of meshnet only `meshnet.store` and the messages beside it.  gRPC and its
lack of types end here.
"""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from meshnet.store import _etcd_messages as messages

# grpc comes from there, because it must be imported after that module has set the environment.
from meshnet.store._etcd_messages import Message, WatchResponse, grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_GrpcCall = Any
"""A gRPC call, which is also its iterator of responses and its exception."""

_CLOSED = "the connection was closed"
_BUFFERED_RESPONSES = 64
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # A connection of its own: a shared one would share another store's reconnect back-off.
    ("grpc.use_local_subchannel_pool", 1),
    # http_proxy in the agent's environment is for images, not for the control plane.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Also the time one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    # etcd's least allowed interval is 5 s, and only while a call is open.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class RpcFailedError(Exception):
    """A call or stream ended without success.

    Attributes:
        code: name of the gRPC status code, such as ``UNAVAILABLE``.
        details: etcd's or gRPC's text.
    """

    def __init__(self, code: str, details: str) -> None:
        super().__init__(code, details)
        self.code = code
        self.details = details


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM contents for TLS; an absent CA means the system's."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None


class Connection:
    """One endpoint's gRPC channel; connects on first use, and again after every failure."""

    def __init__(self, target: str, credentials: Credentials | None) -> None:
        self._target = target
        self._credentials = credentials
        self._open()

    def _open(self) -> None:
        pem = self._credentials
        if pem is None:
            self._channel = grpc.insecure_channel(self._target, options=_CHANNEL_OPTIONS)
        else:
            tls = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)
            self._channel = grpc.secure_channel(self._target, tls, options=_CHANNEL_OPTIONS)
        self._stubs = messages.Stubs(self._channel)

    async def call(self, request: Message, *, token: str | None, timeout_s: float) -> Message:
        """Make the unary call that `request` belongs to.  Cancellation ends it at once.

        Raises:
            RpcFailedError: it did not succeed within `timeout_s` seconds.
        """
        done = trio.Event()
        wake = _threadsafe(done.set)
        try:
            future = self._stubs.unary(request).future(
                request, timeout=timeout_s, metadata=_metadata(token)
            )
        except ValueError as exc:
            raise RpcFailedError("CANCELLED", _CLOSED) from exc
        future.add_done_callback(lambda _: wake())
        try:
            await done.wait()
        finally:
            future.cancel()  # without effect when done
        try:
            return future.result()
        except grpc.FutureCancelledError as exc:
            raise RpcFailedError("CANCELLED", _CLOSED) from exc
        except grpc.RpcError as exc:
            raise _failure(exc) from exc

    def open_watch(self, prefix: str, *, start_revision: int, token: str | None) -> WatchStream:
        """Start a watch stream; `WatchStream.receive` tells what becomes of it.

        Raises:
            RpcFailedError: the connection is closed.
        """
        # hasleader: an etcd that lost its quorum shall end the stream, not fall silent.
        metadata = (*_metadata(token), ("hasleader", "true"))
        return WatchStream(
            lambda requests: self._stubs.watch(requests, metadata=metadata),
            messages.watch_request(prefix, start_revision),
        )

    def reopen(self) -> None:
        """Close the channel, and have a new one connect on first use.  Does not block."""
        self.close()
        self._open()

    def close(self) -> None:
        """Close the channel: open calls and streams fail.  Does not block; idempotent."""
        self._channel.close()


class WatchStream:
    """One Watch stream.  A thread reads gRPC's blocking iterator and hands responses to trio.

    At most 64 responses wait to be received; then the thread stops reading, and HTTP/2 flow
    control makes etcd wait.
    """

    def __init__(self, start: Callable[[Iterator[Message]], _GrpcCall], request: Message) -> None:
        self._requests: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._requests.put(request)
        self._slots = threading.Semaphore(_BUFFERED_RESPONSES)
        self._arriving, self._arrived = trio.open_memory_channel[WatchResponse | RpcFailedError](
            _BUFFERED_RESPONSES + 1  # the end of the stream needs no slot
        )
        self._closed = False
        self._ended = trio.Event()
        try:
            self._call = start(iter(self._requests.get, None))
        except ValueError as exc:
            raise RpcFailedError("CANCELLED", _CLOSED) from exc
        self._thread = threading.Thread(
            target=self._read,
            args=(_threadsafe(self._deliver), _threadsafe(self._ended.set)),
            name="meshnet-etcd-watch",
            daemon=True,
        )
        self._thread.start()

    def request_progress(self) -> None:
        """Ask etcd for a sign of life; the answer comes as a response without changes."""
        self._requests.put(messages.PROGRESS_REQUEST)

    async def receive(self) -> WatchResponse:
        """Wait for the next response.  Cancellation loses none.

        Raises:
            RpcFailedError: the stream ended.
        """
        return self._accept(await self._arrived.receive())

    def receive_nowait(self) -> WatchResponse | None:
        """The next response if one is waiting.

        Raises:
            RpcFailedError: the stream ended.
        """
        try:
            return self._accept(self._arrived.receive_nowait())
        except trio.WouldBlock:
            return None

    async def aclose(self) -> None:
        """End the stream and its thread; shielded from cancellation, for at most one second."""
        self._closed = True
        self._call.cancel()
        self._requests.put(None)  # ends gRPC's thread that waits for requests
        self._slots.release()
        self._arrived.close()
        with trio.move_on_after(1, shield=True):
            await self._ended.wait()

    def _accept(self, item: WatchResponse | RpcFailedError) -> WatchResponse:
        if isinstance(item, RpcFailedError):
            raise item
        self._slots.release()
        return item

    def _deliver(self, item: WatchResponse | RpcFailedError) -> None:
        if not self._closed:
            self._arriving.send_nowait(item)

    def _read(self, deliver: Callable[..., None], ended: Callable[[], None]) -> None:
        """The thread's body."""
        try:
            for response in self._call:
                self._slots.acquire()
                if self._closed:
                    break
                deliver(response)
            end = RpcFailedError("UNAVAILABLE", "etcd ended the stream")
        except grpc.RpcError as exc:
            end = _failure(exc)
        deliver(end)
        ended()


def _threadsafe(function: Callable[..., None]) -> Callable[..., None]:
    """Make `function` callable from any thread; it runs later, in this trio run or not at all."""
    token = trio.lowlevel.current_trio_token()

    def run(*args: object) -> None:
        with suppress(trio.RunFinishedError):  # the agent has ended; this thread lags behind
            token.run_sync_soon(function, *args)

    return run


def _failure(error: _GrpcCall) -> RpcFailedError:
    return RpcFailedError(error.code().name, error.details() or "")


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("token", token),)
