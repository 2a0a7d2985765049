"""Fixtures for all tests."""

from __future__ import annotations

import os
import shutil

import pytest

_PROGRAMS = ("ip", "bridge", "nft")


@pytest.fixture(scope="session")
def root() -> None:
    """Skip on a machine that lacks what kernel tests need.  In CI fail, or nobody would notice."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if os.geteuid() == 0 and not missing:
        return
    reason = f"needs root and the programs {', '.join(_PROGRAMS)}"
    if os.environ.get("CI"):
        pytest.fail(f"CI is set, and this machine {reason}")
    pytest.skip(reason)
