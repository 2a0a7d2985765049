"""Layers become trees for overlayfs; malicious tars change nothing outside."""

from __future__ import annotations

import gzip
import os
import stat
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnet.errors import MeshnetError, PolicyRefusedError
from meshnet.runtime.images.layers import OPAQUE, Unpacked, unpack
from meshnet.runtime.images.oci import BadImageError
from meshnet.runtime.images.tarstream import Budget
from tests.images import Member, digest, directory, hard_link, symlink, tar

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("root")]


def unpacked(raw: bytes, into: Path, budget: Budget | None = None) -> Unpacked:
    memory = os.memfd_create("layer")
    os.write(memory, raw)
    os.lseek(memory, 0, os.SEEK_SET)
    with open(memory, "rb") as file:
        return unpack(file, into, budget or Budget(1 << 26, 1000))


def is_whiteout(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def is_opaque(path: Path) -> bool:
    return OPAQUE in os.listxattr(path) and os.getxattr(path, OPAQUE) == b"y"


def test_everything_a_layer_can_have(tmp_path: Path) -> None:
    long = "/".join(["d" * 100] * 3)
    raw = tar(
        directory("./", mode=0o711, mtime=7.5),
        Member("a/b", data=b"x" * 100_000 + bytes(200_000), mode=0o4755, uid=7, gid=8, mtime=1.25),
        symlink("link", "/etc/passwd"),
        hard_link("other", "a/b"),
        hard_link("twin", "link"),
        Member("null", tarfile.CHRTYPE, device=(1, 3), mode=0o666),
        Member("disk", tarfile.BLKTYPE, device=(7, 0), mode=0o660),
        Member("fifo", tarfile.FIFOTYPE, mode=0o600),
        Member(long, data=b"deep"),
        Member("caf\udce9", data=b"latin-1"),
        Member(
            "x",
            data=b"x",
            pax={
                "SCHILY.xattr.user.note": "\udcff\0é",
                "SCHILY.xattr.security.capability": "\x01\0\0\x02\0\x04\0\0" + "\0" * 12,
                "SCHILY.xattr.security.selinux": "system_u:object_r:etc_t:s0",
            },
        ),
        directory("last", mode=0, mtime=9),
    )
    done = unpacked(gzip.compress(raw), tmp_path)
    assert done == Unpacked(digest(raw), 300_000 + 4 + 7 + 1, 12)  # type: ignore[arg-type]
    root = tmp_path.stat()
    assert (stat.S_IMODE(root.st_mode), root.st_mtime) == (0o711, 7.5)
    file = (tmp_path / "a/b").stat()
    assert (stat.S_IMODE(file.st_mode), file.st_uid, file.st_gid) == (0o4755, 7, 8)
    assert (file.st_size, file.st_mtime, file.st_nlink) == (300_000, 1.25, 2)
    assert file.st_blocks * 512 < 200_000  # the zeros are a hole
    assert (tmp_path / "other").samefile(tmp_path / "a/b")
    assert os.readlink(tmp_path / "link") == os.readlink(tmp_path / "twin") == "/etc/passwd"
    assert (tmp_path / "null").stat().st_rdev == os.makedev(1, 3)
    assert stat.S_ISBLK((tmp_path / "disk").stat().st_mode)
    assert (tmp_path / "fifo").is_fifo()
    assert (tmp_path / long).read_bytes() == b"deep"
    assert (tmp_path / "caf\udce9").exists()
    assert os.getxattr(tmp_path / "x", "user.note") == b"\xff\0\xc3\xa9"
    assert "security.selinux" not in os.listxattr(tmp_path / "x")
    assert os.getxattr(tmp_path / "x", "security.capability")[4:6] == b"\0\x04"
    assert (stat.S_IMODE((tmp_path / "a").stat().st_mode), (tmp_path / "last").stat().st_mtime) == (
        0o755,
        9,
    )


def test_markers(tmp_path: Path) -> None:
    unpacked(
        tar(
            Member("a/.wh.gone"),
            Member("a/.wh..wh.plnk"),
            directory("b"),
            Member("b/.wh..wh..opq"),
            Member("b/kept"),
            Member(".wh.c"),
            Member("c/new"),
            Member("d/new"),
            Member(".wh.d"),
            Member("e"),
            Member(".wh.e"),
        ),
        tmp_path,
    )
    assert is_whiteout(tmp_path / "a/gone")
    assert os.listdir(tmp_path / "a") == ["gone"]
    assert [is_opaque(tmp_path / name) for name in "abcd"] == [False, True, True, True]
    assert os.listdir(tmp_path / "c") == os.listdir(tmp_path / "d") == ["new"]
    assert (tmp_path / "e").is_file()


def test_later_entries_win(tmp_path: Path) -> None:
    unpacked(
        tar(
            Member("a", data=b"1"),
            Member("a", data=b"2"),
            directory("b"),
            Member("b/c/d"),
            Member("b", data=b"file"),
            symlink("s", "/tmp"),
            directory("s"),
            Member("s/in", data=b"here"),
            directory("t", mode=0o700),
            Member("t/x"),
            directory("t", mode=0o750),
        ),
        tmp_path,
    )
    assert (tmp_path / "a").read_bytes() == b"2"
    assert (tmp_path / "b").read_bytes() == b"file"
    assert (tmp_path / "s/in").read_bytes() == b"here"
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o750
    assert (tmp_path / "t/x").exists()


def test_zstd(tmp_path: Path) -> None:
    raw = tar(Member("a", data=b"zstd"))
    packed = subprocess.run(["zstd", "-cq"], input=raw, capture_output=True, check=True).stdout
    assert unpacked(packed, tmp_path).diff_id == digest(raw)
    assert (tmp_path / "a").read_bytes() == b"zstd"


def with_header(raw: bytes, at: int, content: bytes) -> bytes:
    """A tar whose first header has other bytes, and a checksum that fits."""
    header = bytearray(raw[:512])
    header[at : at + len(content)] = content
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + raw[512:]


PLAIN = tar(Member("a", data=b"a" * 600))
HOSTILE = {
    "dot dot": tar(Member("../outside/new")),
    "dot dot in the middle": tar(Member("a/../../outside/new")),
    "absolute": tar(Member("/etc/meshnet-test")),
    "by a symlink": tar(symlink("l", "../outside"), Member("l/new")),
    "by an absolute symlink": tar(symlink("l", "/"), Member("l/etc/meshnet-test")),
    "by a chain of symlinks": tar(symlink("a", "b"), symlink("b", "../outside"), Member("a/x/y")),
    "a directory through a symlink": tar(symlink("l", "../outside"), directory("l/new")),
    "a symlink through a symlink": tar(symlink("l", "../outside"), symlink("l/new", "x")),
    "a whiteout through a symlink": tar(symlink("l", "../outside"), Member("l/.wh.file")),
    "opaque through a symlink": tar(symlink("l", "../outside"), Member("l/.wh..wh..opq")),
    "whiteout of dot dot": tar(Member("a/.wh...")),
    "whiteout of dot": tar(Member("a/.wh..")),
    "whiteout of nothing": tar(Member("a/.wh.")),
    "through a whiteout": tar(Member(".wh.a/b")),
    "hard link outside": tar(hard_link("h", "../outside/file")),
    "absolute hard link": tar(hard_link("h", "/etc/passwd")),
    "hard link through a symlink": tar(symlink("l", "../outside"), hard_link("h", "l/file")),
    "hard link to a directory": tar(directory("d"), hard_link("h", "d")),
    "hard link to nothing": tar(hard_link("h", "nothing")),
    "hard link to itself": tar(Member("h"), hard_link("h", "h")),
    "through a file": tar(Member("f"), Member("f/new")),
    "a device that is a whiteout": tar(Member("w", tarfile.CHRTYPE, device=(0, 0))),
    "overlayfs's own attribute": tar(Member("x", pax={"SCHILY.xattr.trusted.overlay.opaque": "y"})),
    "overlayfs's other": tar(directory("x", pax={"SCHILY.xattr.user.overlay.redirect": "/etc"})),
    "a root that is a file": tar(Member("./", data=b"x")),
    "a root that is a symlink": tar(symlink(".", "../outside")),
    "an owner out of range": tar(Member("a", pax={"uid": str(1 << 32)})),
    "an owner that means none": tar(Member("a", pax={"uid": str((1 << 32) - 1)})),
    "a negative owner": tar(Member("a", pax={"gid": "-1"})),
    "no time": tar(Member("a", pax={"mtime": "nan"})),
    "an endless time": tar(Member("a", pax={"mtime": "1e300"})),
    "a negative size": tar(Member("a", pax={"size": "-512"})),
    "a negative size in the header": with_header(PLAIN, 124, b"\xff" * 12),
    "a name that is too long": tar(Member("n" * 256)),
    "a link that is too long": tar(symlink("a", "l" * 5000)),
    "a tree that is too deep": tar(Member("d/" * 300 + "f")),
    "an unknown type": tar(Member("a", b"Z")),
    "a header that asks for memory": with_header(PLAIN, 156, b"x")[:124]
    + with_header(with_header(PLAIN, 124, b"77777777777\0"), 156, b"x")[124:],
    "cut off in a file": PLAIN[:700],
    "cut off in a header": PLAIN[:100],
    "garbage after a member": PLAIN[:1536] + b"garbage" * 100,
    "no tar": b"hello" * 1000,
    "cut off gzip": gzip.compress(PLAIN)[:-20],
    "damaged gzip": gzip.compress(PLAIN)[:15] + b"\0" * 40,
    "bzip2": b"BZh9" + bytes(600),
    "damaged zstd": b"\x28\xb5\x2f\xfd" + b"\xff" * 600,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars(name: str, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "file").write_text("untouched")
    before = [(p.name, p.stat().st_mtime_ns, p.stat().st_nlink) for p in outside.iterdir()]
    with pytest.raises(BadImageError):
        unpacked(HOSTILE[name], inside)
    assert [(p.name, p.stat().st_mtime_ns, p.stat().st_nlink) for p in outside.iterdir()] == before
    assert os.listxattr(outside) == []
    assert sorted(os.listdir(tmp_path)) == ["inside", "outside"]
    assert not Path("/etc/meshnet-test").exists()


@pytest.mark.parametrize(
    ("raw", "setting"),
    [
        (gzip.compress(tar(Member("zeros", data=bytes(1 << 20)))), "image-max-bytes"),
        (gzip.compress(tar() + bytes(1 << 20)), "image-max-bytes"),
        (tar(Member("huge", pax={"size": str(1 << 60)})), "image-max-bytes"),
        (tar(*(Member(f"{n}") for n in range(200))), "image-max-entries"),
        (tar(*(Member("same") for _ in range(200))), "image-max-entries"),
    ],
)
def test_bombs(raw: bytes, setting: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyRefusedError, match=setting):
        unpacked(raw, tmp_path, Budget(500_000, 100))


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for raw in HOSTILE.values():
        with tempfile.TemporaryDirectory(dir=tmp_path) as into, pytest.raises(MeshnetError):
            unpacked(raw, Path(into))
    assert os.listdir("/proc/self/fd") == before


# --- any tree -----------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=6)
FILES = st.tuples(
    st.binary(max_size=40) | st.integers(1, 3).map(lambda n: bytes(n * 30_000)),
    st.integers(0, 0o7777),
    st.integers(0, 70_000),
    st.integers(0, 1 << 32),
)


def usable(name: str) -> bool:
    return (
        name not in (".", "..")
        and not name.startswith(".wh.")
        and len(name.encode()) < 200
        and name == name.rstrip("/")
    )


TREES = st.recursive(
    FILES | st.text("ab/.", min_size=1, max_size=9),
    lambda inner: st.dictionaries(NAMES.filter(usable), inner, max_size=4),
    max_leaves=12,
)
Tree = dict[str, object]


def members_of(tree: Tree, above: str = "") -> list[Member]:
    found = []
    for name, node in tree.items():
        path = above + name
        match node:
            case dict():
                found += [directory(path, mtime=5), *members_of(node, path + "/")]
            case str():
                found.append(symlink(path, node))
            case (bytes() as data, int(mode), int(owner), int(mtime)):
                found.append(Member(path, data=data, mode=mode, uid=owner, gid=owner, mtime=mtime))
    return found


def tree_at(path: Path) -> Tree:
    found: Tree = {}
    for entry in os.scandir(path):
        status = entry.stat(follow_symlinks=False)
        if entry.is_symlink():
            found[entry.name] = os.readlink(entry.path)
        elif entry.is_dir():
            assert status.st_mtime == 5
            found[entry.name] = tree_at(Path(entry.path))
        else:
            content = Path(entry.path).read_bytes()
            mode, time = stat.S_IMODE(status.st_mode), int(status.st_mtime)
            assert status.st_uid == status.st_gid
            found[entry.name] = (content, mode, status.st_uid, time)
    return found


@settings(max_examples=40)
@given(st.dictionaries(NAMES.filter(usable), TREES, max_size=4))
def test_any_tree(tree: Tree) -> None:
    raw = tar(*members_of(tree))
    with tempfile.TemporaryDirectory() as into:
        assert unpacked(raw, Path(into)).diff_id == digest(raw)
        assert tree_at(Path(into)) == tree
