"""Makes namespaces, and becomes systemd there.

    python -m tests.netns.systemd_unit.boot DIRECTORY

``boot.json`` in the directory says what to mount and to write, as
`tests.netns.systemd_unit.systemd` wrote it.
Nothing is written or removed before the root is the overlay, where all of that stays in memory.
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
_IN_MEMORY = {"/dev": 755, "/run": 755, "/tmp": 1777, "/var/lib/meshnet": 700}
"""Paths with file systems of their own, and their modes.  An overlay can be no upper layer of
another, so what the agent keeps is on none."""
_UNITS = ("/etc/systemd/system", "/usr/lib/systemd/system")
_NOT_OURS = "-sys_module,-sys_time,-sys_boot"


def main() -> None:
    """Twice: outside, and as process 1 within."""
    directory, *inside = sys.argv[1:]
    boot = json.loads(Path(directory, "boot.json").read_text())
    if inside:
        _become_systemd(directory, boot)
    # The root of a namespace of control groups is where the process is that makes it.
    for path in boot["groups"]:
        Path(path, "cgroup.procs").write_text(str(os.getpid()))
    again = [sys.executable, "-m", "tests.netns.systemd_unit.boot", directory, "inside"]
    os.execvp("unshare", ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--", *again])


def _become_systemd(directory: str, boot: dict[str, Any]) -> NoReturn:
    _change_root(directory)
    _mount("-t", "proc", "proc", "/proc")
    _mount("-t", "sysfs", "-o", "ro", "sysfs", "/sys")
    _let_set_sysctls_of_the_network_only()
    _mount_cgroups(boot["hierarchies"])
    for path, mode in _IN_MEMORY.items():
        Path(path).mkdir(exist_ok=True)
        _mount("-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", path)
    for name in _DEVICES:
        _bind(f"/dev/{name}")
    for path in boot["kept"]:
        if not Path(path).exists() or not any(Path(path).iterdir()):  # of another file system
            _bind(path)
    subprocess.run(["umount", "--lazy", "/old"], check=True)
    _forget_what_is_installed()
    for program in ("meshnet", "meshnet-agent"):
        link = Path("/usr/local/bin", program)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(sys.prefix, "bin", program))
    for name, content in boot["files"].items():
        file = Path("/etc", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    argv = ["setpriv", "--bounding-set", _NOT_OURS, "--", "/lib/systemd/systemd", "--system"]
    argv += [f"--unit={boot['target']}", "--log-target=console", "--show-status=no"]
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    os.execvpe("setpriv", argv, {"container": "meshnet-tests", "PATH": path})


def _change_root(directory: str) -> None:
    """A root that looks like this machine's, and keeps what is written to it in memory."""
    _mount("--make-rprivate", "/")
    _mount("-t", "tmpfs", "tmpfs", directory)
    root, upper, work = (Path(directory, name) for name in ("root", "upper", "work"))
    for made in (root, upper, work):
        made.mkdir()
    layers = f"lowerdir=/,upperdir={upper},workdir={work}"
    _mount("-t", "overlay", "-o", layers, "overlay", str(root))
    (root / "old").mkdir()
    subprocess.run(["pivot_root", str(root), str(root / "old")], check=True)
    os.chdir("/")


def _let_set_sysctls_of_the_network_only() -> None:
    _mount("--bind", "/proc/sys", "/proc/sys")
    _mount("--bind", "/proc/sys/net", "/proc/sys/net")
    _mount("-o", "remount,bind,ro", "/proc/sys")


def _mount_cgroups(hierarchies: list[list[str]]) -> None:
    """Anew: the root of what is mounted is this namespace's."""
    whole = "/sys/fs/cgroup"
    if all(place != whole for _, _, place in hierarchies):
        _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", whole)
    for kind, options, place in hierarchies:
        Path(place).mkdir(exist_ok=True)
        _mount("-t", kind, *(("-o", options) if options else ()), kind, place)


def _bind(path: str) -> None:
    """Have a path be what it is in the old root, to be read."""
    place, old = Path(path), Path(f"/old{path}")
    if old.is_dir():
        place.mkdir(parents=True, exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    _mount("--bind", "-o", "ro", str(old), path)


def _forget_what_is_installed() -> None:
    """No unit is wanted by another: booting would clean up, tune and mount what a machine has."""
    Path("/etc/fstab").unlink(missing_ok=True)
    shutil.rmtree("/usr/lib/systemd/system-generators", ignore_errors=True)
    for units in map(Path, _UNITS):
        for wanted in (*units.glob("*.wants"), *units.glob("*.requires")):
            shutil.rmtree(wanted)


def _mount(*argv: str) -> None:
    subprocess.run(["mount", *argv], check=True)


if __name__ == "__main__":
    main()
