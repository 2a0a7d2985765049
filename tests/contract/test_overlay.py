"""Layers of the store through the kernel's overlayfs: what containers really see."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING

import pytest

from meshnet.errors import KernelRefusedError, NotFoundError
from meshnet.runtime.engine.overlayfs import mount_overlay, unmount
from meshnet.runtime.images.store import Image, ImageStore
from meshnet.runtime.images.tarstream import Budget
from tests.images import Member, docker_save, stream_of, symlink, tar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("root")]

_CLONE_NEWNS, _CLONE_FS = 0x0002_0000, 0x0000_0200
_MS_PRIVATE_REC = 0x0004_4000


def in_mount_namespace(call: Callable[[], None]) -> None:
    """Call in a thread with its own mount namespace, which ends with the thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            assert libc.unshare(_CLONE_NEWNS | _CLONE_FS) == 0, os.strerror(ctypes.get_errno())
            assert libc.mount(None, b"/", None, _MS_PRIVATE_REC, None) == 0
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def load(store: ImageStore, *layers: bytes) -> Image:
    raw = docker_save("one", *layers)
    with stream_of(raw) as stream:
        return store.load(stream, None, Budget(1 << 26, 1000))[0]


def mount(store: ImageStore, image: Image, container: Path) -> Path:
    for name in ("upper", "work", "root"):
        (container / name).mkdir(parents=True)
    root = container / "root"
    mount_overlay(store.lowerdirs(image), container / "upper", container / "work", root)
    return root


def test_what_containers_see(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    image = load(
        store,
        tar(
            *(Member(f"{d}/{n}", data=n.encode()) for d in ("a", "b", "c") for n in ("x", "y")),
            Member("gone/deep/er"),
            symlink("link", "/etc/passwd"),
        ),
        tar(
            Member("a/.wh.x"),
            Member("b/.wh..wh..opq"),
            Member("b/new"),
            Member(".wh.gone"),
            Member(".wh.c"),
            Member("c/z"),
        ),
        tar(Member("gone/back")),
    )

    def look() -> None:
        one, two = (mount(store, image, tmp_path / name) for name in ("one", "two"))
        for root in (one, two):
            assert {d: sorted(os.listdir(root / d)) for d in ("a", "b", "c", "gone")} == {
                "a": ["y"], "b": ["new"], "c": ["z"], "gone": ["back"],
            }  # fmt: skip
            assert sorted(os.listdir(root)) == ["a", "b", "c", "gone", "link"]
            assert os.readlink(root / "link") == "/etc/passwd"
        # One file on the disk, and in the page cache, for both.
        (layer,) = (d for d in store.lowerdirs(image) if (d / "a/y").exists())
        assert {(p / "a/y").stat().st_ino for p in (one, two, layer)} == {
            (layer / "a/y").stat().st_ino
        }
        (one / "a/y").write_text("changed")
        (one / "b/new").unlink()
        assert (two / "a/y").read_text() == (layer / "a/y").read_text() == "y"
        assert (two / "b/new").exists()
        assert not (one / "b/new").exists()
        assert (tmp_path / "one/upper/a/y").read_text() == "changed"
        unmount(one)
        assert os.listdir(one) == []
        with pytest.raises(KernelRefusedError, match="stays mounted"):
            unmount(one)

    in_mount_namespace(look)


def test_as_many_layers_as_an_image_may_have(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    image = load(store, *(tar(Member(f"f{n}"), Member("top", data=b"%d" % n)) for n in range(127)))
    assert sum(len(str(path)) for path in store.lowerdirs(image)) > os.sysconf("SC_PAGE_SIZE")

    def look() -> None:
        root = mount(store, image, tmp_path / "one, with: a name")
        assert len(os.listdir(root)) == 128
        assert (root / "top").read_text() == "126"

    in_mount_namespace(look)


def test_what_cannot_be_mounted(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no layer"):
        mount_overlay([], tmp_path, tmp_path, tmp_path)
    with pytest.raises(KernelRefusedError, match="cannot be mounted"):
        mount_overlay([tmp_path / "missing"], tmp_path, tmp_path, tmp_path)
