"""Directories in the run directory that the client uses, for root and the API's group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.system.group import open_to_group

if TYPE_CHECKING:
    from pathlib import Path


def make_run_dir(directory: Path) -> None:
    """Make a directory for sockets that the client uses, open to root and the group meshnet."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    open_to_group(directory, 0o710)
