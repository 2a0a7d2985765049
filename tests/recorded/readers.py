"""The product's readers of what earlier versions wrote, in one place.

Only this file of the tests on recorded files knows which module reads what.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from meshnet.codec.checksum import with_checksum
from meshnet.kernel.drivers.nft_memory import read_memory
from meshnet.kernel.takeover.journal import JournalDir
from meshnet.runtime.engine.volumes import VolumeStore
from meshnet.runtime.images.store import ImageStore
from meshnet.store import Put
from meshnet.store.addresses import list_pool
from meshnet.store.memory import MemoryStore
from meshnet.store.mirror import MESH, load
from meshnet.store.registry import Registry
from meshnet_agent.containers import record as container_record
from meshnet_agent.endpoints.records import EndpointRecords
from meshnet_agent.mesh.identity import MeshIdentity
from meshnet_agent.state_dir import StateDir

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.kernel.takeover.journal import Journal
    from meshnet.model import Endpoint, MeshSnapshot, Network
    from meshnet.runtime.engine.volumes import StoredVolume
    from meshnet.runtime.images.store import Image
    from meshnet.store import Store
    from meshnet.store.addresses import PoolListing
    from meshnet_agent.containers.record import ContainerRecord

VERSIONS = Path(__file__).parent
STATE_DIR, SERVICE_DIR = "/var/lib/meshnet", "/srv"
"""Paths that recorded files name: the state directory, and what is mounted from outside."""


class Key(NamedTuple):
    """A key of etcd as it was recorded; `leased`: it was under a lease."""

    key: str
    value: str
    leased: bool


class HeldEndpoint(NamedTuple):
    """What a container's record knows of an endpoint that was made with it."""

    id: str
    network: str
    pid: int


class Disk(NamedTuple):
    """What the agent reads of its state directory before all else.

    Attributes:
        unreadable: ids of endpoints whose record was set aside.
    """

    instance: str
    endpoints: list[Endpoint]
    unreadable: set[str]
    drafts: list[Endpoint]


# --- the recorded files --------------------------------------------------------------------------


def etcd_keys(version: str) -> tuple[list[Key], int]:
    """All keys, in the order of their last writes, and the revision of etcd."""
    document = json.loads((VERSIONS / version / "etcd.json").read_bytes())
    keys = [Key(item["key"], item["value"], item["leased"]) for item in document["keys"]]
    return keys, document["revision"]


def place_state(version: str, state_dir: Path, replaced: dict[str, Path] | None = None) -> None:
    """Copy a recorded state directory to another place than its files name.

    Args:
        replaced: paths that replace recorded ones.
    """
    shutil.copytree(VERSIONS / version / "state", state_dir, dirs_exist_ok=True)
    for file in state_dir.glob("containers/*/container.json") if replaced else ():
        content = file.read_bytes()
        for recorded, path in (replaced or {}).items():
            content = content.replace(f'"{recorded}'.encode(), f'"{path}'.encode())
        file.write_bytes(with_checksum(content.rpartition(b',"crc32":"')[0] + b"}"))


# --- a state directory ---------------------------------------------------------------------------


def read_disk(state_dir: Path) -> Disk:
    """Open a state directory as an agent does when it starts."""
    disk = StateDir(state_dir, _no_name)
    try:
        records = EndpointRecords(disk.endpoints)
        endpoints, unreadable = records.load()
        return Disk(disk.instance, endpoints, unreadable, records.load_drafts())
    finally:
        disk.close()


def _no_name() -> str:
    raise AssertionError("the directory has an instance name")


def read_containers(state_dir: Path) -> dict[str, ContainerRecord]:
    """The records of all containers, by name."""
    return {r.name: r for r in container_record.load_all(state_dir / "containers")}


def endpoints_of(record: ContainerRecord) -> list[HeldEndpoint]:
    """The endpoints that were made with a container and are freed when it has ended."""
    return [HeldEndpoint(e.id, e.network, e.pid) for e in record.endpoints]


def read_journals(state_dir: Path) -> list[Journal | None]:
    """All journals of takeovers."""
    journals = JournalDir(state_dir)
    return [journals.load(bridge) for bridge in journals.bridges()]


def read_firewall_memory(state_dir: Path) -> tuple[str, str]:
    """The text that the firewall's tables were loaded from, and the digest of their listing."""
    loaded = read_memory(state_dir / "firewall.json")
    return loaded.text, loaded.listing_sha256


def read_images(state_dir: Path) -> list[Image]:
    """All images."""
    return ImageStore(state_dir / "images").images()


def read_volumes(state_dir: Path) -> list[StoredVolume]:
    """All volumes."""
    return VolumeStore(state_dir / "volumes").all()


async def check_identity(state_dir: Path, store: Store) -> None:
    """Check that a store is the mesh of a state directory; raise otherwise."""
    await MeshIdentity(store, state_dir / "mesh.json").check()


# --- etcd ----------------------------------------------------------------------------------------


async def store_of(keys: Iterable[Key]) -> Store:
    """A store in memory with recorded keys."""
    store = MemoryStore()
    for key, value, leased in keys:
        lease = await store.grant_lease(3600) if leased else None
        await store.commit([], [Put(key, value.encode(), lease)])
    return store


async def read_mesh(store: Store) -> MeshSnapshot:
    """What an agent makes of the mesh's part."""
    return load(await store.list_prefix(MESH)).snapshot()


async def read_endpoints(store: Store) -> list[Endpoint]:
    """The published endpoints of all hosts."""
    return list(await Registry(store).list_endpoints())


async def read_pool(store: Store, network: Network) -> PoolListing:
    """Who has which address of an underlay network."""
    return await list_pool(store, network)
