"""The group whose members may use meshnet without being root, where the host has such a group."""

from __future__ import annotations

import contextlib
import grp
import os

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    from pathlib import Path

GROUP = "meshnet"


def open_to_group(path: Path, mode: int) -> None:
    """Give a file to the group, where there is one; `mode` counts then."""
    with contextlib.suppress(KeyError, OSError):
        os.chown(path, -1, grp.getgrnam(GROUP).gr_gid)
        path.chmod(mode)
