"""Files in the run directory that the client uses: root's, and the group's that may use the API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.system.group import open_to_group

if TYPE_CHECKING:
    from pathlib import Path


def make_run_dir(directory: Path) -> None:
    """A directory with sockets that the client uses: root's, and the group meshnet's."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    open_to_group(directory, 0o710)
