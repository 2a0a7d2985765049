"""Control groups that tests make."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def removed(cgroup: Path) -> bool:
    """Remove a cgroup and those below it; the last process may not be gone entirely."""
    try:
        for directory, _, _ in os.walk(cgroup, topdown=False):
            os.rmdir(directory)
    except OSError:
        return False
    return True
