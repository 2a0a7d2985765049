"""Files in the run directory that the client uses: root's, and the group's that may use the API."""

from __future__ import annotations

import contextlib
import grp
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_GROUP = "meshnet"


def make_run_dir(directory: Path) -> None:
    """A directory with sockets that the client uses: root's, and the group meshnet's."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    open_to_group(directory, 0o710)


def open_to_group(path: Path, mode: int) -> None:
    """Give a file to the group meshnet, where there is one; `mode` counts then."""
    with contextlib.suppress(KeyError, OSError):
        os.chown(path, -1, grp.getgrnam(_GROUP).gr_gid)
        path.chmod(mode)
