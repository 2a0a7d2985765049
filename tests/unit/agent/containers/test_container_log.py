"""A container's log on its way to a client: whoever stops listening, its file is closed."""

from __future__ import annotations

import os
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from meshnet.runtime.engine.volumes import VolumeStore
from meshnet.runtime.spec.options import ContainerOptions
from meshnet_agent.api.routes.containers import ClosingStream
from meshnet_agent.containers.bundle.bundle import Bundle
from meshnet_agent.containers.directory import Container
from meshnet_agent.containers.log import read_log
from meshnet_agent.containers.record import ContainerRecord

if TYPE_CHECKING:
    from starlette.types import Message

LINE = b"2026-01-01T00:00:01.000000001+00:00 stdout F one\n"
OPTIONS = ContainerOptions(rootfs="/r", command=("true",))


@pytest.fixture
def container(tmp_path: Path) -> Container:
    record = ContainerRecord(
        id="c1", name="c1", options=OPTIONS, created_s=0, args=("true",), lowerdirs=("/r",)
    )
    (tmp_path / "log").write_bytes(LINE)
    bundle = Bundle(tmp_path, tmp_path / "run", tmp_path / "userns", VolumeStore(tmp_path))
    return Container(record, bundle)


def is_open(path: Path) -> bool:
    """Whether this process has a descriptor of a file."""
    for fd in Path("/proc/self/fd").iterdir():
        try:
            if os.path.samestat(os.stat(fd), os.stat(path)):
                return True
        except OSError:
            continue  # it was closed meanwhile
    return False


async def test_a_log_is_read_until_its_container_has_ended(container: Container) -> None:
    seen = b""
    with trio.fail_after(10):
        async with aclosing(read_log(container, follow=True, tail=None, since_s=None)) as chunks:
            async for chunk in chunks:
                seen += chunk
                if seen == LINE:
                    # conmon begins a new file: another takes the name.
                    container.bundle.log.unlink()
                    container.bundle.log.write_bytes(LINE)
                    container.ended.set()
    assert seen == LINE * 2
    assert not is_open(container.bundle.log)


@pytest.mark.parametrize("how", ["disconnects", "is cancelled", "breaks"])
async def test_a_client_that_goes_away_leaves_no_file_open(container: Container, how: str) -> None:
    """Left to the garbage collector, a generator cannot await what closes its file."""
    log = container.bundle.log
    body = read_log(container, follow=True, tail=None, since_s=None)
    response = ClosingStream(body, "application/octet-stream")
    came = trio.Event()
    sent: list[Any] = []

    async def receive() -> Message:
        await came.wait()
        if how != "disconnects":
            await trio.sleep_forever()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await trio.lowlevel.checkpoint()
        if message.get("body"):
            sent.append(message["body"])
            assert is_open(log)
            came.set()
            if how == "breaks":
                raise OSError("the connection is gone")

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            async def respond() -> None:
                try:
                    await response(scope, receive, send)
                except* OSError:
                    assert how == "breaks"
                came.set()
                nursery.cancel_scope.cancel()

            nursery.start_soon(respond)
            await came.wait()
            if how == "is cancelled":
                nursery.cancel_scope.cancel()
    assert sent == [LINE]
    assert not is_open(log)
