"""The product in a machine's root directory: the package of ``make deb``, installed by dpkg."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

_TREE = Path(__file__).parents[2]
_FILES = ("meshnet", "agent", "pyproject.toml", "constraints-runtime.txt")
_DROP_IN = "etc/systemd/system/meshnet-agent.service.d"


def product_files() -> dict[str, bytes]:
    """All that the package is made from, by path."""
    found = {}
    for name in _FILES:
        path = _TREE / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                found[str(file.relative_to(_TREE))] = file.read_bytes()
    return found


def install(root: Path) -> None:
    """Install the package into a Debian system, as docs/operations.md says, containers included.

    Raises:
        subprocess.CalledProcessError: a step failed; its output was printed.
    """
    (package,) = (_TREE / "build").glob("meshnet_*.deb")
    inside = root / "opt" / package.name
    shutil.copy(package, inside)
    run("chroot", str(root), "dpkg", "--install", "--force-confnew", f"/opt/{package.name}")
    inside.unlink()
    (root / _DROP_IN).mkdir(parents=True, exist_ok=True)
    shutil.copy(root / "usr/share/meshnet/containers.conf", root / _DROP_IN)


def run(*argv: str) -> None:
    """Run a command; what it printed is shown if it fails.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, argv)
