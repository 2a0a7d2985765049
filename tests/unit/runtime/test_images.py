"""The image store: what it loads, shares, holds and removes, and what a killed process leaves."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from typing import TYPE_CHECKING

import pytest

from meshnet.errors import ConflictError, NotFoundError, PolicyRefusedError, UsageError
from meshnet.runtime.images.oci import BadImageError, Digest
from meshnet.runtime.images.store import Image, ImageStore
from meshnet.runtime.images.tarstream import Budget
from tests.images import (
    CONFIG_TYPE,
    INDEX_TYPE,
    MANIFEST_TYPE,
    Layout,
    Member,
    config_of,
    digest,
    docker_save,
    dumps,
    files_tar,
    stream_of,
    symlink,
    tar,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("root")]

BASE = tar(Member("etc/os", data=b"base"))
TOP = tar(Member("app", data=b"one"))
OTHER = tar(Member("app", data=b"two"))
ONE = "docker.io/library/one:latest"


def load(store: ImageStore, raw: bytes, name: str | None = None) -> list[Image]:
    with stream_of(raw) as stream:
        return store.load(stream, name, Budget(1 << 26, 1000))


def contents(store_root: Path) -> dict[str, set[str]]:
    """What the store has on the disk."""
    return {name: set(os.listdir(store_root / name)) for name in ("blobs/sha256", "layers", "tmp")}


def hexes(layers: Iterable[bytes]) -> set[str]:
    return {digest(layer)[7:] for layer in layers}


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@pytest.mark.parametrize(
    "raw",
    [
        Layout().add("one", BASE, TOP).tar(),
        Layout().add("docker.io/library/one:latest", BASE, TOP).tar(),
        gzip.compress(docker_save("one:latest", BASE, TOP)),
        docker_save("one:latest", BASE, TOP),
    ],
)
def test_formats(raw: bytes, store: ImageStore) -> None:
    (image,) = load(store, raw, "one" if b'ref.name": "one"' in raw else None)
    assert image.id == digest(config_of((BASE, TOP)))
    assert image.names == (ONE,)
    assert image.size_bytes == 4 + 3
    assert [os.listdir(path) for path in store.lowerdirs(image)] == [["app"], ["etc"]]
    assert store.images() == [image]
    for text in ("one", ONE, "library/one", image.id, image.id[7:], image.id[7:11], image.id[:15]):
        assert store.find(text) == image


def test_a_layer_twice(store: ImageStore) -> None:
    (image,) = load(store, docker_save("one:1", BASE, TOP, BASE))
    assert len(image.layers) == 3
    assert [os.listdir(path) for path in store.lowerdirs(image)] == [["etc"], ["app"]]


def test_an_index_for_several_platforms(store: ImageStore) -> None:
    layout = Layout()
    strange = json.loads(config_of((OTHER,))) | {"architecture": "pdp11"}
    mine = layout.manifest(BASE, platform={"os": "linux", "architecture": os_architecture()})
    others = layout.manifest(
        OTHER, config=dumps(strange), platform={"os": "linux", "architecture": "pdp11"}
    )
    index = dumps({"schemaVersion": 2, "manifests": [others, mine]})
    name = {
        "io.containerd.image.name": "docker.io/me/multi:v1",
        "org.opencontainers.image.ref.name": "v1",
    }
    layout.manifests.append(layout.blob(index, INDEX_TYPE, annotations=name))
    (image,) = load(store, layout.tar())
    assert image.names == ("docker.io/me/multi:v1",)
    assert image.layers == (digest(BASE),)


def os_architecture() -> str:
    return str(json.loads(config_of(()))["architecture"])


def changed(layout: Layout, find: bytes, put: bytes) -> bytes:
    return files_tar({n: c.replace(find, put) for n, c in layout.files().items()})


def unlike(field: str, value: object) -> bytes:
    return dumps(json.loads(config_of((BASE,))) | {field: value})


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        (b"", BadImageError, "not a tar archive"),
        (b"no tar" * 200, BadImageError, "damaged"),
        (tar(), BadImageError, "neither index.json nor"),
        (gzip.compress(docker_save("one", BASE))[:-9], BadImageError, "damaged"),
        (Layout().tar(), NotFoundError, "no image"),
        (changed(Layout().add("a:1", BASE), b"2026-01-02", b"2026-01-03"), BadImageError,
         "was changed"),
        (files_tar(dict(list(Layout().add("a:1", BASE).files().items())[:3])), BadImageError,
         "has no blob"),
        (Layout().add("a:1", BASE, config=config_of((TOP,))).tar(), BadImageError,
         "once decompressed"),
        (Layout().add("a:1", BASE, config=config_of((BASE, TOP))).tar(), BadImageError,
         "1 layers and 2 diff ids"),
        (Layout().add("a:1", BASE, config=unlike("architecture", "pdp11")).tar(), NotFoundError,
         "linux/pdp11"),
        (Layout().add("UPPER:1", BASE).tar(), BadImageError, "UPPER:1"),
        (Layout().add("a:1", tar(Member("ok"), Member("../new"))).tar(), BadImageError,
         r"layer [0-9a-f]{12}: member '../new'"),
        (tar(symlink("manifest.json", "/etc/passwd")), BadImageError, "neither"),
        (tar(Member("index.json", tarfile.FIFOTYPE)), BadImageError, "is not a file"),
        (tar(Member("manifest.json", data=dumps([{"Config": "../../etc/passwd", "Layers": []}]))),
         BadImageError, "has no file"),
    ],
)  # fmt: skip
def test_archives_that_are_refused_leave_nothing(
    raw: bytes, error: type[Exception], words: str, store: ImageStore, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        load(store, raw)
    assert store.images() == []
    assert contents(tmp_path / "images") == {"blobs/sha256": set(), "layers": set(), "tmp": set()}
    assert os.listdir(tmp_path) == ["images"]


def test_bombs_are_refused(store: ImageStore, tmp_path: Path) -> None:
    bomb = Layout().add("a:1", tar(Member("zeros", data=bytes(1 << 22)))).tar()
    with (
        pytest.raises(PolicyRefusedError, match=r"layer [0-9a-f]{12}: .*image-max-bytes"),
        stream_of(bomb) as stream,
    ):
        store.load(stream, None, Budget(1 << 20, 1000))
    assert contents(tmp_path / "images") == {"blobs/sha256": set(), "layers": set(), "tmp": set()}


def test_layers_go_with_their_last_image(store: ImageStore, tmp_path: Path) -> None:
    root = tmp_path / "images"
    (one,) = load(store, docker_save("one", BASE, TOP))
    (two,) = load(store, docker_save("two", BASE, OTHER))
    assert contents(root)["layers"] == hexes((BASE, TOP, OTHER))
    removed = store.remove("one")
    assert (removed.id, removed.untagged, removed.deleted) == (one.id, (ONE,), True)
    assert contents(root)["layers"] == hexes((BASE, OTHER))
    assert store.images() == [two]
    assert store.remove(two.id[7:19]).deleted
    assert contents(root) == {"blobs/sha256": set(), "layers": set(), "tmp": set()}
    with pytest.raises(NotFoundError, match="image two is not on this host"):
        store.remove("two")


def test_names(store: ImageStore) -> None:
    load(store, docker_save("one", BASE))
    (image,) = load(store, docker_save("one", BASE), "uno")
    assert image.names == (ONE, "docker.io/library/uno:latest")
    with pytest.raises(ConflictError, match="has 2 names"):
        store.remove(image.id)
    assert not store.remove("one").deleted
    # A name that another image takes leaves this one without.
    (other,) = load(store, docker_save("x", OTHER), "uno")
    assert [(i.id, len(i.names)) for i in store.images()] == [(other.id, 1), (image.id, 0)]
    assert store.remove(image.id).deleted
    with pytest.raises(NotFoundError):
        store.find(image.id)
    with pytest.raises(UsageError, match="is none"):
        store.find("NO NAME")
    both = Layout().add("a:1", BASE).add("b:1", TOP).tar()
    with pytest.raises(UsageError, match="2 images"):
        load(store, both, "c")
    assert [i.names for i in load(store, both)] == [
        ("docker.io/library/a:1",), ("docker.io/library/b:1",),
    ]  # fmt: skip


def test_containers_hold_images(store: ImageStore) -> None:
    (image,) = load(store, docker_save("one", BASE))
    load(store, docker_save("one", BASE), "uno")
    assert store.hold("one", "web").id == image.id
    assert store.hold(image.id, "db").containers == ("db", "web")
    store.remove("uno")  # it has another name
    with pytest.raises(ConflictError, match="in use by container db, web: remove them first"):
        store.remove("one")
    store.release(image.id, "db")
    store.release(image.id, "db")
    # Losing its name to another image does not take it away from its container.
    load(store, docker_save("one", OTHER))
    with pytest.raises(ConflictError, match="container web: remove it first"):
        store.remove(image.id)
    store.release(image.id, "web")
    assert store.remove(image.id).deleted
    with pytest.raises(NotFoundError):
        store.hold(image.id, "web")
    for bad in ("", "../x", "a/b"):
        with pytest.raises(UsageError):
            store.hold("one", bad)
        with pytest.raises(UsageError):
            store.release(Digest(image.id), bad)


def test_export_is_what_was_loaded(store: ImageStore, tmp_path: Path) -> None:
    layout = Layout().add("one:1", BASE, TOP)
    (image,) = load(store, layout.tar())
    output = io.BytesIO()
    store.export("one:1", output)
    with tarfile.open(fileobj=io.BytesIO(output.getvalue())) as archive:
        found = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    assert {n: c for n, c in found.items() if n.startswith("blobs/")} == layout.blobs
    other = ImageStore(tmp_path / "other")
    assert load(other, output.getvalue(), "one:1")[0] == image
    assert contents(tmp_path / "images")["tmp"] == set()


def test_two_loads_at_once_share_their_layers(store: ImageStore, tmp_path: Path) -> None:
    """Both unpack what neither has yet; one copy stays.  Meanwhile others are removed."""
    archives = {name: docker_save(name, BASE, layer) for name, layer in (("a", TOP), ("b", OTHER))}

    def often(name: str) -> None:
        mine = ImageStore(tmp_path / "images")
        for _ in range(8):
            load(mine, archives[name])
            mine.remove(name)
        load(mine, archives[name])

    threads = [threading.Thread(target=often, args=(name,)) for name in archives]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [i.names[0] for i in store.images()] == [
        "docker.io/library/a:latest",
        "docker.io/library/b:latest",
    ]
    for image in store.images():
        assert [len(os.listdir(path)) for path in store.lowerdirs(image)] == [1, 1]
    found = contents(tmp_path / "images")
    assert found["layers"] == hexes((BASE, TOP, OTHER))
    assert found["tmp"] == set()


def run_load(store: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "meshnet.runtime.images.load", f"--store={store}"]
    command += ["--max-bytes=67108864", "--max-entries=1000", *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_the_loading_process(tmp_path: Path) -> None:
    with run_load(tmp_path / "images", "--name=uno") as child:
        output, _ = child.communicate(docker_save("one", BASE))
    assert json.loads(output) == {"ids": [digest(config_of((BASE,)))]}
    with run_load(tmp_path / "images") as child:
        output, _ = child.communicate(tar())
    error = json.loads(output)["error"]
    assert (error["kind"], "neither" in error["message"]) == ("UsageError", True)


def test_a_load_that_is_killed_is_collected(store: ImageStore, tmp_path: Path) -> None:
    root = tmp_path / "images"
    (kept,) = load(store, docker_save("one", BASE))
    before = contents(root)
    raw = docker_save("two", BASE, OTHER)
    with run_load(root) as child:
        assert child.stdin is not None
        child.stdin.write(raw[:-1000])
        child.stdin.flush()
        while not any((root / "tmp").iterdir()):
            assert child.poll() is None
        # The load is still running, so nobody removes its directory.
        store.collect()
        assert len(contents(root)["tmp"]) == 1
        child.send_signal(signal.SIGKILL)
    assert len(contents(root)["tmp"]) == 1
    # As if it had been killed while it moved things into place, before the index.
    (root / "layers" / ("0" * 64) / "diff").mkdir(parents=True)
    (root / "blobs/sha256" / ("1" * 64)).write_bytes(b"left")
    store.collect()
    assert contents(root) == before
    assert store.images() == [kept]


def test_the_store_is_an_image_layout(store: ImageStore, tmp_path: Path) -> None:
    load(store, docker_save("one", BASE))
    index = json.loads((tmp_path / "images/index.json").read_bytes())
    (entry,) = index["manifests"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": ONE}
    manifest = json.loads((tmp_path / "images/blobs/sha256" / entry["digest"][7:]).read_bytes())
    assert (entry["mediaType"], manifest["config"]["mediaType"]) == (MANIFEST_TYPE, CONFIG_TYPE)
    assert oct((tmp_path / "images").stat().st_mode & 0o777) == "0o700"
