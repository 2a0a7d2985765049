"""Containers with their own ids: who they are on the host, and that everything else works."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.containers import (
    CLIENT,
    busybox_layer,
    detached,
    is_clean,
    leftovers,
    load_image,
    run,
    shell,
    started,
)
from tests.netns.mesh import address_of, attach, create_network, meshnet, ping

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
FIRST = 1_000_000
"""Of the tests' range, which holds two containers."""
SIZE = 65_536
AUTO = ("--userns", "auto")
LOOP = ("sh", "-c", "while :; do sleep 0.05; done")


RANGE = f"--userns-range={FIRST}:{2 * SIZE}"


def host_uids(pid: int) -> list[str]:
    """Real, effective, saved and file system uid of a process, as the host sees them."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1:] for line in text.splitlines() if line.startswith("Uid:"))


def upper(host: LabHost, container: dict[str, Any]) -> Path:
    return host.state_dir / "containers" / str(container["id"]) / "upper"


def fingerprint(directory: Path) -> dict[str, tuple[object, ...]]:
    """All that is known of the files of a tree, but when they were read."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        fields = (status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_ctime_ns)
        found[str(path.relative_to(directory))] = (*fields, content)
    return found


def userns_mounts(host: LabHost) -> list[str]:
    """List what is mounted for, or left by, containers with their own ids."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    left = [str(path) for path in (host.run_dir / "userns").glob("*")]
    return [line for line in mounts if str(host.run_dir) in line] + left


def terminal(host: LabHost, *words: str) -> str:
    """What the client prints on a terminal; it must end well."""
    ours, theirs = pty.openpty()
    child = host.popen([*CLIENT, *words], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 4096):
            text += chunk
    except OSError:
        pass  # EIO: nobody has the other end any more
    os.close(ours)
    assert child.wait(30) == 0, text
    return text.decode().replace("\r\n", "\n")


def test_root_of_a_container_is_nobody_on_the_host(
    make_lab: MakeLab, rootfs: Path, tmp_path: Path
) -> None:
    h1 = make_lab(1, agent_args=(RANGE,)).hosts[0]
    (rootfs / "etc" / "asset").write_text("of the image\n")
    before = fingerprint(rootfs)
    script = (
        "cat /proc/self/uid_map /proc/self/gid_map; echo more >>/etc/asset; echo new >/new;"
        "touch /web; chown 70:71 /web; " + LOOP[2]
    )
    one = detached(h1, rootfs, "--name", "one", *AUTO, "--", "sh", "-c", script)
    assert one["ids"] == {"first": FIRST, "size": SIZE}
    assert host_uids(one["pid"]) == [str(FIRST)] * 4
    wait_until((upper(h1, one) / "web").exists, 10, "it wrote")
    logged = h1.run([*CLIENT, "logs", "one"]).stdout.split()
    assert logged == ["0", str(FIRST), str(SIZE)] * 2
    # Written and copied up: owned by the container's ids, and so by nobody of the host.
    wait_until(lambda: (upper(h1, one) / "web").stat().st_uid != FIRST, 10, "chown")
    owners = {
        name: ((upper(h1, one) / name).stat().st_uid, (upper(h1, one) / name).stat().st_gid)
        for name in ("new", "etc/asset", "web", ".")
    }
    assert owners == {
        **dict.fromkeys(("new", "etc/asset", "."), (FIRST, FIRST)),
        "web": (FIRST + 70, FIRST + 71),
    }
    assert (upper(h1, one) / "etc/asset").read_text() == "of the image\nmore\n"
    assert fingerprint(rootfs) == before
    # A second container has other ids, and a third finds none left.
    two = detached(h1, rootfs, "--name", "two", *AUTO, "--user", "web", "--", *LOOP)
    assert two["ids"] == {"first": FIRST + SIZE, "size": SIZE}
    assert host_uids(two["pid"]) == [str(FIRST + SIZE + 70)] * 4
    error = run(h1, rootfs, "true", options=AUTO)
    assert (error.returncode, "userns-range 1000000:131072" in error.stderr) == (6, True), error
    error = run(h1, rootfs, "true", options=("--userns", f"auto:{FIRST + SIZE - 1}:1"))
    assert (error.returncode, "of container one" in error.stderr) == (5, True), error
    # Those of no range are free to choose, and one's own may be shared.
    assert shell(h1, rootfs, "cat /proc/self/uid_map", "--userns", "auto:5000000:1000").split() == [
        "0", "5000000", "1000",
    ]  # fmt: skip
    same = ("--userns", "container:one", "--pid", "container:one", "--net", "container:one")
    link = os.readlink(f"/proc/{one['pid']}/ns/user")
    assert shell(h1, rootfs, "readlink /proc/self/ns/user", *same) == link
    error = run(h1, rootfs, "true", options=(*AUTO[:1], "container:two", "--pid", "container:one"))
    assert (error.returncode, "add --userns container:one" in error.stderr) == (5, True), error
    # A refusal of Docker's, and a file system that cannot do it.
    error = run(h1, rootfs, "true", options=(*AUTO, "--privileged"))
    assert (error.returncode, "--privileged" in error.stderr) == (2, True), error
    meshnet(h1, "rm", "-f", "two")
    sysfs = Path("/sys/kernel")
    error = run(h1, sysfs, "true", options=AUTO)
    assert error.returncode == 7, error
    assert "file system sysfs of /sys/kernel cannot map ids" in error.stderr
    # A bind mount is of the host's ids: root's files belong to nobody, and cannot be written.
    tmp_path.chmod(0o755)
    (tmp_path / "file").write_text("root's")
    shared = shell(
        h1, rootfs, "cat /m/file; echo; ls -ln /m; touch /m/new || echo no",
        *AUTO, "-v", f"{tmp_path}:/m",
    ).split("\n")  # fmt: skip
    assert shared[0] == "root's"
    assert shared[-2].split()[2:4] == ["65534", "65534"]
    assert shared[-1] == "no"
    meshnet(h1, "rm", "-f", "one")
    assert is_clean(h1), leftovers(h1)
    assert userns_mounts(h1) == []


def test_everything_else_works_with_it(make_lab: MakeLab, rootfs: Path, tmp_path: Path) -> None:
    lab = make_lab(2, agent_args=(RANGE,))
    h1, h2 = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    far = h2.spawn_container()
    address = address_of(attach(far, h2, "prod"))
    command = ["httpd", "-f", "-p", "80", "-h", "/etc"]
    load_image(h1, tmp_path / "image.tar", "bb:1", busybox_layer(rootfs), Cmd=command)
    layers = list((h1.state_dir / "images" / "layers").glob("*/diff"))
    before = {path: fingerprint(path) for path in layers}
    options = ("--name", "web", "--net", "prod", "--restart", "on-failure", "--init", *AUTO)
    # Port 80 of its own network, which its root owns.
    web = started(h1, *options, "bb:1")
    assert ping(far, address_of(web["endpoints"][0]))

    def served() -> bool:
        url = f"http://{address_of(web['endpoints'][0])}/passwd"
        script = f"import urllib.request as r; print(r.urlopen({url!r}, timeout=5).read())"
        return "web:x:70" in far.run(["python3", "-c", script], check=False).stdout

    wait_until(served, 10, "it serves on port 80")

    def out(*words: str) -> str:
        done = h1.run([*CLIENT, "exec", *words], check=False)
        assert done.returncode == 0, (words, done)
        return done.stdout.strip()

    assert "0% packet loss" in out("web", "ping", "-c1", "-W5", address)
    assert out("web", "id", "-u") == "0"
    assert out("-u", "web", "web", "id", "-u") == "70"
    assert address_of(web["endpoints"][0]) in out("web", "cat", "/etc/hosts")
    out("web", "sh", "-c", "echo 10.0.0.1 other >>/etc/hosts && ls /sys/class/net/eth0")
    assert "/dev/" in terminal(h1, "exec", "-it", "web", "sh", "-c", "readlink /proc/self/fd/0")
    shown = terminal(
        h1, "run", "--rm", "-it", *AUTO, "bb:1", "sh", "-c", "ls -ln /dev/console; echo typed"
    )
    assert shown.endswith("typed\n"), shown
    # What it has survives the agent; so does who has which ids.
    h1.kill_agent()
    assert ping(far, address_of(web["endpoints"][0]))
    h1.start_agent()
    assert out("web", "id", "-u") == "0"
    other = started(h1, "--name", "other", *AUTO, "bb:1")
    assert other["ids"]["first"] == FIRST + SIZE
    out("web", "touch", "/kept")
    h1.run(["kill", "-KILL", str(web["pid"])])
    wait_until(
        lambda: [d["restarts"] for d in meshnet(h1, "ps") if d["name"] == "web"] == [1],
        20,
        "it was restarted",
    )
    assert out("web", "ls", "-ln", "/kept").split()[2:4] == ["0", "0"]
    again = meshnet(h1, "inspect", "web")
    assert again["ids"] == web["ids"]
    assert host_uids(again["pid"]) == [str(FIRST)] * 4
    # The image's files: once on the disk, and as they were.
    assert {path: fingerprint(path) for path in layers} == before
    busyboxes = subprocess.run(
        ["find", str(h1.state_dir), "-xdev", "-path", "*/bin/busybox", "-type", "f"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert len(busyboxes) == 1, busyboxes
    for name in ("web", "other"):
        meshnet(h1, "rm", "-f", name)
    assert is_clean(h1), leftovers(h1)
    assert userns_mounts(h1) == []
