"""etcd's v3 messages: encode requests, decode responses.

Job: between the types of `meshnet.store` and the protobuf messages of the `etcd3` package.  Place:
control plane; below `meshnet.store._etcd_rpc`, which sends them: nothing here does.  May import of
meshnet only `meshnet.store` and `meshnet.store._etcd_wire`.

Of `etcd3` only the generated stubs are used.  Its client logs in with a blocking call in its
constructor, cannot do TLS with the system's CAs, and its watcher does not resume.  The two
responses that grow with the mesh, of Range and of Watch, are decoded by `meshnet.store._etcd_wire`.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meshnet.store import Absent, Change, Delete, Holds, KeyValue, PrefixEmpty, Put, Unchanged
from meshnet.store._etcd_wire import fields

# etcd3's stubs were generated for protobuf 3: newer runtimes take them only in pure Python, and
# the choice is read once, at the first import of protobuf.
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
# gRPC's C core writes to stderr by itself, and its fork handlers warn when the agent starts
# programs (they are subprocesses, which exec: nothing of gRPC lives on in them).
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
with warnings.catch_warnings():
    # Several hundred "Call to deprecated create function" of protobuf, from those stubs.
    warnings.simplefilter("ignore", DeprecationWarning)
    import grpc as grpc  # `meshnet.store._etcd_rpc` takes it from here
    from etcd3 import etcdrpc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.store import Condition, Write

Message = Any
"""A protobuf message."""

_GrpcChannel = Any
_GrpcMethod = Any

# Fields of mvccpb.KeyValue and of etcdserverpb.ResponseHeader.
_KEY, _MOD_REVISION, _VALUE, _LEASE = 1, 3, 5, 6
_CLUSTER_ID, _REVISION = 1, 3
_MINUS_ONE = (1 << 64) - 1

LAST_KEY = b"\0"
"""As a range's end: no end."""

PROGRESS_REQUEST = etcdrpc.WatchRequest.FromString(b"\x1a\x00")
"""WatchRequest.progress_request (field 3, etcd 3.4): newer than the stubs, so spelled in bytes;
protobuf carries fields it does not know."""


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a listing: keys in order, and whether more follow."""

    items: tuple[KeyValue, ...]
    more: bool
    revision: int
    cluster_id: int


@dataclass(frozen=True, slots=True)
class WatchResponse:
    """One message of a watch stream.

    `revision` is the last one whose changes have all arrived on the stream, or 0 if the message
    does not say.
    """

    created: bool
    canceled: bool
    cancel_reason: str
    compact_revision: int
    changes: tuple[Change, ...]
    revision: int


def _encode(key: str) -> bytes:
    # etcd's keys are bytes.  One that is not UTF-8, whoever wrote it, must not break a listing, and
    # it must be possible to delete it.
    return key.encode("utf-8", "surrogateescape")


def _decode(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


class Stubs:
    """etcd's methods on a gRPC channel, by the type of their request."""

    def __init__(self, channel: _GrpcChannel) -> None:
        lease = etcdrpc.LeaseStub(channel)
        self._unary: dict[type[Message], _GrpcMethod] = {
            # Deserializers run on gRPC's threads: decoding does not hold up trio's event loop.
            etcdrpc.RangeRequest: channel.unary_unary(
                "/etcdserverpb.KV/Range",
                request_serializer=etcdrpc.RangeRequest.SerializeToString,
                response_deserializer=page,
            ),
            etcdrpc.TxnRequest: etcdrpc.KVStub(channel).Txn,
            etcdrpc.LeaseGrantRequest: lease.LeaseGrant,
            etcdrpc.LeaseRevokeRequest: lease.LeaseRevoke,
            etcdrpc.AuthenticateRequest: etcdrpc.AuthStub(channel).Authenticate,
            # A stream in etcd's API.  Called as a unary method it is one message each way on the
            # wire, which etcd serves, and needs no thread.
            etcdrpc.LeaseKeepAliveRequest: channel.unary_unary(
                "/etcdserverpb.Lease/LeaseKeepAlive",
                request_serializer=etcdrpc.LeaseKeepAliveRequest.SerializeToString,
                response_deserializer=etcdrpc.LeaseKeepAliveResponse.FromString,
            ),
        }
        self.watch: _GrpcMethod = channel.stream_stream(
            "/etcdserverpb.Watch/Watch",
            request_serializer=etcdrpc.WatchRequest.SerializeToString,
            response_deserializer=watch_response,
        )

    def unary(self, request: Message) -> _GrpcMethod:
        """The method that takes `request`."""
        return self._unary[type(request)]


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """etcd's [key, range_end) for all keys that start with `prefix`."""
    key = _encode(prefix)
    stem = key.rstrip(b"\xff")
    if not stem:
        return key or b"\0", LAST_KEY
    return key, stem[:-1] + bytes([stem[-1] + 1])


def range_request(key: bytes, range_end: bytes, *, limit: int, revision: int) -> Message:
    """Read up to `limit` keys of a range as of `revision` (0: now, linearizable)."""
    return etcdrpc.RangeRequest(key=key, range_end=range_end, limit=limit, revision=revision)


def read_request(key: str, revision: int) -> Message:
    """Read one key as of `revision` (0: now, linearizable)."""
    return etcdrpc.RangeRequest(key=_encode(key), revision=revision)


