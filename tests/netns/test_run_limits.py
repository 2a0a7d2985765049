"""How the kernel applies a container's options: namespaces, control groups, copy-on-write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.bench import limits
from tests.netns.containers import is_clean, leftovers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.topology import Lab

pytestmark = pytest.mark.root


def test_each_namespace_and_limit_holds(
    make_lab: Callable[..., Lab], rootfs: Path, tmp_path: Path
) -> None:
    (host,) = make_lab(1).hosts
    rows = [
        *limits.namespaces(host, rootfs),
        *limits.limits(host, rootfs),
        *limits.copy_on_write(host, rootfs, tmp_path / "image.tar"),
    ]
    assert len(rows) == len(limits.KINDS) + 8
    assert all(row.holds for row in rows), limits.render(rows)
    assert is_clean(host), leftovers(host)
