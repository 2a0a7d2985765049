"""Volumes: directories of containers that outlive their writable layers.

::

    DIR/NAME/data/        what is mounted; owners as the container sees them
    DIR/NAME/volume.json  {"anonymous", "created_s"}
    DIR/.…                under way, or going

A volume appears and goes by one rename, so a process that is killed leaves none by halves.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError, MeshnetError, NotFoundError, UsageError
from meshnet.system import libc
from meshnet.system.files import sync
from meshnet.text import check_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_DATA, _ABOUT, _UNDER_WAY = "data", "volume.json", "."


@dataclass(frozen=True, slots=True)
class StoredVolume:
    """A volume that is there.

    Attributes:
        anonymous: made for one container, and nobody gave it a name.
        created_s: Unix time.
    """

    name: str
    path: str
    anonymous: bool
    created_s: float


class VolumeStore:
    """The volumes below a directory.  Every method blocks, and may raise `KernelRefusedError`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def all(self) -> list[StoredVolume]:
        """All volumes, by name."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for directory in sorted(self._root.iterdir()):
                if not directory.name.startswith(_UNDER_WAY):
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                        about = json.loads((directory / _ABOUT).read_bytes())
                        path = str(directory / _DATA)
                        found.append(StoredVolume(directory.name, path, **about))
        return found

    def data(self, name: str) -> Path:
        """Where the content of a volume is, if it is there.

        Raises:
            UsageError: that cannot be a name.
        """
        check_name("volume", name)
        return self._root / name / _DATA

    def make(
        self, name: str, rootfs: Path, place: str, *, anonymous: bool, created_s: float
    ) -> None:
        """Make a volume, unless it is there, with what an image has at its place: a copy.

        Args:
            rootfs: where the image's root is mounted, its owners as they are on the disk.

        Raises:
            UsageError: the place is a file.
        """
        if self.data(name).exists():
            return
        with self._refusals(name), self._staging() as staging:
            data = staging / _DATA
            data.mkdir(mode=0o755)
            data.chmod(0o755)
            _copy(rootfs, place, data)
            about = {"anonymous": anonymous, "created_s": created_s}
            (staging / _ABOUT).write_text(json.dumps(about))
            try:
                os.rename(staging, self._root / name)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise  # else somebody was faster
            sync(self._root)

    def set_aside(self, name: str) -> Path:
        """Take a volume out of sight, at once; its content goes by `shutil.rmtree`.

        Raises:
            NotFoundError: there is none.
        """
        if not self.data(name).exists():
            raise NotFoundError(f"volume {name} does not exist: meshnet volume ls lists them")
        with self._refusals(name):
            grave = Path(tempfile.mkdtemp(prefix=_UNDER_WAY, dir=self._root))
            os.rename(self._root / name, grave)
            return grave

    def collect(self) -> None:
        """Remove what killed processes left; nobody may be at work meanwhile."""
        for directory in self._root.glob(f"{_UNDER_WAY}*"):
            shutil.rmtree(directory, ignore_errors=True)

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=_UNDER_WAY, dir=self._root))
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @contextlib.contextmanager
    def _refusals(self, name: str) -> Iterator[None]:
        try:
            yield
        except MeshnetError:
            raise
        except OSError as error:
            raise KernelRefusedError(
                f"volume {name} in {self._root} cannot be used: {error}"
            ) from error


def _copy(rootfs: Path, place: str, target: Path) -> None:
    """Copy a directory of a root file system with all that files have, the directory's own too."""
    try:
        source = _open_in_root(rootfs, place)
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise UsageError(
            f"volume {place} is a file in the image: mount a file there by -v"
        ) from error
    try:
        if not stat.S_ISDIR(os.fstat(source).st_mode):
            raise UsageError(f"volume {place} is a file in the image: mount a file there by -v")
        command = [
            "cp",
            "--archive",
            "--no-target-directory",
            f"/proc/self/fd/{source}/.",
            str(target),
        ]
        done = subprocess.run(command, capture_output=True, pass_fds=(source,), check=False)
        if done.returncode != 0:
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise KernelRefusedError(
                f"{place} of the image cannot be copied into a volume: {''.join(reason)}"
            )
    finally:
        os.close(source)


def _open_in_root(rootfs: Path, place: str) -> int:
    """Open a path as a process with that root would: no link leads out (openat2(2))."""
    root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return libc.openat2(root, place, os.O_PATH | os.O_CLOEXEC, libc.RESOLVE_IN_ROOT)
    finally:
        os.close(root)
