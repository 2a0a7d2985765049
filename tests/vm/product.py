"""The product in a machine's root directory, installed as docs/operations.md says."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_TREE = Path(__file__).parents[2]
_FILES = ("meshnet", "agent", "pyproject.toml", "constraints.txt", "README.md")
_VENV = "/opt/meshnet"
_UNITS = "etc/systemd/system"
_LIBRARY = "meshnet/vtep/native/libmeshnet-vtep.so"


def product_files() -> dict[str, bytes]:
    """All that the product is made of, by path."""
    found = {}
    for name in _FILES:
        path = _TREE / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                found[str(file.relative_to(_TREE))] = file.read_bytes()
    return found


def install(root: Path, files: dict[str, bytes]) -> None:
    """Install the product into a Debian system; what it depends on only if that changed.

    Raises:
        subprocess.CalledProcessError: a step failed; its output was printed.
    """
    pinned = hashlib.sha256(files["constraints.txt"]).hexdigest()
    stamp = root / "opt/meshnet.constraints"
    if not stamp.exists() or stamp.read_text() != pinned:
        _install_dependencies(root)
        stamp.write_text(pinned)
    with tempfile.TemporaryDirectory(dir=root / "opt") as directory:
        _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, str(_TREE))
        (wheel,) = Path(directory).glob("meshnet-*.whl")
        inside = f"/opt/{Path(directory).name}/{wheel.name}"
        _in(
            root,
            f"{_VENV}/bin/pip",
            "install",
            "--no-index",
            "--no-deps",
            "--force-reinstall",
            inside,
        )
    (packages,) = (root / "opt/meshnet/lib").glob("python3*/site-packages")
    shutil.copy(_TREE / _LIBRARY, packages / _LIBRARY)
    for program in ("meshnet", "meshnet-agent"):
        link = root / "usr/local/bin" / program
        link.unlink(missing_ok=True)
        link.symlink_to(f"{_VENV}/bin/{program}")
    shutil.copy(_TREE / "agent/systemd/meshnet-agent.service", root / _UNITS)
    drop_in = root / _UNITS / "meshnet-agent.service.d"
    drop_in.mkdir(exist_ok=True)
    shutil.copy(_TREE / "agent/systemd/containers.conf", drop_in)
    (root / "etc/meshnet").mkdir(exist_ok=True)
    (root / "etc/meshnet/agent.env").write_text("MESHNET_CONFIG=/etc/meshnet/agent.toml\n")
    _in(root, "groupadd", "--system", "--force", "meshnet")


def _install_dependencies(root: Path) -> None:
    """From files that this machine's pip has fetched: the root may have no way to a registry."""
    with tempfile.TemporaryDirectory(dir=root / "opt") as directory:
        pinned = ("--require-hashes", "-r", str(_TREE / "constraints.txt"))
        _pip("download", "--quiet", "--dest", directory, *pinned)
        shutil.rmtree(root / "opt/meshnet", ignore_errors=True)
        _in(root, "python3", "-m", "venv", _VENV)
        offline = ("--no-index", "--find-links", f"/opt/{Path(directory).name}")
        _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, str(_TREE))
        _in(root, f"{_VENV}/bin/pip", "install", "--quiet", *offline, "meshnet")


def _pip(*arguments: str) -> None:
    _run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments])


def _in(root: Path, *argv: str) -> None:
    _run(["chroot", str(root), *argv])


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, argv)
