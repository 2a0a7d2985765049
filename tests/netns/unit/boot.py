"""``python -m tests.netns.unit.boot DIRECTORY``: makes namespaces, and becomes systemd there.

``boot.json`` in the directory says what to mount and to write (`tests.netns.unit.systemd`).  All is
mounted below a new root before that becomes the root, so nothing here can write to this machine's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

_NAMESPACES = ("--mount", "--pid", "--uts", "--ipc", "--cgroup")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "net/tun")
_UNITS = ("etc/systemd/system", "usr/lib/systemd/system")


def main() -> None:
    """Twice: outside, and as process 1 within."""
    directory, *inside = sys.argv[1:]
    boot = json.loads(Path(directory, "boot.json").read_text())
    if inside:
        _become_systemd(Path(directory), boot)
    # The root of a namespace of control groups is where the process is that makes it.
    for _, path in boot["cgroups"]:
        Path(path, "cgroup.procs").write_text(str(os.getpid()))
    again = [sys.executable, "-m", "tests.netns.unit.boot", directory, "inside"]
    os.execvp("unshare", ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--", *again])


def _become_systemd(directory: Path, boot: dict[str, Any]) -> NoReturn:
    root = _make_root(directory)
    _mount_cgroups(root, boot["cgroups"])
    for path in boot["kept"]:
        _bind(path, root)
    _forget_what_is_installed(root)
    for program in ("meshnet", "meshnet-agent"):
        link = root / "usr/local/bin" / program
        link.unlink(missing_ok=True)
        link.symlink_to(Path(sys.prefix, "bin", program))
    for name, content in boot["files"].items():
        file = root / "etc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (root / "old").mkdir()
    subprocess.run(["pivot_root", str(root), str(root / "old")], check=True)
    os.chdir("/")
    subprocess.run(["umount", "--lazy", "/old"], check=True)
    options = ["--system", f"--unit={boot['target']}", "--log-target=console", "--show-status=no"]
    environment = {"container": "meshnet-tests", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    os.execve("/lib/systemd/systemd", ["systemd", *options], environment)


def _make_root(directory: Path) -> Path:
    """A file system that looks like this machine's, and keeps what is written to it in memory."""
    _mount("--make-rprivate", "/")
    _mount("-t", "tmpfs", "tmpfs", str(directory))
    root, upper, work = directory / "root", directory / "upper", directory / "work"
    for made in (root, upper, work):
        made.mkdir()
    layers = f"lowerdir=/,upperdir={upper},workdir={work}"
    _mount("-t", "overlay", "-o", layers, "overlay", str(root))
    _mount("-t", "proc", "proc", str(root / "proc"))
    _mount("-t", "sysfs", "-o", "ro", "sysfs", str(root / "sys"))
    # An overlay can be no upper layer of another, so what the agent keeps is on none.
    for name, mode in (("dev", 755), ("run", 755), ("tmp", 1777), ("var/lib/meshnet", 700)):
        (root / name).mkdir(exist_ok=True)
        _mount("-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", str(root / name))
    for name in _DEVICES:
        _bind(f"/dev/{name}", root)
    return root


def _bind(path: str, root: Path) -> None:
    """Have a path of this machine be the same below a root."""
    place = Path(f"{root}{path}")
    if Path(path).is_dir():
        place.mkdir(parents=True, exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    _mount("--bind", path, str(place))


def _mount_cgroups(root: Path, hierarchies: list[list[str]]) -> None:
    """Anew: the root of what is mounted is this namespace's."""
    if [options for options, _ in hierarchies] == [""]:
        _mount("-t", "cgroup2", "cgroup2", str(root / "sys/fs/cgroup"))
        return
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / "sys/fs/cgroup"))
    for options, path in hierarchies:
        place = Path(f"{root}{path}").parent
        place.mkdir()
        _mount("-t", "cgroup", "-o", options, "cgroup", str(place))


def _forget_what_is_installed(root: Path) -> None:
    """No unit is wanted by another: booting would clean up, tune and mount what a machine has."""
    (root / "etc/fstab").unlink(missing_ok=True)
    shutil.rmtree(root / "usr/lib/systemd/system-generators", ignore_errors=True)
    for units in _UNITS:
        for wanted in (*(root / units).glob("*.wants"), *(root / units).glob("*.requires")):
            shutil.rmtree(wanted)


def _mount(*argv: str) -> None:
    subprocess.run(["mount", *argv], check=True)


if __name__ == "__main__":
    main()
