"""Stores to test: a fresh one in memory, and clients of a real etcd that the session shares.

A test that uses one ends with a check that no thread and no socket is left behind.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import trio

from meshnet.lab.etcd import EtcdServer
from meshnet.store.etcd import EtcdConfig, EtcdStore
from meshnet.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from pathlib import Path

    from meshnet.store import Store

    Connect = Callable[[EtcdConfig], AbstractAsyncContextManager[EtcdStore]]
    StartEtcd = Callable[..., AbstractContextManager[EtcdServer]]


@dataclass(frozen=True)
class StoreUnderTest:
    """A store, and what a test needs to do behind its back."""

    store: Store
    compact: Callable[[int], Awaitable[None]]


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_etcd(
    directory: Path, scheme: str = "http", args: Sequence[str] = (), ctl: Sequence[str] = ()
) -> Iterator[EtcdServer]:
    """A healthy etcd on a free port of loopback; ended at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    server = EtcdServer(
        directory / "data",
        client_url=f"{scheme}://127.0.0.1:{free_port()}",
        log_file=directory / "etcd.log",
        extra_args=args,
        ctl_args=ctl,
    )
    with server:
        server.wait_healthy()
        yield server


@asynccontextmanager
async def connected(config: EtcdConfig) -> AsyncIterator[EtcdStore]:
    """An `EtcdStore` that is closed at the end."""
    store = EtcdStore(config)
    try:
        yield store
    finally:
        with trio.CancelScope(shield=True):
            await store.aclose()


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """At the end of the test every thread and socket it opened is gone, soon."""
    before = _held()
    yield
    deadline = time.monotonic() + 5
    while (left := _held() - before) and time.monotonic() < deadline:
        time.sleep(0.005)  # gRPC closes sockets and ends threads in the background
    assert not left


def _held() -> set[str]:
    """This process's sockets and threads, less trio's idle workers."""
    threads = {f"{thread.name} {thread.ident}" for thread in threading.enumerate()}
    sockets = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
        if link.startswith("socket:"):
            sockets.add(link)
    return {name for name in threads if not name.startswith("Trio thread")} | sockets


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd that belongs to one test, which may damage it."""
    with running_etcd(tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def start_etcd() -> StartEtcd:
    return running_etcd


@pytest.fixture
def connect(nothing_left: None) -> Connect:
    return connected


@pytest.fixture
def prefix() -> str:
    """A key prefix of the test's own."""
    return f"/test/{uuid.uuid4().hex}/"


@pytest.fixture(params=["memory", "etcd"])
async def under_test(
    request: pytest.FixtureRequest, etcd_server: EtcdServer, nothing_left: None
) -> AsyncIterator[StoreUnderTest]:
    if request.param == "memory":
        memory = MemoryStore()

        async def compact_memory(revision: int) -> None:
            memory.compact(revision)

        yield StoreUnderTest(memory, compact_memory)
        return

    async def compact_etcd(revision: int) -> None:
        await trio.to_thread.run_sync(etcd_server.ctl, "compact", str(revision))

    config = EtcdConfig(endpoints=(etcd_server.client_url,), silence_s=4)
    async with connected(config) as store:
        yield StoreUnderTest(store, compact_etcd)


@pytest.fixture
def store(under_test: StoreUnderTest) -> Store:
    return under_test.store
