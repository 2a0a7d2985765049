"""Ids of containers: ranges that never overlap, and what --userns and volumes ask for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.errors import ConflictError, PoolExhaustedError, UsageError
from meshnet.runtime.spec.checks import check_options
from meshnet.runtime.spec.id_ranges import PER_CONTAINER, IdRange, allocate, check_free, parse_range
from meshnet.runtime.spec.mount_points import MountPoint, mount_points
from meshnet.runtime.spec.options import ContainerOptions
from meshnet.runtime.spec.userns import Userns, parse_userns

POOL = IdRange(1 << 20, 5 * PER_CONTAINER)
RANGES = st.builds(
    IdRange, st.integers(1, POOL.end + 9), st.integers(1, 3 * PER_CONTAINER)
)  # near the pool, within it, across its ends


def disjoint(ranges: list[IdRange]) -> list[IdRange]:
    """Those that containers can have at the same time."""
    kept: list[IdRange] = []
    for ids in ranges:
        if not any(ids.overlaps(other) for other in kept):
            kept.append(ids)
    return kept


@given(st.lists(RANGES, max_size=6).map(disjoint))
def test_what_is_allocated_is_free_and_of_the_pool(others: list[IdRange]) -> None:
    taken = {str(number): ids for number, ids in enumerate(others)}
    try:
        ids = allocate(POOL, taken)
    except PoolExhaustedError:
        # Then there is truly no place: it would begin at the pool's start or where another ends.
        starts = [POOL.first, *(o.end for o in others if POOL.first <= o.end)]
        fits = [IdRange(s, PER_CONTAINER) for s in starts if s + PER_CONTAINER <= POOL.end]
        assert all(any(f.overlaps(o) for o in others) for f in fits)
    else:
        assert ids.size == PER_CONTAINER
        assert POOL.first <= ids.first
        assert ids.end <= POOL.end
        assert not set(range(ids.first, ids.end)).intersection(
            itertools.chain.from_iterable((o.first, o.end - 1) for o in others)
        )
        assert check_free(ids, taken) == ids


def test_a_pool_is_used_up_and_again() -> None:
    taken: dict[str, IdRange] = {}
    for number in range(5):
        taken[str(number)] = allocate(POOL, taken)
    assert sorted(taken.values()) == [
        IdRange(POOL.first + n * PER_CONTAINER, PER_CONTAINER) for n in range(5)
    ]
    with pytest.raises(PoolExhaustedError, match=f"userns-range {POOL}"):
        allocate(POOL, taken)
    freed = taken.pop("2")
    assert allocate(POOL, taken) == freed


@given(RANGES, RANGES)
def test_overlaps_are_refused_by_name(one: IdRange, other: IdRange) -> None:
    in_both = max(one.first, other.first) < min(one.end, other.end)
    assert one.overlaps(other) is in_both
    if in_both:
        with pytest.raises(ConflictError, match="of container web"):
            check_free(one, {"web": other})
    else:
        assert check_free(one, {"web": other}) == one


@given(st.integers(1, (1 << 32) - 2), st.integers(1, 1 << 32))
def test_ranges_are_read(first: int, size: int) -> None:
    text = f"{first}:{size}"
    if first + size <= (1 << 32) - 1:
        assert str(parse_range(text, "r")) == text
    else:
        with pytest.raises(UsageError, match="FIRST:SIZE"):
            parse_range(text, "r")


@pytest.mark.parametrize("text", ["", "1", "0:9", "1:0", "-1:5", "1:2:3", "a:b", "1:", "²:1"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(UsageError, match="userns-range"):
        parse_range(text, "userns-range")


def test_user_namespaces() -> None:
    assert parse_userns("host") == Userns()
    assert parse_userns("auto") == Userns(auto=True)
    assert parse_userns("auto:5:6") == Userns(ids=IdRange(5, 6))
    assert parse_userns("container:web") == Userns(container="web")
    for text in ("", "self", "auto:", "auto:5", "auto:0:5", "container:", "web"):
        with pytest.raises(UsageError, match=r"namespace|--userns"):
            parse_userns(text)


def options(**fields: Any) -> ContainerOptions:  # noqa: ANN401
    return ContainerOptions(**{"image": "db:1"} | fields)


@pytest.mark.parametrize("userns", ["auto", "auto:5:6", "container:web"])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"privileged": True}, "--privileged"),
        ({"networks": ("host",)}, "--net host"),
        ({"pid": "host"}, "--pid host"),
    ],
)
def test_what_needs_the_hosts_root_is_refused(
    userns: str, fields: dict[str, Any], named: str
) -> None:
    check_options(options(**fields))
    with pytest.raises(UsageError, match=named):
        check_options(options(userns=userns, **fields))
    check_options(options(userns=userns, ipc="host", uts="host"))


def points(*declared: str, **fields: Any) -> tuple[MountPoint, ...]:  # noqa: ANN401
    numbers = itertools.count(1)
    return mount_points(options(**fields), declared, lambda: f"r{next(numbers)}")


def test_volumes_of_the_image() -> None:
    assert points("/data", "var/lib/", "/data/") == (
        MountPoint("r1", "/data", anonymous=True),
        MountPoint("r2", "/var/lib", anonymous=True),
    )
    # What is given for the path wins.
    assert points("/data", volumes=("/srv:/data/:ro",)) == ()
    assert points("/data", tmpfs=("/data:size=1m",)) == ()
    assert points("/data", volumes=("db:/data:ro",)) == (MountPoint("db", "/data", read_only=True),)
    with pytest.raises(UsageError, match="VOLUME"):
        points("/")


def test_volumes_of_the_options() -> None:
    assert points(volumes=("/a:/b", "db:/c", "/d")) == (
        MountPoint("db", "/c"),
        MountPoint("r1", "/d", anonymous=True),
    )
