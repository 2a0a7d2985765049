"""The files that an agent keeps, damaged at any byte: what is good is kept, nothing is deleted."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.codec.document import BadValueError
from meshnet.codec.endpoints import encode_endpoint
from meshnet.errors import MeshnetError, PolicyRefusedError
from meshnet.kernel.drivers.nft import NftTables
from meshnet.model import HostId
from meshnet.store.memory import MemoryStore
from meshnet.store.mirror import Mirror
from meshnet.store.saved import decode_saved, encode_saved
from meshnet.vtep.rundir import RunDir
from meshnet_agent.endpoints.records import EndpointRecords
from meshnet_agent.mesh.identity import MeshIdentity
from meshnet_agent.state_dir import StateDir, set_aside
from tests.hostile.campaign import (
    Campaign,
    assert_clear,
    damage_bytes,
    damaged,
    pack,
    unpack,
)
from tests.hostile.datapath import DOCUMENTS, make_table
from tests.unit.packets import VNI
from tests.values import make_endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from random import Random

    from tests.hostile.campaign import Check

_IDS = ("0123456789aa", "0123456789ab", "0123456789ac")
_ENDPOINTS = {
    f"endpoints/{identity}.json": encode_endpoint(
        make_endpoint((f"10.42.0.{i + 2}/24",), identity=identity)
    )
    for i, identity in enumerate(_IDS)
}
_INSTANCE = b"dea4347ca8b022f6"
FILES = {
    **_ENDPOINTS,
    "instance": _INSTANCE,
    "mesh.json": b'{"id": "0123456789abcdef", "revision": 4711}',
    "snapshot.json": encode_saved(
        Mirror().state(), mesh="0123456789abcdef", host=HostId("h1"), now_s=0
    ),
    "firewall.json": json.dumps(
        {"text": "table", "listing_sha256": hashlib.sha256(b"").hexdigest()}
    ).encode(),
    "vtep/state.json": json.dumps({"v": 1, "vni": VNI, "peers": DOCUMENTS}).encode(),
}
_NAMES = tuple(FILES)


def _make(random: Random) -> bytes:
    """A file and what is in it."""
    name = random.choice(_NAMES)
    content = FILES[name]
    if name == "instance" or random.randrange(2):
        content = damage_bytes(random, content)
    else:
        content = damaged(random, json.loads(content))
    return pack(name.encode(), content)


def check(data: bytes, directory: Path) -> str:
    """The agent's loaders take every other file, and what is in this one or nothing."""
    name, content, *_ = (*unpack(data), b"", b"")
    shutil.rmtree(directory, ignore_errors=True)
    for each, good in FILES.items():
        file = directory / each
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if each.encode() == name else good)
    try:
        state = StateDir(directory, lambda: "0123456789abcdef")
    except PolicyRefusedError as error:  # it says that a newer version wrote it
        assert_clear(str(error))
        assert (directory / name.decode()).read_bytes() == content
        return "refused"
    try:
        endpoints, unreadable = EndpointRecords(state.endpoints).load()
        MeshIdentity(MemoryStore(clock=lambda: 0.0), directory / "mesh.json").save()
        NftTables(directory / "firewall.json")
        _load_snapshot(directory / "snapshot.json")
        vtep = RunDir(str(directory / "vtep"))
        problem = vtep.load(make_table())
        vtep.close()
    except MeshnetError as error:
        assert_clear(str(error))
        return "error"
    finally:
        state.close()
    assert state.instance.isascii()
    assert 0 < len(state.instance) <= 64
    found = {f"endpoints/{e.id}.json": encode_endpoint(e) for e in endpoints}
    for each, good in _ENDPOINTS.items():
        if each.encode() != name:
            assert found.pop(each) == good
    for each in found:  # it may say something else, but not that it is another
        assert each.encode() == name
    if name.decode() in _ENDPOINTS:
        assert found or Path(name.decode()).stem in unreadable
    kept = [file.read_bytes() for file in directory.rglob("*") if file.is_file()]
    # The VTEP's state and the memory of the table are written anew, and lose nothing.
    caches = (b"firewall.json", b"vtep/state.json")
    whole = name == b"instance" and state.instance.encode() == content.strip()
    rewritten = name == b"mesh.json" and _same_json(directory / "mesh.json", content)
    assert content in kept or name in caches or whole or rewritten
    return "set aside" if unreadable or problem else "taken"


def _load_snapshot(file: Path) -> None:
    """As `meshnet_agent.mesh.saver` does."""
    try:
        decode_saved(file.read_bytes())
    except BadValueError as error:
        assert_clear(str(error))
        set_aside(file, str(error))


def _same_json(file: Path, content: bytes) -> bool:
    try:
        before = json.loads(content)
        now = json.loads(file.read_bytes())
        return all(now[key] == before[key] for key in ("id", "revision"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@asynccontextmanager
async def _open() -> AsyncIterator[Check]:
    with tempfile.TemporaryDirectory(prefix="meshnet-hostile-") as directory:

        async def run(data: bytes) -> str:
            return check(data, Path(directory) / "state")

        yield run


DISK = Campaign("disk", _make, _open, 40)
