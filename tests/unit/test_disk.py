"""What the agent finds on its disk: damage costs what is damaged, and nothing more."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import structlog

from meshnet.codec.endpoints import encode_endpoint
from meshnet.model import EndpointId
from meshnet.store.memory import MemoryStore
from meshnet_agent.disk import StateDir
from meshnet_agent.identity import MeshIdentity
from tests.values import make_endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GOOD = make_endpoint()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDir]:
    with structlog.testing.capture_logs():
        opened = StateDir(tmp_path, lambda: "i1")
        yield opened
        opened.close()


def test_an_endpoint_cut_at_any_byte_is_set_aside(state: StateDir) -> None:
    state.save_endpoint(GOOD)
    other = replace(GOOD, id=EndpointId("aaaaaaaaaaaa"))
    file = state.path / "endpoints" / f"{other.id}.json"
    whole = encode_endpoint(other)
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert state.load_endpoints() == ([GOOD], {other.id})
        (bad,) = file.parent.glob("*.bad")
        assert bad.read_bytes() == whole[:size]
        bad.unlink()


def test_a_record_under_another_endpoints_name_is_not_taken(state: StateDir) -> None:
    """Its own link would be taken for one that nobody recorded, and be removed."""
    file = state.path / "endpoints" / "aaaaaaaaaaaa.json"
    file.write_bytes(encode_endpoint(GOOD))
    assert state.load_endpoints() == ([], {"aaaaaaaaaaaa"})


def test_what_was_set_aside_stays(state: StateDir) -> None:
    file = state.path / "endpoints" / f"{GOOD.id}.json"
    for content in (b"1", b"2", b"3"):
        file.write_bytes(content)
        assert state.load_endpoints() == ([], {GOOD.id})
    kept = {found.name: found.read_bytes() for found in file.parent.iterdir()}
    stem = GOOD.id
    assert kept == {f"{stem}.bad": b"1", f"{stem}.bad.1": b"2", f"{stem}.bad.2": b"3"}


def test_a_directory_in_the_place_of_a_record(state: StateDir) -> None:
    state.save_endpoint(GOOD)
    (state.path / "endpoints" / "aaaaaaaaaaaa.json").mkdir()
    assert state.load_endpoints() == ([GOOD], {"aaaaaaaaaaaa"})


@pytest.mark.parametrize("content", [b"\xff", b"", b"a b", b"x" * 100, b"\0"])
def test_an_instance_that_is_no_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "instance").write_bytes(content)
    with structlog.testing.capture_logs():
        opened = StateDir(tmp_path, lambda: "i2")
    opened.close()
    assert opened.instance == (tmp_path / "instance").read_text() == "i2"
    assert (tmp_path / "instance.bad").read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [b"", b'{"id":"m"}', b'{"id":"m","revision":Infinity}', b'{"id":"m","revision":1e400}',
     b'{"id":null,"revision":1}', b'{"id":"m","revision":-1}', b"[" * 9000, b"\xff"],
)  # fmt: skip
async def test_a_mesh_file_that_is_damaged(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mesh.json"
    file.write_bytes(content)
    with structlog.testing.capture_logs():
        await MeshIdentity(MemoryStore(), file).check()
    assert (tmp_path / "mesh.bad").read_bytes() == content
    assert file.exists()
