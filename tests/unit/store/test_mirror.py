"""The copy of the store: good values stay in force, and deleted ones do not stay."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.codec.hosts import encode_claim, encode_host, encode_reservation
from meshnet.codec.networks import encode_network
from meshnet.model import Claim, Host, HostId, NetworkName, Reservation
from meshnet.store import Change, KeyValue, Listing, WatchBatch
from meshnet.store.mirror import (
    HOSTS,
    MESH,
    NETWORKS,
    SUBNETS,
    Changes,
    Mirror,
    alive_key,
    host_key,
    load,
    network_key,
    subnet_key,
)
from tests.values import make_network, make_snapshot

if TYPE_CHECKING:
    from meshnet.model import MeshSnapshot

PROD = NetworkName("prod")
SUBNET = ip_network("10.42.0.0/24")
SMALL = make_snapshot([make_network()], 1)
SNAPSHOT = make_snapshot([make_network(), make_network("test", ("10.43.0.0/16",), 7)], 3)


def keys_of(snapshot: MeshSnapshot) -> dict[str, bytes]:
    """What the store holds where the mesh is as in `snapshot`."""
    found = {network_key(n): encode_network(v) for n, v in snapshot.networks.items()}
    found |= {host_key(h): encode_host(v) for h, v in snapshot.hosts.items()}
    found |= {alive_key(h): encode_claim(c) for h, c in snapshot.alive.items()}
    for network, owned in snapshot.reservations.items():
        for subnet, host in owned.items():
            reservation = Reservation(network=network, subnet=subnet, host=host)
            found[subnet_key(network, subnet)] = encode_reservation(reservation)
    return found


def listing(keys: dict[str, bytes], revision: int = 1) -> Listing:
    return Listing(tuple(KeyValue(k, v, revision) for k, v in sorted(keys.items())), revision)


def loaded(keys: dict[str, bytes]) -> Mirror:
    return load(listing(keys))


def put(mirror: Mirror, key: str, value: bytes | None, revision: int = 2) -> MeshSnapshot:
    mirror.apply(WatchBatch((Change(key, value, revision),), revision))
    return mirror.snapshot()


def test_a_listing_and_the_same_by_changes() -> None:
    keys = keys_of(SNAPSHOT)
    assert loaded(keys).snapshot() == SNAPSHOT
    followed = Mirror()
    followed.apply(WatchBatch(tuple(Change(k, v, 1) for k, v in keys.items()), 1))
    assert followed.snapshot() == SNAPSHOT


def test_removal_of_every_key_leaves_nothing() -> None:
    keys = keys_of(SNAPSHOT)
    for mirror in (loaded(keys), loaded(keys)):
        mirror.apply(WatchBatch(tuple(Change(k, None, 2) for k in keys), 2))
        assert mirror.snapshot() == type(SNAPSHOT)(revision=2)
    mirror = load(listing({}, 3), before=loaded(keys))
    assert mirror.snapshot() == type(SNAPSHOT)(revision=3)


@given(st.lists(st.tuples(st.sampled_from(sorted(keys_of(SNAPSHOT))), st.booleans()), max_size=30))
def test_following_is_the_same_as_listing(steps: list[tuple[str, bool]]) -> None:
    every = keys_of(SNAPSHOT)
    keys: dict[str, bytes] = {}
    mirror = Mirror()
    for revision, (key, is_put) in enumerate(steps, 1):
        put(mirror, key, every[key] if is_put else None, revision)
        keys.pop(key, None)
        if is_put:
            keys[key] = every[key]
    mirror.revision = len(steps)
    assert mirror.snapshot() == load(listing(keys, len(steps))).snapshot()


Steps = list[tuple[str, bool]]
STEPS = st.lists(st.tuples(st.sampled_from(sorted(keys_of(SNAPSHOT))), st.booleans()), max_size=30)


def after(steps: Steps, held: dict[str, KeyValue], revision: int) -> dict[str, KeyValue]:
    """Return what a store holds after some more steps."""
    every, held = keys_of(SNAPSHOT), dict(held)
    for at, (key, is_put) in enumerate(steps, revision + 1):
        held.pop(key, None)
        if is_put:
            held[key] = KeyValue(key, every[key], at)
    return held


@given(STEPS, STEPS)
def test_what_came_later_contradicts_nothing(steps: Steps, more: Steps) -> None:
    seen = after(steps, {}, 0)
    before = load(Listing(tuple(seen.values()), len(steps)))
    now = after(more, seen, len(steps))
    assert load(Listing(tuple(now.values()), len(steps + more)), before).contradiction is None


OTHERWISE = {
    network_key(PROD): encode_network(make_network(subnets=("10.77.0.0/16",))),
    host_key(HostId("h1")): encode_host(Host(id=HostId("h1"), underlay_ip=ip_address("10.9.9.9"))),
    subnet_key(PROD, SUBNET): encode_reservation(
        Reservation(network=PROD, subnet=SUBNET, host=HostId("h3"))
    ),
}


@pytest.mark.parametrize("is_put", [True, False], ids=["put", "deleted"])
@pytest.mark.parametrize("key", OTHERWISE)
def test_a_listing_of_another_history_contradicts(key: str, is_put: bool) -> None:
    """A store was restored from before the last change that was seen, and went on."""
    start = {k: KeyValue(k, v, 1) for k, v in keys_of(SNAPSHOT).items()}
    seen = {k: item for k, item in start.items() if k != key}
    if is_put:
        seen[key] = KeyValue(key, OTHERWISE[key], 2)
    before = load(Listing(tuple(seen.values()), 2))
    h2 = host_key(HostId("h2"))
    on = {**start, h2: KeyValue(h2, start[h2].value, 9)}
    assert load(Listing(tuple(on.values()), 9), before).contradiction == key


def test_a_listing_replaces_what_went_unseen() -> None:
    keys = keys_of(SNAPSHOT)
    smaller = make_snapshot([make_network()], 2)
    assert load(listing(keys_of(smaller)), before=loaded(keys)).snapshot() == smaller


@pytest.mark.parametrize("key", sorted(keys_of(make_snapshot([make_network()], 1))))
def test_a_listing_with_a_bad_value_keeps_the_last_good_one(key: str) -> None:
    keys = keys_of(make_snapshot([make_network()], 1))
    good = loaded(keys)
    damaged = listing(keys | {key: b"{"}, 2)
    again = load(damaged, before=load(damaged, before=good)).snapshot()
    assert again.bad_values.keys() == {key}
    assert not again.holes
    assert (again.networks, again.hosts, again.alive, again.reservations) == (
        SMALL.networks,
        SMALL.hosts,
        SMALL.alive,
        SMALL.reservations,
    )
    assert load(damaged).snapshot().holes == ({key} if "/alive/" not in key else set())


@pytest.mark.parametrize("key", sorted(keys_of(make_snapshot([make_network()], 1))))
def test_a_bad_value_keeps_the_last_good_one_and_is_named(key: str) -> None:
    keys = keys_of(make_snapshot([make_network()], 1))
    mirror = loaded(keys)
    good = mirror.snapshot()
    bad = put(mirror, key, b"\xff{")
    assert bad.bad_values.keys() == {key}
    assert (bad.networks, bad.hosts, bad.alive, bad.reservations) == (
        good.networks,
        good.hosts,
        good.alive,
        good.reservations,
    )
    assert put(mirror, key, keys[key]).bad_values == {}
    put(mirror, key, b"")
    gone = put(mirror, key, None)
    assert gone.bad_values == {}
    without = loaded({k: v for k, v in keys.items() if k != key}).snapshot()
    assert (gone.networks, gone.hosts, gone.alive, gone.reservations) == (
        without.networks,
        without.hosts,
        without.alive,
        without.reservations,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (NETWORKS + "other", encode_network(make_network())),
        (NETWORKS, encode_network(make_network())),
        (HOSTS + "h2", encode_host(SNAPSHOT.hosts[HostId("h1")])),
        (SUBNETS + "prod/10.42.0.1-24", b'{"v":1,"host":"h1"}'),
        (SUBNETS + "prod", b'{"v":1,"host":"h1"}'),
        (MESH + "colours/green", b"{}"),
        (MESH, b"{}"),
    ],
)
def test_values_that_contradict_their_key(key: str, value: bytes) -> None:
    snapshot = loaded({key: value}).snapshot()
    assert snapshot.bad_values.keys() == {key}
    assert not snapshot.networks
    assert not snapshot.hosts
    assert not snapshot.reservations


def test_a_reservation_changes_hands() -> None:
    mirror = loaded(keys_of(make_snapshot([make_network()], 1)))
    theirs = Reservation(network=PROD, subnet=SUBNET, host=HostId("h9"))
    snapshot = put(mirror, subnet_key(PROD, SUBNET), encode_reservation(theirs))
    assert snapshot.reservations == {PROD: {SUBNET: HostId("h9")}}


def test_networks_come_oldest_first() -> None:
    names = ["c", "a", "b"]
    keys = {
        network_key(NetworkName(name)): encode_network(
            make_network(name, (f"10.{i}.0.0/16",), i + 1)
        )
        for i, name in enumerate(names)
    }
    followed = Mirror()
    for revision, (key, value) in enumerate(keys.items(), 1):
        put(followed, key, value, revision)
    items = [KeyValue(key, value, i) for i, (key, value) in enumerate(keys.items(), 1)]
    listed = load(Listing(tuple(sorted(items, key=lambda item: item.key)), 3))
    for mirror in (followed, listed):
        assert list(mirror.snapshot().networks) == names


def test_a_snapshot_does_not_change_afterwards() -> None:
    mirror = loaded(keys_of(SNAPSHOT))
    before = mirror.snapshot()
    mirror.apply(WatchBatch(tuple(Change(k, None, 2) for k in keys_of(SNAPSHOT)), 2))
    assert before == SNAPSHOT


def test_what_changes_come_to() -> None:
    keys = keys_of(SNAPSHOT)
    mirror = loaded(keys)
    theirs = Reservation(network=PROD, subnet=SUBNET, host=HostId("h9"))
    moved = Host(id=HostId("h2"), underlay_ip=ip_address("192.0.2.9"))
    steps: list[tuple[str, bytes | None, Changes]] = [
        (host_key(HostId("h1")), keys[host_key(HostId("h1"))], Changes()),  # the same again
        (host_key(moved.id), encode_host(moved), Changes({moved.id}, {moved.id})),
        (host_key(moved.id), None, Changes({moved.id}, {moved.id})),
        (alive_key(HostId("h3")), None, Changes(set(), {HostId("h3")})),
        (
            subnet_key(PROD, SUBNET),
            encode_reservation(theirs),
            Changes({HostId("h1"), HostId("h9")}),
        ),
        (subnet_key(PROD, SUBNET), None, Changes({HostId("h9")})),
        (subnet_key(PROD, SUBNET), None, Changes()),
        (subnet_key(PROD, SUBNET), b"{", Changes(networks=True)),
        (network_key(PROD), None, Changes(networks=True)),
    ]
    for revision, (key, value, expected) in enumerate(steps, 2):
        batch = WatchBatch((Change(key, value, revision),), revision)
        assert mirror.apply(batch) == expected, (key, value)
    assert mirror.apply(WatchBatch((), 99)) == Changes()


def test_an_empty_batch_moves_the_revision_and_an_old_one_does_not() -> None:
    mirror = Mirror()
    mirror.apply(WatchBatch((), 7))
    assert mirror.snapshot().revision == 7
    mirror.apply(WatchBatch((), 5))
    assert mirror.snapshot().revision == 7


@given(st.text(max_size=20), st.binary(max_size=40))
def test_any_key_and_value(rest: str, value: bytes) -> None:
    mirror = Mirror()
    put(mirror, MESH + rest, value)
    claim = encode_claim(Claim(instance="i", underlay_ip=SNAPSHOT.hosts[HostId("h1")].underlay_ip))
    put(mirror, MESH + rest, claim)
    assert put(mirror, MESH + rest, None) == type(SNAPSHOT)(revision=2)
