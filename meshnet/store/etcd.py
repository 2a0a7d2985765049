"""The store on a real etcd (3.4 or newer): which endpoint, which user, how long, what to say.

Job: implement `meshnet.store.Store` on etcd's v3 API; translate every failure to one line that
names the endpoints, the reason and the remedy.  Place: control plane; the agent is its only user.
May import of meshnet only `meshnet.store` and `meshnet.errors`; gRPC and `etcd3` are behind
`meshnet.store._etcd_rpc`.

Endpoints: all calls go to one, until it fails; then to the next.  A call that may be repeated
(all but `EtcdStore.commit`) is, once per remaining endpoint and within the same time-out; a
commit only when the failed endpoint cannot have seen it.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import trio

from meshnet.errors import PolicyRefusedError, StoreUnavailableError, UsageError
from meshnet.store import (
    Commit,
    CompactedError,
    KeyValue,
    LeaseExpiredError,
    LeaseId,
    Listing,
)
from meshnet.store import _etcd_messages as messages
from meshnet.store import _etcd_rpc as rpc
from meshnet.store._etcd_config import EtcdConfig, read_pem, target
from meshnet.store._etcd_watch import (
    PERMISSION_DENIED,
    Watch,
    open_stream,
    reason_of,
    remedy_for,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from typing import Self

    from meshnet.store import Condition, WatchBatch, Write
    from meshnet.store._etcd_messages import Message

__all__ = ["EtcdConfig", "EtcdStore", "target"]

_T = TypeVar("_T")

_FIRST_PAGE_KEYS = 5_000
_LARGEST_PAGE_KEYS = 40_000
"""Each page is twice the one before it.  etcd 3.4 walks over all keys from a page's first to the
end of the prefix, whatever the limit, so what a listing costs it grows with keys times pages
(docs/design/etcd-load.md).  40,000 keys are 4 MB."""
_LEASE_NOT_FOUND = "requested lease not found"
_COMPACTED = "required revision has been compacted"
_NEVER_SENT = "failed to connect to all addresses"
_AUTH_IS_OFF = "authentication is not enabled"
_WANTS_A_USER = "user name is empty"
_STALE_TOKEN = ("invalid auth token", "revision of auth store is old", _WANTS_A_USER)


class EtcdStore:
    """A `Store` on etcd.  Made anywhere, used within one trio run, closed with `aclose`.

    Making it reads the TLS files and connects nowhere; the first call connects and logs in.

    Raises:
        UsageError: a TLS file cannot be read.
    """

    def __init__(self, config: EtcdConfig) -> None:
        self._config = config
        credentials = rpc.Credentials(
            ca=read_pem(config.ca_file, "--etcd-ca"),
            certificate=read_pem(config.cert_file, "--etcd-cert"),
            key=read_pem(config.key_file, "--etcd-key"),
        )
        self._endpoints = tuple(_Endpoint.of(url, credentials) for url in config.endpoints)
        self._current = 0
        self._session = _Session(config.user, config.password)

    async def list_prefix(self, prefix: str) -> Listing:
        """Read a prefix in pages of 5,000 keys and more, all at the first page's revision.

        Each page has its own time-out.  Starts again when the revision is compacted meanwhile.

        Pages after the first might be serializable reads: what was at a revision is the same on
        every member, and one that has not come so far refuses ("future revision").  They are not,
        because that saves etcd only a question to its leader a page, of which there are few, and a
        listing that moves to a member that lags would have to start again.
        """
        for _ in range(3):
            listing = await self._list_at_one_revision(prefix)
            if listing is not None:
                return listing
        raise StoreUnavailableError(
            f"etcd at {self._config.endpoints[self._current]} compacts faster than {prefix} can be "
            "read: compact less often (etcd's --auto-compaction-retention)"
        )

    async def _list_at_one_revision(self, prefix: str) -> Listing | None:
        """The listing, or None when its revision was compacted before the last page."""
        key, range_end = messages.prefix_range(prefix)
        items: list[KeyValue] = []
        revision, limit = 0, _FIRST_PAGE_KEYS
        while True:
            request = messages.range_request(key, range_end, limit=limit, revision=revision)
            try:
                page = await self._call(request, f"list {prefix}")
            except CompactedError:
                return None
            items += page.items
            revision = revision or page.revision
            if not page.more:
                return Listing(tuple(items), revision, page.cluster_id)
            key = messages.key_after(page.items[-1].key)
            limit = min(2 * limit, _LARGEST_PAGE_KEYS)

    async def read(self, key: str, *, revision: int = 0) -> Listing:
        """Read one key, now or as of a revision."""
        page = await self._call(messages.read_request(key, revision), f"read {key}")
        return Listing(page.items, page.revision, page.cluster_id)

    @asynccontextmanager
    async def watch_prefix(
        self, prefix: str, *, after_revision: int
    ) -> AsyncIterator[AsyncIterator[WatchBatch]]:
        """Follow a prefix; entering waits until etcd confirms the watch.

        Leaving ends the stream and its thread, also when cancelled.
        """

        async def attempt(endpoint: _Endpoint, token: str | None, timeout_s: float) -> Watch:
            stream = await open_stream(
                endpoint.connection,
                prefix,
                after_revision=after_revision,
                token=token,
                timeout_s=timeout_s,
            )
            return Watch(
                stream,
                url=endpoint.url,
                prefix=prefix,
                after_revision=after_revision,
                silence_s=self._config.silence_s,
                on_broken=lambda: self._move_on_from(endpoint),
            )

        watch = await self._on_some_endpoint(attempt, f"watch {prefix}")
        try:
            yield watch
        finally:
            await watch.stream.aclose()

    async def commit(self, when: Sequence[Condition], then: Sequence[Write]) -> Commit:
        """Run one etcd transaction.

        Raises:
            LeaseExpiredError: a put names a lease that etcd does not know; nothing is written.
            UsageError: a key is empty or is written twice, or the transaction is too large.
        """
        request = messages.transaction_request(when, then)
        about = f"write {_first_key(then)}" if then else "compare keys"
        response = await self._call(request, about, repeatable=False)
        return Commit(*messages.transaction_outcome(response))

    async def grant_lease(self, ttl_s: int) -> LeaseId:
        """Make a lease.  If a retry makes a second one, the first runs out by itself.

        etcd raises a TTL below its election time-outs (by default: below 2 s).
        """
        if ttl_s <= 0:
            raise UsageError(f"cannot grant a lease of {ttl_s} s: give at least one second")
        return LeaseId(
            messages.lease_id(await self._call(messages.grant_request(ttl_s), "grant a lease"))
        )

    async def keep_alive(self, lease_id: LeaseId) -> int:
        """Renew a lease; returns the time to live in seconds that etcd granted."""
        response = await self._call(messages.keep_alive_request(lease_id), "renew a lease")
        ttl_s = messages.time_to_live_s(response)
        if ttl_s <= 0:
            raise LeaseExpiredError(f"etcd does not know lease {lease_id:x}: grant a new one")
        return ttl_s

    async def revoke_lease(self, lease_id: LeaseId) -> None:
        """End a lease and delete its keys."""
        with suppress(LeaseExpiredError):
            await self._call(messages.revoke_request(lease_id), "revoke a lease")

    def reconnect(self) -> None:
        """Make all connections anew; does not block."""
        for endpoint in self._endpoints:
            endpoint.connection.reopen()

    async def aclose(self) -> None:
        """Close all connections: calls and watches that are under way fail.  Idempotent."""
        for endpoint in self._endpoints:
            endpoint.connection.close()
        await trio.lowlevel.checkpoint()

    def _move_on_from(self, endpoint: _Endpoint) -> None:
        """Prefer the endpoint after `endpoint`, which failed."""
        if self._endpoints[self._current] is endpoint:
            self._current = (self._current + 1) % len(self._endpoints)

    async def _call(self, request: Message, about: str, *, repeatable: bool = True) -> Message:
        async def attempt(endpoint: _Endpoint, token: str | None, timeout_s: float) -> Message:
            return await endpoint.connection.call(request, token=token, timeout_s=timeout_s)

        return await self._on_some_endpoint(attempt, about, repeatable=repeatable)

    async def _on_some_endpoint(
        self,
        attempt: Callable[[_Endpoint, str | None, float], Awaitable[_T]],
        about: str,
        *,
        repeatable: bool = True,
    ) -> _T:
        """Run `attempt` on one endpoint after the other until one answers."""
        deadline = trio.current_time() + self._config.timeout_s
        reasons: list[str] = []
        failure = rpc.RpcFailedError("UNAVAILABLE", "no endpoint")
        for left in range(len(self._endpoints), 0, -1):
            endpoint = self._endpoints[self._current]
            # A silent endpoint must leave some of the time to those after it.
            share_s = (deadline - trio.current_time()) / (left if repeatable else 1)
            try:
                return await self._session.run(attempt, endpoint, share_s)
            except rpc.RpcFailedError as exc:
                failure = exc
            if error := self._refusal(failure, about):
                raise error from failure
            self._move_on_from(endpoint)
            reasons.append(f"{endpoint.url}: {reason_of(failure, share_s)}")
            if not repeatable and _NEVER_SENT not in failure.details:
                break
        # Sorted, so that the text does not depend on which endpoint came first: callers log a
        # reason only when its text changes.
        reasons.sort()
        raise StoreUnavailableError(
            f"cannot {about}: {'; '.join(reasons)}; {remedy_for(reasons)}"
        ) from failure

    def _refusal(self, failure: rpc.RpcFailedError, about: str) -> Exception | None:
        """The error for an answer that no other endpoint would give differently."""
        # For a watch, "rpc error: code = PermissionDenied desc = " precedes etcd's own text.
        details = failure.details.rpartition("etcdserver: ")[2]
        user = f"user {self._config.user!r}"
        nobody = self._config.user is None and self._config.cert_file is None
        if self._config.user is None:
            user = "the user that --etcd-cert names"
        if failure.code == "NOT_FOUND" and _LEASE_NOT_FOUND in details:
            return LeaseExpiredError(f"cannot {about}: {details}: grant a new lease")
        if failure.code == "OUT_OF_RANGE" and _COMPACTED in details:
            return CompactedError(f"cannot {about}: {details}: list again")
        denied = PERMISSION_DENIED in details or failure.code == "UNAUTHENTICATED"
        if _WANTS_A_USER in details or (denied and nobody):
            return PolicyRefusedError(
                f"cannot {about}: etcd wants a user: give --etcd-user and its password"
            )
        if "authentication failed" in details:
            return PolicyRefusedError(
                f"cannot {about}: etcd refuses {user}: {details}: check --etcd-user and "
                "its password"
            )
        if denied:
            return PolicyRefusedError(
                f"cannot {about}: etcd refuses {user}: {details}: grant its role read and "
                "write on the prefix (etcdctl role grant-permission)"
            )
        if failure.code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION"):
            return UsageError(f"cannot {about}: etcd refuses the request: {details}")
        return None


@dataclass(frozen=True, slots=True)
class _Endpoint:
    url: str
    connection: rpc.Connection

    @classmethod
    def of(cls, url: str, credentials: rpc.Credentials) -> Self:
        secure = url.startswith("https:")
        return cls(url, rpc.Connection(target(url), credentials if secure else None))


class _Session:
    """The log-in: a token, requested when first needed and again when etcd rejects it."""

    def __init__(self, user: str | None, password: str | None) -> None:
        self._user = user
        self._password = password
        self._token: str | None = None
        self._logged_in = False
        self._lock = trio.Lock()

    async def run(
        self,
        attempt: Callable[[_Endpoint, str | None, float], Awaitable[_T]],
        endpoint: _Endpoint,
        timeout_s: float,
    ) -> _T:
        """Run `attempt` with a token; once more with a new token if etcd rejects this one.

        Raises:
            RpcFailedError: the attempt or the log-in failed.
        """
        deadline = trio.current_time() + timeout_s
        token = await self._log_in(endpoint, deadline)
        try:
            return await attempt(endpoint, token, max(0.0, deadline - trio.current_time()))
        except rpc.RpcFailedError as exc:
            stale = exc.code == "UNAUTHENTICATED" or any(s in exc.details for s in _STALE_TOKEN)
            if self._user is None or not stale:
                raise
        if self._token == token:  # else another task has a new one already
            self._logged_in = False
        token = await self._log_in(endpoint, deadline)
        return await attempt(endpoint, token, max(0.0, deadline - trio.current_time()))

    async def _log_in(self, endpoint: _Endpoint, deadline: float) -> str | None:
        if self._user is None or self._password is None:
            return None
        with trio.move_on_at(deadline):  # also the wait for another task's log-in is bounded
            async with self._lock:
                if not self._logged_in:
                    self._token = await self._authenticate(
                        endpoint, self._user, self._password, deadline
                    )
                    self._logged_in = True
                return self._token
        raise rpc.RpcFailedError("DEADLINE_EXCEEDED", "")

    async def _authenticate(
        self, endpoint: _Endpoint, user: str, password: str, deadline: float
    ) -> str | None:
        request = messages.authenticate_request(user, password)
        timeout_s = max(0.0, deadline - trio.current_time())
        try:
            response = await endpoint.connection.call(request, token=None, timeout_s=timeout_s)
        except rpc.RpcFailedError as exc:
            if _AUTH_IS_OFF in exc.details:
                return None  # etcd wants no log-in: as etcd's own clients do, go on without
            raise
        return messages.token(response)


def _first_key(then: Sequence[Write]) -> str:
    first = then[0]
    return getattr(first, "key", "") or getattr(first, "prefix", "")
