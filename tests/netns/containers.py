"""Containers by the client, and all that they can leave behind: what the tests of them share."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshnet.lab.state import LABS_DIR
from tests.images import Layout, Member, config_of, directory, symlink, tar
from tests.netns.mesh import meshnet, run_client

if TYPE_CHECKING:
    import subprocess

    from meshnet.lab.host import LabHost

CLIENT = [sys.executable, "-m", "meshnet.cli.main"]
CGROUPS = Path("/sys/fs/cgroup")
APPLETS = (
    "sh", "true", "sleep", "cat", "echo", "id", "ip", "ping", "env", "hostname", "touch",
    "readlink", "kill", "head", "yes", "pwd", "stty", "tail", "grep", "httpd", "ls", "wget",
    "mkdir", "nc", "seq", "stat", "chown",
)  # fmt: skip
_USERS = ("passwd", "group")
_PROBE = "meshnet-probe-"
FOREVER = "trap 'exit 9' TERM; sleep 9999 & wait"
"""A script that runs until SIGTERM, and then ends with status 9."""


def make_rootfs(root: Path) -> Path:
    """Fill a directory with a file system of busybox alone."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "install busybox-static"
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp"):
        (root / name).mkdir()
    shutil.copy(busybox, root / "bin" / "busybox")
    for name in APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:70:71::/srv:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\nweb:x:71:\nlog:x:72:web\n")
    (root / "bin" / "closed").write_text("#!/bin/sh\n")
    return root


def busybox_layer(rootfs: Path, *more: Member) -> bytes:
    """A layer of busybox, and further files."""
    busybox = Member("bin/busybox", data=(rootfs / "bin/busybox").read_bytes(), mode=0o755)
    links = [symlink(f"bin/{name}", "busybox") for name in APPLETS]
    closed = Member("bin/closed", data=b"#!/bin/sh\n")
    users = [Member(f"etc/{n}", data=(rootfs / "etc" / n).read_bytes()) for n in _USERS]
    return tar(directory("bin"), directory("etc"), busybox, *links, closed, *users, *more)


def load_image(host: LabHost, archive: Path, name: str, layer: bytes, **config: object) -> None:
    """Have a host load an image of one layer."""
    archive.write_bytes(Layout().add(name, layer, config=config_of((layer,), **config)).tar())
    meshnet(host, "image", "load", archive)


def run(
    host: LabHost,
    rootfs: Path,
    *words: str,
    options: tuple[str, ...] = (),
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """An attached ``meshnet run --rm``."""
    argv = [*CLIENT, "run", "--rm", *options, "--rootfs", str(rootfs), *words]
    return host.run(argv, check=False, input_text=stdin)


def shell(host: LabHost, rootfs: Path, script: str, *options: str) -> str:
    """Run a script in a new container, which must succeed; return what it prints."""
    done = run(host, rootfs, "sh", "-c", script, options=options)
    assert done.returncode == 0, (script, done)
    return done.stdout.strip()


def client(host: LabHost, *words: object, status: int = 0) -> str:
    """What the client prints, or its error line."""
    done = run_client(host, *words)
    assert done.returncode == status, (words, done)
    return done.stderr if status else done.stdout


def detached(host: LabHost, rootfs: Path, *words: str) -> dict[str, Any]:
    """Options and a command, in the background."""
    at = words.index("--") if "--" in words else 0
    options, command = words[:at], words[at + 1 if at else 0 :]
    return started(host, *options, "--rootfs", rootfs, *command)


def started(host: LabHost, *words: object) -> dict[str, Any]:
    """``meshnet run --detach``; returns its document."""
    document: dict[str, Any] = json.loads(client(host, "run", "--json", "--detach", *words))
    return document


def cgroup_of(pid: int, controller: str) -> Path:
    """The directory of a process's cgroup: of that controller (v1), or the only one (v2)."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path(f"{CGROUPS}/{controllers}{path}")
    return Path(f"{CGROUPS}{path}")


def cgroup_file(pid: int, controller: str, name: str) -> str:
    """A file of the cgroup of a process, as the kernel has it."""
    return (cgroup_of(pid, controller) / name).read_text().strip()


def cgroups_of(name: str) -> list[str]:
    """The cgroups of a container by its id, or ``*`` of all."""
    found = (*CGROUPS.glob(f"*/meshnet/{name}"), *CGROUPS.glob(f"meshnet/{name}"))
    return [str(path) for path in found if path.is_dir()]


def _stray_cgroups() -> set[str]:
    """Containers' cgroups that no agent of a lab has a container for.

    The labs of other tests have containers in the same tree.
    """
    found = [Path(path) for path in cgroups_of("*")]
    known = {path.name for path in LABS_DIR.glob("*/*/state/containers/*")}
    return {
        str(path)
        for path in found
        # Agents of other tests try runtimes, by containers that end at once.
        if path.name not in known and not path.name.startswith(_PROBE) and path.exists()
    }


_STRAY_BEFORE = _stray_cgroups()
"""Cgroups that nobody owned when the tests began."""


def processes_of(host: LabHost) -> list[str]:
    """conmons of a host's containers, and what its agent runs besides its userspace VTEPs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if str(host.run_dir) in " ".join(words) and re.search("conmon|runc|crun", words[0]):
            found.append(f"{path.parent.name} {words[0]}")
    return found


def leftovers(host: LabHost) -> dict[str, list[str]]:
    """All that containers can leave behind."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    links = host.run(["ip", "-br", "link"]).stdout.split()
    return {
        "mounts": [line for line in mounts if str(host.state_dir) in line],
        "cgroups": sorted(_stray_cgroups() - _STRAY_BEFORE),
        "links": [link for link in links if link.startswith("mne")],
        "processes": processes_of(host),
        "files": [p.name for p in (host.state_dir / "containers").glob("*")],
        "holds": [p.name for p in (host.state_dir / "images" / "holds").glob("*/*")],
        "sockets": [p.name for p in (host.run_dir / "containers").glob("*")],
        "runtime": [p.name for p in (host.run_dir / "oci").glob("*")],
    }


def is_clean(host: LabHost) -> bool:
    """Whether containers have left nothing."""
    return not any(leftovers(host).values())