def page(response: bytes) -> Page:
    """Decode a RangeResponse (etcd's rpc.proto)."""
    items = []
    header, more = b"", 0
    for number, value in fields(response):
        match number:
            case 1:
                header = value
            case 2:
                items.append(_key_value(dict(fields(value))))
            case 3:
                more = value
    head = dict(fields(header))
    return Page(tuple(items), bool(more), head.get(_REVISION, 0), head.get(_CLUSTER_ID, 0))


def _key_value(kv: dict[int, Any]) -> KeyValue:
    return KeyValue(
        _decode(kv.get(_KEY, b"")), kv.get(_VALUE, b""), kv.get(_MOD_REVISION, 0), kv.get(_LEASE, 0)
    )


def key_after(key: str) -> bytes:
    """The least key greater than `key`."""
    return _encode(key) + b"\0"


def transaction_request(when: Sequence[Condition], then: Sequence[Write]) -> Message:
    """Encode conditions and writes as a TxnRequest."""
    return etcdrpc.TxnRequest(
        compare=[_compare(condition) for condition in when],
        success=[_operation(write) for write in then],
    )


def _compare(condition: Condition) -> Message:
    compare = etcdrpc.Compare
    match condition:
        case Absent(key):
            return compare(target=compare.CREATE, key=_encode(key), create_revision=0)
        case Unchanged(key, mod_revision):
            return compare(target=compare.MOD, key=_encode(key), mod_revision=mod_revision)
        case Holds(key, value):
            return compare(target=compare.VALUE, key=_encode(key), value=value)
        case PrefixEmpty(prefix):
            # etcd compares every key in the range, and a key of zeros if there is none
            # (applyCompare in etcdserver/apply.go).  No existing key was created at 0.
            key_from, end = prefix_range(prefix)
            return compare(target=compare.CREATE, key=key_from, range_end=end, create_revision=0)


def _operation(write: Write) -> Message:
    match write:
        case Put(key, value, lease_id):
            put = etcdrpc.PutRequest(key=_encode(key), value=value, lease=lease_id or 0)
            return etcdrpc.RequestOp(request_put=put)
        case Delete(key):
            delete = etcdrpc.DeleteRangeRequest(key=_encode(key))
            return etcdrpc.RequestOp(request_delete_range=delete)
        case _:
            key_from, end = prefix_range(write.prefix)
            delete = etcdrpc.DeleteRangeRequest(key=key_from, range_end=end)
            return etcdrpc.RequestOp(request_delete_range=delete)


def transaction_outcome(response: Message) -> tuple[bool, int]:
    """Whether a TxnResponse's conditions held, and its revision."""
    return response.succeeded, response.header.revision


def grant_request(ttl_s: int) -> Message:
    """Ask for a lease with an id of etcd's choice."""
    return etcdrpc.LeaseGrantRequest(TTL=ttl_s)


def lease_id(response: Message) -> int:
    """The id in a LeaseGrantResponse."""
    granted: int = response.ID
    return granted


def keep_alive_request(lease: int) -> Message:
    """Renew a lease."""
    return etcdrpc.LeaseKeepAliveRequest(ID=lease)


def time_to_live_s(response: Message) -> int:
    """The time to live in a LeaseKeepAliveResponse; 0 when etcd does not know the lease."""
    ttl_s: int = response.TTL
    return ttl_s


def revoke_request(lease: int) -> Message:
    """End a lease."""
    return etcdrpc.LeaseRevokeRequest(ID=lease)


def authenticate_request(user: str, password: str) -> Message:
    """Ask for a token."""
    return etcdrpc.AuthenticateRequest(name=user, password=password)


def token(response: Message) -> str:
    """The token in an AuthenticateResponse."""
    text: str = response.token
    return text


def watch_request(prefix: str, start_revision: int) -> Message:
    """Watch a prefix from `start_revision` on, that one included."""
    key, end = prefix_range(prefix)
    return etcdrpc.WatchRequest(
        create_request=etcdrpc.WatchCreateRequest(
            key=key, range_end=end, start_revision=start_revision, progress_notify=True
        )
    )


def watch_response(response: bytes) -> WatchResponse:
    """Decode a WatchResponse (etcd's rpc.proto)."""
    changes: list[Change] = []
    message: dict[int, Any] = {}
    for number, value in fields(response):
        if number == 11:
            changes.append(_change(dict(fields(value))))
        else:
            message[number] = value
    created, canceled = bool(message.get(3)), bool(message.get(4))
    if changes:
        # Not the header's: while a watch catches up, that is ahead of what was sent.
        revision = changes[-1].revision
    elif created or canceled or message.get(2, 0) == _MINUS_ONE:
        # -1: an answer to request_progress.  Before etcd 3.4.25 it overtakes changes that are
        # still queued (etcd pull request 15237), so it counts as a sign of life only.
        revision = 0
    else:
        revision = dict(fields(message.get(1, b""))).get(_REVISION, 0)
    return WatchResponse(
        created=created,
        canceled=canceled,
        cancel_reason=message.get(6, b"").decode("utf-8", "replace"),
        compact_revision=message.get(5, 0),
        changes=tuple(changes),
        revision=revision,
    )


def _change(event: dict[int, Any]) -> Change:
    kv = dict(fields(event.get(2, b"")))
    put = not event.get(1, 0)
    return Change(
        _decode(kv.get(_KEY, b"")), kv.get(_VALUE, b"") if put else None, kv.get(_MOD_REVISION, 0)
    )
