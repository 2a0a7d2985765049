"""The mesh on a host's disk: read back as it was, with a hole, and damage is never taken for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from meshnet.codec.document import BadValueError
from meshnet.codec.hosts import encode_claim, encode_host, encode_reservation
from meshnet.codec.networks import encode_network
from meshnet.model import HostId, Reservation
from meshnet.store import Change, KeyValue, WatchBatch
from meshnet.store.mirror import Mirror, alive_key, host_key, network_key, subnet_key
from meshnet.store.saved import decode_saved, encode_saved
from tests.values import make_network, make_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

_SNAPSHOT = make_snapshot(
    [make_network(), make_network("other", vni=4098, subnets=["10.9.0.0/16"])], 4, dead=["h3"]
)


def _items() -> Iterator[KeyValue]:
    # The network that is named last was written first.
    for number, (name, network) in enumerate(_SNAPSHOT.networks.items()):
        yield KeyValue(network_key(name), encode_network(network), 9 - number)
    for host in _SNAPSHOT.hosts.values():
        yield KeyValue(host_key(host.id), encode_host(host), 3)
    for identity, claim in _SNAPSHOT.alive.items():
        yield KeyValue(alive_key(identity), encode_claim(claim), 4)
    for name, held in _SNAPSHOT.reservations.items():
        for subnet, owner in held.items():
            value = encode_reservation(Reservation(network=name, subnet=subnet, host=owner))
            yield KeyValue(subnet_key(name, subnet), value, 5)


def _mirror() -> Mirror:
    mirror = Mirror()
    mirror.add_listed(_items())
    mirror.finish(20)
    gone = Change(key=host_key(HostId("h9")), value=None, revision=21)
    mirror.apply(WatchBatch((gone,), 21))
    return mirror


def _saved() -> bytes:
    return encode_saved(_mirror().state(), mesh="m1", host=HostId("h1"), now_s=1234.5)


def test_what_is_saved_is_read_back_with_a_hole() -> None:
    before = _mirror().state()
    saved = decode_saved(_saved())
    assert (saved.mesh, saved.host, saved.saved_at_s) == ("m1", "h1", 1234.5)
    after = saved.mirror.state()
    assert after.snapshot == replace(before.snapshot, holes=frozenset({"etcd"}))
    assert list(after.snapshot.networks) == list(before.snapshot.networks) == ["other", "prod"]
    assert (after.last_put, after.last_deletion) == (before.last_put, before.last_deletion)
    assert encode_saved(after, mesh="m1", host=HostId("h1"), now_s=1234.5) == _saved()


def test_a_listing_in_its_place_has_no_hole() -> None:
    mirror = Mirror(before=decode_saved(_saved()).mirror)
    mirror.add_listed(_items())
    mirror.finish(30)
    assert mirror.contradiction is None
    assert not mirror.view().holes


def test_a_listing_of_another_history_contradicts_it() -> None:
    """Etcd was restored from an older copy and written to since: its revision does not tell."""
    mirror = Mirror(before=decode_saved(_saved()).mirror)
    known = _SNAPSHOT.hosts
    moved = replace(known[HostId("h2")], underlay_ip=known[HostId("h4")].underlay_ip)
    mirror.add_listed([KeyValue(host_key(HostId("h2")), encode_host(moved), 12)])
    mirror.finish(30)
    assert mirror.contradiction == host_key(HostId("h2"))


def test_a_file_that_is_cut_or_changed_anywhere_is_refused() -> None:
    raw = _saved()
    for at in range(len(raw)):
        with pytest.raises(BadValueError):
            decode_saved(raw[:at])
        with pytest.raises(BadValueError):
            decode_saved(raw[:at] + bytes((raw[at] ^ 1,)) + raw[at + 1 :])
