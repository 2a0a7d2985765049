"""Volumes: what an image declares, what -v asks for, and when they go."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from meshnet.lab.poll import wait_until
from tests.images import Member, directory, symlink
from tests.netns.containers import (
    APPLETS,
    CLIENT,
    busybox_layer,
    is_clean,
    leftovers,
    load_image,
    started,
)
from tests.netns.mesh import meshnet

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
DATA = (
    Member("data/", tarfile.DIRTYPE, mode=0o2750, uid=70, gid=71),
    Member("data/seed", data=b"of the image", mode=0o640, uid=70, gid=72),
    directory("data/deep"),
    symlink("data/deep/link", "../seed"),
)
LISTED = "stat -c '%a %u %g' /data /data/seed; cat /data/deep/link"


def test_volumes_of_images_and_of_options(make_lab: MakeLab, rootfs: Path, tmp_path: Path) -> None:
    h1 = make_lab(1).hosts[0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "seed").write_text("of the host")
    volumes: dict[str, dict[str, str]] = {"data": {}, "/made/here": {}, "/out": {}}
    layer = busybox_layer(rootfs, *DATA, symlink("out", "/bin"))
    load_image(h1, tmp_path / "image.tar", "db:1", layer, Volumes=volumes)

    def out(*words: object, status: int = 0) -> str:
        done = h1.run([*CLIENT, "run", *map(str, words)], check=False)
        assert done.returncode == status, (words, done)
        return (done.stderr if status else done.stdout).strip()

    def stored() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = meshnet(h1, "volume", "ls")
        return found

    # Filled from the image, owners and modes too; writable where the root is not; gone by --rm.
    # A link of the image leads to what the image has there, not the host.
    expected = ["2750 70 71", "640 70 72", "of the image"]
    script = f"{LISTED}; echo; echo x >/made/here/new; cat /made/here/new; ls /out/ | grep -c ."
    inside = [*expected, "x", str(len(APPLETS) + 2)]
    for ids in ("host", "auto"):
        command = (
            "--rm",
            "--read-only",
            "--userns",
            ids,
            "db:1",
            "sh",
            "-c",
            f"{script}; ! touch /x",
        )
        assert out(*command).split("\n") == inside
    assert stored() == []
    # What is given for a path wins.
    given = ("-v", f"{tmp_path}/mine:/data", "--tmpfs", "/made/here")
    assert out("--rm", *given, "db:1", "sh", "-c", "cat /data/*; grep -c here /proc/mounts") == (
        "of the host1"
    )

    # Kept with the container; after rm until somebody removes them.
    script = "echo more >>/data/seed; sleep 1000"
    one = started(h1, "--name", "one", "db:1", "sh", "-c", script)
    names = {p["destination"]: p["name"] for p in one["mount_points"]}
    assert names.keys() == {"/data", "/made/here", "/out"}
    assert {v["name"]: v["containers"] for v in stored()} == {
        name: ["one"] for name in names.values()
    }
    data = next(Path(v["path"]) for v in stored() if v["name"] == names["/data"])
    wait_until(lambda: "more" in (data / "seed").read_text(), 10, "it wrote")
    assert "in use by container one" in meshnet(h1, "volume", "rm", names["/data"], status=5)
    assert meshnet(h1, "volume", "prune", "--all") == []
    meshnet(h1, "rm", "-f", "one")
    assert {v["name"] for v in stored()} == set(names.values())
    script = "cat /d/seed; touch /d/no || echo read-only"
    again = ("--rm", "-v", f"{names['/data']}:/d:ro")
    assert out(*again, "db:1", "sh", "-c", script) == "of the imagemore\nread-only"
    assert {v["name"] for v in stored()} == set(names.values())
    assert meshnet(h1, "volume", "rm", names["/data"]) == {"name": names["/data"]}
    pruned = {v["name"] for v in meshnet(h1, "volume", "prune")}
    assert pruned == {names["/made/here"], names["/out"]}
    assert "does not exist" in meshnet(h1, "volume", "rm", names["/data"], status=4)
    assert "not usable" in meshnet(h1, "volume", "rm", ".images", status=2)

    # rm -v removes them too, but not those with a name.
    started(h1, "--name", "two", "-v", "kept:/data", "-v", "/x", "db:1", "true")
    meshnet(h1, "wait", "two")
    assert len(stored()) == 4
    meshnet(h1, "rm", "--volumes", "two")
    assert [(v["name"], v["anonymous"]) for v in stored()] == [("kept", False)]
    # Containers with other ids share it: on the disk its owners are those inside.
    for ids in ("auto", "auto:5000000:65536"):
        options = ("--rm", "--userns", ids, "-v", "kept:/data")
        script = f"echo {ids} >>/data/seed; touch /data/{len(ids)}; {LISTED}"
        lines = out(*options, "db:1", "sh", "-c", script).split("\n")
        assert lines[:2] == expected[:2]
    data = Path(stored()[0]["path"])
    assert (data / "seed").read_text() == "of the imageauto\nauto:5000000:65536\n"
    owners = {(p.name, p.stat().st_uid, p.stat().st_gid) for p in data.iterdir()}
    assert owners == {("seed", 70, 72), ("deep", 0, 0), ("4", 0, 71), ("18", 0, 71)}
    assert meshnet(h1, "volume", "prune") == []
    assert meshnet(h1, "volume", "prune", "--all") == [{"name": "kept"}]
    # One that could not be started leaves none.
    assert out("db:1", "/bin/nothing", status=127)
    assert "is a file in the image" in out("-v", "named:/bin/busybox", "db:1", "true", status=2)
    assert list((h1.state_dir / "volumes").iterdir()) == []
    assert is_clean(h1), leftovers(h1)
