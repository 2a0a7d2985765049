"""A client that cannot be served is told so, through the descriptor that was kept in reserve."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from meshnet_agent.api.errors import raw_refusal
from meshnet_agent.api.overload import refuse_clients

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_REQUEST = b"GET /v1/status HTTP/1.1\r\nHost: agent\r\n\r\n"


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(str(tmp_path / "agent.sock"))
        made.listen(16)
        made.setblocking(False)
        logger = logging.getLogger("trio.serve_listeners")
        propagate, logger.propagate = logger.propagate, False
        yield made
        logger.propagate = propagate


async def never(_stream: trio.SocketStream) -> None:
    pytest.fail("a client was taken")


async def test_clients_are_told_when_descriptors_are_used_up(listener: socket.socket) -> None:
    path = listener.getsockname()
    clients = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    serving = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refuse_clients, listener, raw_refusal)
        await trio.testing.wait_all_tasks_blocked()
        # The lowest free number is the first that must not be given out.
        probe = os.open(os.devnull, os.O_RDONLY)
        os.close(probe)
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe, before[1]))
        try:
            nursery.start_soon(trio.serve_listeners, never, [serving])
            for client in clients:
                client.connect(path)
                client.sendall(_REQUEST)
            for client in clients:
                client.settimeout(0)
                # None is closed before the end: that would make room for the next.
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
                with trio.fail_after(10):
                    answer = b"".join([part async for part in stream])
                head, _, body = answer.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 500 ")
                error = json.loads(body)["error"]
                assert error["exit_status"] == 7
                assert "Too many open files" in error["message"]
                assert "LimitNOFILE" in error["message"]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for client in clients:
                client.close()
        nursery.cancel_scope.cancel()


def test_the_reason_is_named() -> None:
    assert b"fs.file-max" in raw_refusal(errno.ENFILE)
    assert b"LimitNOFILE" in raw_refusal(errno.EBADF)
