"""A real etcd that is killed, frozen, locked or slow, and the messages about it."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from meshnet.errors import PolicyRefusedError, StoreUnavailableError, UsageError
from meshnet.lab.etcd import EtcdServer
from meshnet.store import Absent, Change, CompactedError, Delete, LeaseExpiredError, LeaseId, Put
from meshnet.store.etcd import EtcdConfig, EtcdStore
from tests.contract.certificates import client_flags, make_ca, make_certificate, server_flags

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from meshnet.store import WatchBatch

    from .conftest import Connect, StartEtcd

_DEADLINE_S = 15
_PASSWORD = "s3cret-of-etcd"


async def changes_of(watch: AsyncIterator[WatchBatch], count: int) -> list[Change]:
    changes: list[Change] = []
    with trio.fail_after(_DEADLINE_S):
        while len(changes) < count:
            changes += (await anext(watch)).changes
    return changes


async def until_broken(watch: AsyncIterator[WatchBatch]) -> StoreUnavailableError:
    with trio.fail_after(_DEADLINE_S):
        try:
            async for _ in watch:
                pass
        except StoreUnavailableError as exc:
            return exc
    pytest.fail("the watch ended without an error")


def assert_one_clear_line(error: Exception, *parts: str) -> None:
    """The message is one line with these parts, and does not give the password away."""
    text = str(error)
    assert "\n" not in text
    assert len(text) < 600
    for part in parts:
        assert part in text
    assert _PASSWORD not in text + repr(error)


def every_call(store: EtcdStore, prefix: str) -> dict[str, Callable[[], Awaitable[object]]]:
    async def watch() -> None:
        async with store.watch_prefix(prefix, after_revision=0) as batches:
            await anext(batches)

    return {
        "list": partial(store.list_prefix, prefix),
        "commit": partial(store.commit, [], [Put(f"{prefix}k", b"")]),
        "grant": partial(store.grant_lease, 60),
        "keep": partial(store.keep_alive, LeaseId(1)),
        "revoke": partial(store.revoke_lease, LeaseId(1)),
        "watch": watch,
    }


CALLS = ("list", "commit", "grant", "keep", "revoke", "watch")


class TestKilled:
    async def test_a_watch_breaks_and_resumes_without_a_gap(
        self, own_etcd: EtcdServer, connect: Connect, prefix: str
    ) -> None:
        async with (
            connect(EtcdConfig(endpoints=(own_etcd.client_url,))) as store,
            connect(EtcdConfig(endpoints=(own_etcd.client_url,))) as writer,
        ):
            async with store.watch_prefix(prefix, after_revision=0) as watch:
                await writer.commit([], [Put(f"{prefix}1", b"")])
                (first,) = await changes_of(watch, 1)
                own_etcd.kill()
                error = await until_broken(watch)
                assert_one_clear_line(error, prefix, own_etcd.client_url, "check --etcd")
                with pytest.raises(StoreUnavailableError):
                    await anext(watch)
            for name, call in every_call(store, prefix).items():
                with trio.fail_after(1), pytest.raises(StoreUnavailableError) as caught:
                    await call()
                # What gRPC says of it depends on how far the call had come when etcd was killed.
                assert_one_clear_line(caught.value, own_etcd.client_url, "check --etcd")
                assert caught.value.retryable, name
            own_etcd.start()
            own_etcd.wait_healthy()
            own_etcd.ctl("put", f"{prefix}2", "")
            own_etcd.ctl("del", f"{prefix}1")
            await until_it_answers(store)
            async with store.watch_prefix(prefix, after_revision=first.revision) as watch:
                assert await changes_of(watch, 2) == [
                    Change(f"{prefix}2", b"", first.revision + 1),
                    Change(f"{prefix}1", None, first.revision + 2),
                ]

    async def test_the_same_cluster_is_recognised(
        self, own_etcd: EtcdServer, etcd_server: EtcdServer, connect: Connect
    ) -> None:
        async with (
            connect(EtcdConfig(endpoints=(own_etcd.client_url,))) as one,
            connect(EtcdConfig(endpoints=(etcd_server.client_url,))) as other,
        ):
            first, second = await one.list_prefix("/none"), await other.list_prefix("/none")
        own_etcd.restart()
        async with connect(EtcdConfig(endpoints=(own_etcd.client_url,))) as one:
            again = await one.list_prefix("/none")
        assert first.cluster_id == again.cluster_id != second.cluster_id


async def until_it_answers(store: EtcdStore) -> None:
    for _ in range(500):
        with suppress(StoreUnavailableError):
            await store.list_prefix("/none")
            return
        await trio.sleep(0.02)
    pytest.fail("etcd does not answer")


class TestPaused:
    async def test_calls_time_out(
        self, etcd_server: EtcdServer, connect: Connect, prefix: str, paused: Callable[[], None]
    ) -> None:
        config = EtcdConfig(endpoints=(etcd_server.client_url,), timeout_s=0.3)
        async with connect(config) as store:
            calls = every_call(store, prefix)
            await store.commit([], [])
            paused()
            for name in CALLS:
                with trio.fail_after(2), pytest.raises(StoreUnavailableError) as caught:
                    await calls[name]()
                assert_one_clear_line(
                    caught.value, etcd_server.client_url, "no answer within 0.3 s", "check --etcd"
                )

    @pytest.mark.parametrize("call", CALLS)
    async def test_a_waiting_call_is_cancelled_at_once(
        self,
        etcd_server: EtcdServer,
        connect: Connect,
        prefix: str,
        paused: Callable[[], None],
        call: str,
    ) -> None:
        async with connect(EtcdConfig(endpoints=(etcd_server.client_url,))) as store:
            await store.commit([], [])
            paused()
            with trio.fail_after(1), trio.move_on_after(0.05) as scope:
                await every_call(store, prefix)[call]()
            assert scope.cancelled_caught

    async def test_a_watch_notices_the_silence(
        self, etcd_server: EtcdServer, connect: Connect, prefix: str, paused: Callable[[], None]
    ) -> None:
        config = EtcdConfig(endpoints=(etcd_server.client_url,), silence_s=1)
        async with connect(config) as store:
            start = (await store.commit([], [Put(f"{prefix}1", b"")])).revision
            async with store.watch_prefix(prefix, after_revision=start) as watch:
                for _ in range(3):  # quiet for longer than it may be silent
                    assert not (await anext(watch)).changes
                await trio.to_thread.run_sync(paused)
                began = trio.current_time()
                error = await until_broken(watch)
                assert 0.5 < trio.current_time() - began < 3
            assert_one_clear_line(error, etcd_server.client_url, "no answer within 1 s")
            etcd_server.resume()
            await store.commit([], [Put(f"{prefix}2", b"")])
            async with store.watch_prefix(prefix, after_revision=start) as watch:
                (change,) = await changes_of(watch, 1)
            assert change.key == f"{prefix}2"

    async def test_a_busy_reader_does_not_count_as_silence(
        self, etcd_server: EtcdServer, connect: Connect, prefix: str
    ) -> None:
        config = EtcdConfig(endpoints=(etcd_server.client_url,), silence_s=0.4)
        async with connect(config) as store:
            start = (await store.commit([], [Put(f"{prefix}1", b"")])).revision
            async with store.watch_prefix(prefix, after_revision=start) as watch:
                for _ in range(2):
                    await trio.sleep(0.6)  # the reader is busy; not a wait for anything
                    assert not (await anext(watch)).changes

    @pytest.fixture
    def paused(self, etcd_server: EtcdServer) -> Iterator[Callable[[], None]]:
        """Call it to freeze the shared etcd until the end of the test."""
        yield etcd_server.pause
        etcd_server.resume()
        etcd_server.wait_healthy()


class TestEndpoints:
    async def test_a_dead_endpoint_is_passed_over(
        self, etcd_server: EtcdServer, connect: Connect, prefix: str, dead_url: str
    ) -> None:
        config = EtcdConfig(endpoints=(dead_url, etcd_server.client_url))
        for call in CALLS:
            async with connect(config) as store:  # a new one each time: it prefers the dead one
                # Answers of etcd's: the lease is unknown, revision 1 is compacted.
                with suppress(LeaseExpiredError, CompactedError), trio.fail_after(_DEADLINE_S):
                    await every_call(store, prefix)[call]()

    async def test_a_silent_endpoint_leaves_time_for_the_next(
        self, etcd_server: EtcdServer, prefix: str, silent_url: str
    ) -> None:
        config = EtcdConfig(endpoints=(silent_url, etcd_server.client_url), timeout_s=1)
        async with aclosing(EtcdStore(config)) as store:
            with trio.fail_after(2):
                await store.list_prefix(prefix)
            # And it is remembered.
            with trio.fail_after(0.4):
                assert (await store.commit([], [Put(f"{prefix}k", b"")])).succeeded

    async def test_a_commit_with_unknown_outcome_is_not_repeated(
        self, etcd_server: EtcdServer, prefix: str, silent_url: str
    ) -> None:
        config = EtcdConfig(endpoints=(silent_url, etcd_server.client_url), timeout_s=0.3)
        async with aclosing(EtcdStore(config)) as store:
            with pytest.raises(StoreUnavailableError) as caught:
                await store.commit([], [Put(f"{prefix}k", b"")])
            assert etcd_server.client_url not in str(caught.value)
            assert (await store.commit([], [Put(f"{prefix}k", b"")])).succeeded

    async def test_all_dead(self, connect: Connect, prefix: str, dead_url: str) -> None:
        other = "http://127.0.0.1:1"
        async with connect(EtcdConfig(endpoints=(dead_url, other))) as store:
            with trio.fail_after(2), pytest.raises(StoreUnavailableError) as caught:
                await store.list_prefix(prefix)
        assert_one_clear_line(caught.value, prefix, dead_url, other, "refused", "check --etcd")

    async def test_ipv6_literal(self, connect: Connect, tmp_path: Path, prefix: str) -> None:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            url = f"http://[::1]:{probe.getsockname()[1]}"
        server = EtcdServer(tmp_path / "data", client_url=url, log_file=tmp_path / "log")
        with server:
            server.wait_healthy()
            async with connect(EtcdConfig(endpoints=(url,))) as store:
                assert (await store.commit([], [Put(f"{prefix}k", b"")])).succeeded

    async def test_a_closed_store(
        self, etcd_server: EtcdServer, connect: Connect, prefix: str
    ) -> None:
        async with connect(EtcdConfig(endpoints=(etcd_server.client_url,))) as store:
            start = (await store.list_prefix(prefix)).revision
            async with store.watch_prefix(prefix, after_revision=start) as watch:
                await store.aclose()
                await until_broken(watch)
            for call in every_call(store, prefix).values():
                with pytest.raises(StoreUnavailableError, match="the connection was closed"):
                    await call()

    @pytest.fixture
    def dead_url(self) -> Iterator[str]:
        """Bound and not listening: connections are refused, and nobody else gets the port."""
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"

    @pytest.fixture
    def silent_url(self) -> Iterator[str]:
        """Accepts connections (the kernel does) and never says anything.

        gRPC holds such a connection for its 3 s of connecting even when closed, so the tests do
        not wait until nothing is left.
        """
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class TestSize:
    async def test_ten_thousand_keys(
        self, etcd_server: EtcdServer, connect: Connect, prefix: str
    ) -> None:
        async with connect(EtcdConfig(endpoints=(etcd_server.client_url,))) as store:
            keys = [f"{prefix}{number:05}" for number in range(10_000)]
            for start in range(0, len(keys), 100):
                await store.commit([], [Put(key, b"v" * 100) for key in keys[start : start + 100]])
            began = trio.current_time()
            listing = await store.list_prefix(prefix)
            assert trio.current_time() - began < 5
            assert [kv.key for kv in listing.items] == keys
            start = listing.items[0].mod_revision - 1
            async with store.watch_prefix(prefix, after_revision=start) as watch:
                changes = await changes_of(watch, 10_000)
            assert [change.key for change in changes] == keys

    async def test_more_than_grpcs_default_message(
        self, etcd_server: EtcdServer, connect: Connect, prefix: str
    ) -> None:
        async with connect(EtcdConfig(endpoints=(etcd_server.client_url,))) as store:
            value = bytes(1_000_000)
            for number in range(6):
                await store.commit([], [Put(f"{prefix}{number}", value)])
            listing = await store.list_prefix(prefix)
            assert [kv.value == value for kv in listing.items] == [True] * 6
            start = listing.items[0].mod_revision - 1
            async with store.watch_prefix(prefix, after_revision=start) as watch:
                assert len(await changes_of(watch, 6)) == 6
            with pytest.raises(UsageError, match="too large"):
                await store.commit([], [Put(f"{prefix}x", bytes(2_000_000))])
            await store.commit([], [Delete(kv.key) for kv in listing.items])

    async def test_progress_moves_a_quiet_watch_on(
        self, start_etcd: StartEtcd, connect: Connect, prefix: str, tmp_path: Path
    ) -> None:
        args = ["--experimental-watch-progress-notify-interval=200ms"]
        with start_etcd(tmp_path, args=args) as server:
            async with (
                connect(EtcdConfig(endpoints=(server.client_url,))) as store,
                store.watch_prefix(prefix, after_revision=0) as watch,
            ):
                elsewhere = await store.commit([], [Put("/elsewhere", b"")])
                with trio.fail_after(_DEADLINE_S):
                    async for batch in watch:
                        assert not batch.changes
                        if batch.revision >= elsewhere.revision:
                            break


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tls")
    for ca in ("ca", "other-ca"):
        make_ca(directory, ca)
    for name in ("server", "client"):
        make_certificate(directory, name)
    return directory


@pytest.fixture(scope="module")
def tls_server(certificates: Path, start_etcd: StartEtcd) -> Iterator[EtcdServer]:
    with start_etcd(
        certificates / "etcd",
        scheme="https",
        args=server_flags(certificates),
        ctl=client_flags(certificates, "client"),
    ) as server:
        yield server


class TestTls:
    async def test_with_a_client_certificate(
        self, tls_server: EtcdServer, certificates: Path, connect: Connect, prefix: str
    ) -> None:
        config = EtcdConfig(
            endpoints=(tls_server.client_url,),
            ca_file=certificates / "ca.crt",
            cert_file=certificates / "client.crt",
            key_file=certificates / "client.key",
        )
        async with connect(config) as store:
            assert (await store.commit([Absent(f"{prefix}k")], [Put(f"{prefix}k", b"")])).succeeded
            async with store.watch_prefix(prefix, after_revision=0) as watch:
                assert len(await changes_of(watch, 1)) == 1

    @pytest.mark.parametrize(
        ("ca", "client", "scheme"),
        [
            ("other-ca", "client", "https"),
            ("ca", None, "https"),
            ("ca", "other-ca", "https"),
            ("ca", "client", "http"),
        ],
    )
    async def test_a_failed_handshake_is_told(
        self,
        tls_server: EtcdServer,
        certificates: Path,
        connect: Connect,
        ca: str,
        client: str | None,
        scheme: str,
    ) -> None:
        config = EtcdConfig(
            endpoints=(tls_server.client_url.replace("https", scheme),),
            ca_file=certificates / f"{ca}.crt",
            cert_file=certificates / f"{client}.crt" if client else None,
            key_file=certificates / f"{client}.key" if client else None,
        )
        async with connect(config) as store:
            with trio.fail_after(6), pytest.raises(StoreUnavailableError) as caught:
                await store.list_prefix("/")
        remedy = "check --etcd-ca" if scheme == "https" else "check --etcd"
        assert_one_clear_line(caught.value, config.endpoints[0], remedy)

    async def test_one_outage_has_one_message(self, connect: Connect) -> None:
        """Whichever endpoint is asked first: a log that says each again would be filled."""
        endpoints = tuple(f"http://127.0.0.1:{port}" for port in (1, 2, 3))
        said = set()
        async with connect(EtcdConfig(endpoints=endpoints)) as store:
            for _ in range(4):
                with pytest.raises(StoreUnavailableError) as caught:
                    await store.list_prefix("/")
                said.add(str(caught.value))
                store._move_on_from(store._endpoints[store._current])  # as another task's call does
        (message,) = said
        assert all(endpoint in message for endpoint in endpoints)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        config = EtcdConfig(endpoints=("https://[::1]",), ca_file=tmp_path / "absent")
        with pytest.raises(UsageError, match=r"--etcd-ca .*absent: No such file"):
            EtcdStore(config)


@pytest.fixture(scope="module")
def auth_server(
    start_etcd: StartEtcd, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EtcdServer]:
    directory = tmp_path_factory.mktemp("auth")
    with start_etcd(directory, args=["--bcrypt-cost=4"], ctl=[]) as server:
        for user in ("root", "mesh", "guest"):
            server.ctl("user", "add", f"{user}:{_PASSWORD}")
        server.ctl("role", "add", "mesh")
        server.ctl("role", "grant-permission", "mesh", "readwrite", "/test/", "/test0")
        server.ctl("user", "grant-role", "mesh", "mesh")
        server.ctl("user", "grant-role", "root", "root")
        server.ctl("auth", "enable")
        yield server


class TestAuth:
    def config(self, server: EtcdServer, user: str | None, password: str = _PASSWORD) -> EtcdConfig:
        return EtcdConfig(
            endpoints=(server.client_url,), user=user, password=password if user else None
        )

    async def test_with_the_right_password(
        self, auth_server: EtcdServer, connect: Connect, prefix: str
    ) -> None:
        async with connect(self.config(auth_server, "mesh")) as store:
            lease_id = await store.grant_lease(60)
            assert (await store.commit([], [Put(f"{prefix}k", b"", lease_id)])).succeeded
            assert len((await store.list_prefix(prefix)).items) == 1
            assert await store.keep_alive(lease_id) == 60
            async with store.watch_prefix(prefix, after_revision=0) as watch:
                assert len(await changes_of(watch, 1)) == 1
            await store.revoke_lease(lease_id)

    @pytest.mark.parametrize("call", ["list", "commit", "watch"])
    async def test_with_a_wrong_password(
        self, auth_server: EtcdServer, connect: Connect, prefix: str, call: str
    ) -> None:
        async with connect(self.config(auth_server, "mesh", f"not {_PASSWORD}")) as store:
            with pytest.raises(PolicyRefusedError) as caught:
                await every_call(store, prefix)[call]()
        assert_one_clear_line(
            caught.value, "'mesh'", "invalid user ID or password", "check --etcd-user"
        )

    @pytest.mark.parametrize("call", ["list", "commit", "watch"])
    async def test_without_permission(
        self, auth_server: EtcdServer, connect: Connect, prefix: str, call: str
    ) -> None:
        async with connect(self.config(auth_server, "guest")) as store:
            with pytest.raises(PolicyRefusedError) as caught:
                await every_call(store, prefix)[call]()
        assert_one_clear_line(
            caught.value, prefix, "'guest'", "permission denied", "grant-permission"
        )

    @pytest.mark.parametrize("call", ["list", "commit", "watch"])
    async def test_without_a_user(
        self, auth_server: EtcdServer, connect: Connect, prefix: str, call: str
    ) -> None:
        async with connect(self.config(auth_server, None)) as store:
            with pytest.raises(PolicyRefusedError) as caught:
                await every_call(store, prefix)[call]()
        assert_one_clear_line(caught.value, "--etcd-user")

    @pytest.mark.parametrize("call", ["list", "commit", "watch"])
    async def test_a_lost_token_is_renewed(
        self, auth_server: EtcdServer, connect: Connect, prefix: str, call: str
    ) -> None:
        async with connect(self.config(auth_server, "mesh")) as store:
            await store.commit([], [Put(f"{prefix}k", b"")])
            store._session._token = "forgotten.1"
            with trio.fail_after(_DEADLINE_S):
                await every_call(store, prefix)[call]()
            assert store._session._token != "forgotten.1"

    async def test_a_password_that_is_changed_meanwhile(
        self, auth_server: EtcdServer, connect: Connect, prefix: str
    ) -> None:
        """It is refused by name, and the store goes on once it is the right one again."""

        def set_password(password: str) -> None:
            root = partial(auth_server.ctl, f"--user=root:{_PASSWORD}", "user")
            with suppress(StoreUnavailableError):  # the first time there is none
                root("delete", "changing")
            root("add", f"changing:{password}")
            root("grant-role", "changing", "mesh")

        set_password(_PASSWORD)
        async with connect(self.config(auth_server, "changing")) as store:
            await store.commit([], [Put(f"{prefix}k", b"")])
            calls = every_call(store, prefix)
            set_password(f"not {_PASSWORD}")
            for call in (calls["list"], calls["commit"], calls["watch"]):
                with pytest.raises(PolicyRefusedError) as caught:
                    await call()
                assert_one_clear_line(
                    caught.value, "'changing'", "invalid user ID or password", "check --etcd-user"
                )
            set_password(_PASSWORD)
            with trio.fail_after(_DEADLINE_S):
                for call in (calls["list"], calls["commit"], calls["watch"]):
                    await call()

    async def test_many_calls_log_in_once(
        self, auth_server: EtcdServer, connect: Connect, prefix: str
    ) -> None:
        async with connect(self.config(auth_server, "mesh")) as store:
            tokens: set[str | None] = set()

            async def read() -> None:
                await store.list_prefix(prefix)
                tokens.add(store._session._token)

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(read)
            assert len(tokens) == 1

    async def test_a_user_where_none_is_needed(
        self, etcd_server: EtcdServer, connect: Connect, prefix: str
    ) -> None:
        async with connect(self.config(etcd_server, "mesh")) as store:
            assert (await store.commit([], [Put(f"{prefix}k", b"")])).succeeded

    def test_the_password_is_not_shown(self) -> None:
        config = EtcdConfig(endpoints=("http://[::1]:1",), user="mesh", password=_PASSWORD)
        assert _PASSWORD not in repr(config)
        assert _PASSWORD not in str(config)


@pytest.mark.parametrize(
    "config",
    [
        {"endpoints": ()},
        {"endpoints": ("127.0.0.1:2379",)},
        {"endpoints": ("ftp://127.0.0.1",)},
        {"endpoints": ("http://127.0.0.1:70000",)},
        {"endpoints": ("http://[::1:2379",)},
        {"endpoints": ("http://::1:2379",)},
        {"endpoints": ("http://",)},
        {"endpoints": ("http://127.0.0.1/v3",)},
        {"endpoints": (f"http://mesh:{_PASSWORD}@127.0.0.1",)},
        {"endpoints": ("http://a",), "user": "mesh"},
        {"endpoints": ("http://a",), "password": _PASSWORD},
        {"endpoints": ("http://a",), "cert_file": "a.crt"},
    ],
)
def test_a_malformed_configuration_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        EtcdConfig(**config)  # type: ignore[arg-type]
    assert_one_clear_line(caught.value)


def test_importing_and_failing_is_quiet() -> None:
    """gRPC and protobuf write no warnings to stderr, nor when a program is started."""
    program = (
        "import subprocess, trio\n"
        "from meshnet.store.etcd import EtcdConfig, EtcdStore, StoreUnavailableError\n"
        "async def main():\n"
        "    store = EtcdStore(EtcdConfig(endpoints=('http://127.0.0.1:1',)))\n"
        "    try: await store.list_prefix('/')\n"
        "    except StoreUnavailableError: subprocess.run(['true'], preexec_fn=lambda: None)\n"
        "trio.run(main)\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    assert (result.stdout, result.stderr) == ("", "")
