"""What the agent finds on its disk: damage costs only what is damaged."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import pytest
import structlog

from meshnet.codec.endpoints import decode_endpoint, encode_endpoint
from meshnet.errors import PolicyRefusedError
from meshnet.model import EndpointId
from meshnet.runtime.spec.options import ContainerOptions
from meshnet.sandbox import NetnsId
from meshnet.store import Change, Delete, Put, WatchBatch
from meshnet.store.memory import MemoryStore
from meshnet.store.mirror import MESH, MESH_ID, NETWORKS, Mirror
from meshnet.store.saved import encode_saved
from meshnet.system.files import write_whole
from meshnet_agent.containers import record as container_record
from meshnet_agent.endpoints.records import EndpointRecords
from meshnet_agent.mesh.identity import MeshIdentity
from meshnet_agent.state_dir import StateDir
from tests.values import make_endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GOOD = make_endpoint()


@pytest.fixture
def records(state: StateDir) -> EndpointRecords:
    return EndpointRecords(state.endpoints)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDir]:
    with structlog.testing.capture_logs():
        opened = StateDir(tmp_path, lambda: "i1")
        yield opened
        opened.close()


def test_an_endpoint_cut_at_any_byte_is_set_aside(
    state: StateDir, records: EndpointRecords
) -> None:
    records.save(GOOD)
    other = replace(GOOD, id=EndpointId("aaaaaaaaaaaa"))
    file = state.endpoints / f"{other.id}.json"
    whole = encode_endpoint(other)
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert records.load() == ([GOOD], {other.id})
        (bad,) = file.parent.glob("*.bad")
        assert bad.read_bytes() == whole[:size]
        bad.unlink()


def test_an_endpoint_with_any_bit_changed_is_not_believed(
    state: StateDir, records: EndpointRecords
) -> None:
    """The agent would program the kernel with another endpoint's address."""
    records.save(GOOD)
    (file,) = state.endpoints.iterdir()
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        endpoints, _ = records.load()
        assert endpoints in ([], [GOOD])
        for bad in file.parent.glob("*.bad"):
            bad.unlink()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """/dev/full is a disk that takes no byte."""
    (tmp_path / "file.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_record_of_a_version_without_checksums_is_taken(
    state: StateDir, records: EndpointRecords
) -> None:
    file = state.endpoints / f"{GOOD.id}.json"
    file.write_bytes(encode_endpoint(GOOD))
    assert records.load() == ([GOOD], set())


def test_a_record_of_a_version_without_devices_is_of_this_machines_nsfs(
    state: StateDir, records: EndpointRecords
) -> None:
    document = json.loads(encode_endpoint(GOOD))
    del document["netns_device"]
    (state.endpoints / f"{GOOD.id}.json").write_text(json.dumps(document))
    netns = NetnsId(os.stat("/proc/self/ns/net").st_dev, GOOD.sandbox.netns.inode)
    assert records.load() == ([replace(GOOD, sandbox=replace(GOOD.sandbox, netns=netns))], set())


def test_a_record_of_this_version_can_be_read_by_one_without_checksums(
    state: StateDir, records: EndpointRecords
) -> None:
    records.save(GOOD)
    (file,) = state.endpoints.iterdir()
    assert decode_endpoint(file.read_bytes()) == GOOD


def test_a_record_under_another_endpoints_name_is_not_taken(
    state: StateDir, records: EndpointRecords
) -> None:
    """The agent would take the endpoint's own link for an unrecorded one, and remove it."""
    file = state.endpoints / "aaaaaaaaaaaa.json"
    file.write_bytes(encode_endpoint(GOOD))
    assert records.load() == ([], {"aaaaaaaaaaaa"})


def test_what_was_set_aside_stays(state: StateDir, records: EndpointRecords) -> None:
    file = state.endpoints / f"{GOOD.id}.json"
    for content in (b"1", b"2", b"3"):
        file.write_bytes(content)
        assert records.load() == ([], {GOOD.id})
    kept = {found.name: found.read_bytes() for found in file.parent.iterdir()}
    stem = GOOD.id
    assert kept == {f"{stem}.bad": b"1", f"{stem}.bad.1": b"2", f"{stem}.bad.2": b"3"}


def test_a_directory_in_the_place_of_a_record(state: StateDir, records: EndpointRecords) -> None:
    records.save(GOOD)
    (state.endpoints / "aaaaaaaaaaaa.json").mkdir()
    assert records.load() == ([GOOD], {"aaaaaaaaaaaa"})


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


