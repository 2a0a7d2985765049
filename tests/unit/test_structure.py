"""How the tree is built: sizes that a reader can take in, and dependencies that go one way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.structure import Measures, measure

MOST_FILES, MOST_LINES, MOST_FUNCTION_LINES = 15, 400, 60
MOST_PARAMETERS, PARAMETERS_P90, MOST_CALLABLES = 7, 5, 9
HOLDERS = {
    "meshnet.state:KernelState",
    "meshnet.store.memory:_Database",
    "meshnet.lab.state:LabDocument",
    "meshnet_agent.dataplane.passes:_Applied",
    "meshnet_agent.endpoints.addresses.pool_view:PoolView",
}
"""Dataclasses that hold one state and are filled in one place: they wire nothing to anything."""


@pytest.fixture(scope="module")
def tree() -> Measures:
    return measure(Path(__file__).parents[2])


def test_folders_files_and_functions(tree: Measures) -> None:
    product = tree.product
    assert [f for f in product.folders if f.number > MOST_FILES] == []
    assert [f for f in product.files if f.number > MOST_LINES] == []
    assert [f for f in product.functions if f.number > MOST_FUNCTION_LINES] == []


def test_what_a_part_is_made_of(tree: Measures) -> None:
    wide = {c.name for c in tree.constructors if c.number > MOST_PARAMETERS}
    assert wide <= HOLDERS
    assert tree.constructor_p90 <= PARAMETERS_P90
    assert sum(map(len, tree.callables.values())) <= MOST_CALLABLES


def test_nothing_goes_in_circles(tree: Measures) -> None:
    assert tree.import_circles == tree.type_circles == []
    assert tree.c_circles == tree.c_include_circles == []


def test_a_mode_is_named_by_its_backend_alone(tree: Measures) -> None:
    assert tree.mode_names == []
