"""Some of `tests.unit.sequences`, always the same; and that they would see what is broken."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from meshnet.tables import Table
from tests.unit.mesh import full_mesh, open_mesh
from tests.unit.sequences import Broken, World, look, play

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock


@pytest.mark.parametrize("seed", range(4))
def test_a_sequence(seed: int) -> None:
    assert play(seed).story


async def test_a_lost_packet_would_be_seen(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 2)
        world = World(mesh, Random(0), whole={node.id for node in mesh.nodes})
        look(world)
        entry = next(iter(mesh.nodes[0].state().fdb))
        mesh.nodes[0].kernel.by_hand(Table.FDB, entry, bytes((10, 9, 0, 99)))
        with pytest.raises(Broken, match="from h1 to h2 are lost"):
            look(world)