async def test_a_mesh_file_with_any_bit_changed_is_not_believed(tmp_path: Path) -> None:
    """The agent would refuse its own mesh, or remember a revision that never was."""
    store, file = MemoryStore(), tmp_path / "mesh.json"
    await MeshIdentity(store, file).check()
    whole = file.read_bytes()
    with structlog.testing.capture_logs():
        for at in range(len(whole)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            await MeshIdentity(store, file).check()
            for bad in tmp_path.glob("*.bad*"):  # noqa: ASYNC240
                bad.unlink()
    assert file.read_bytes() == whole


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


VERSIONED = (
    "mesh.json",
    "snapshot.json",
    f"endpoints/{GOOD.id}.json",
    f"endpoints/{GOOD.id}.draft",
    "containers/c1/container.json",
    "takeover/mnp4097.json",
)


@pytest.mark.parametrize("name", VERSIONED)
def test_a_file_of_a_newer_agent_is_refused_and_everything_left_as_it_is(
    tmp_path: Path, name: str
) -> None:
    """If it were set aside, the newer agent would not have it when it is started again."""
    state = StateDir(tmp_path, lambda: "i1")
    EndpointRecords(state.endpoints).save(GOOD)
    state.close()
    file = state.path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    known = 2 if name.startswith(("endpoints", "containers")) else 1
    file.write_text(json.dumps({"v": known + 1, "anything": "else"}))
    (state.endpoints / "bbbbbbbbbbbb.json").write_bytes(b"damaged")
    (state.endpoints / "cccccccccccc.json.new").write_bytes(b"unfinished")
    before = contents(state.path)
    with pytest.raises(
        PolicyRefusedError, match=rf"{name} was .* newer .*version {known + 1}.*knows {known}"
    ):
        StateDir(state.path, lambda: "i2")
    assert contents(state.path) == before
    file.unlink()
    again = StateDir(state.path, lambda: "i2")  # the refusal let go of the lock
    assert again.instance == "i1"
    again.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"v":null}', b'{"v":"2"}', b'{"v":1}', b"[" * 100_000, b'{"v":' + b"9" * 5000],
)
def test_what_has_no_version_is_no_newer_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mesh.json").write_bytes(content)
    StateDir(tmp_path, lambda: "i1").close()


async def test_every_file_that_the_agent_writes_has_a_version(
    state: StateDir, records: EndpointRecords
) -> None:
    records.save(GOOD)
    records.save_draft(GOOD)
    await MeshIdentity(MemoryStore(), state.mesh).check()
    record = container_record.ContainerRecord(
        id="c1", name="web", options=ContainerOptions(), created_s=0, args=("x",), lowerdirs=()
    )
    directory = state.containers / "c1"
    directory.mkdir(parents=True)
    container_record.save(directory, record)
    (state.path / "snapshot.json").write_bytes(
        encode_saved(Mirror().state(), mesh="m1", host=GOOD.host, now_s=0)
    )
    for name in VERSIONED[:5]:
        version = 2 if name.startswith("containers/") else 1
        assert json.loads((state.path / name).read_bytes())["v"] == version
    assert list(container_record.load_all(state.containers)) == [record]
    # Agents before this one wrote none.
    document = msgspec.json.decode(msgspec.json.encode(record))
    del document["v"]
    (directory / "container.json").write_bytes(msgspec.json.encode(document))
    assert list(container_record.load_all(state.containers)) == [record]


async def _written(network: bytes, *after: Put | Delete) -> MemoryStore:
    """A mesh's store: all that are made here know one name, so it is the history that differs."""
    store = MemoryStore()
    for write in (Put(MESH_ID, b"m"), Put(f"{NETWORKS}one", network), *after):
        await store.commit([], [write])
    return store


@pytest.mark.parametrize("last", [Put(f"{NETWORKS}two", b"2"), Delete(f"{NETWORKS}one")])
async def test_a_store_that_was_restored_and_has_gone_on_is_refused(
    tmp_path: Path, last: Put | Delete
) -> None:
    """Its revision is not older than what was seen, but it lacks the last change that was seen."""
    mirror = Mirror()
    mirror.add_listed((await (await _written(b"1")).list_prefix(MESH)).items)
    before = await _written(b"1", last)
    mirror.apply(WatchBatch((Change(last.key, getattr(last, "value", None), 4),), 4))
    await MeshIdentity(before, tmp_path / "mesh.json").check_history(mirror)
    restored = await _written(b"1", *(Put(f"{MESH}other", b"x") for _ in range(9)))
    identity = MeshIdentity(restored, tmp_path / "mesh.json")
    await identity.check()
    with pytest.raises(PolicyRefusedError, match="at revision 4 is not what it was"):
        await identity.check_history(mirror)
