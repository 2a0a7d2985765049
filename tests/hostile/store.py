"""Values and keys of etcd: anybody with its credentials may have written them."""

from __future__ import annotations

import json
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import msgspec

from meshnet.backends import NexthopIds
from meshnet.codec.document import BadValueError
from meshnet.codec.endpoints import decode_endpoint, encode_endpoint
from meshnet.codec.hosts import (
    decode_claim,
    decode_host,
    decode_reservation,
    encode_claim,
    encode_host,
    encode_reservation,
)
from meshnet.codec.networks import check_network, decode_network, encode_network
from meshnet.model import AddressRange, HostId, NetworkName, Reservation
from meshnet.modes import Mode
from meshnet.plan import LocalView, plan_mesh
from meshnet.store import Change, WatchBatch
from meshnet.store.mirror import MESH, Mirror, alive_key, host_key, network_key, subnet_key
from meshnet_agent.api.documents.endpoints import endpoint_document
from meshnet_agent.api.documents.hosts import host_document
from meshnet_agent.api.documents.networks import network_document
from tests.hostile.campaign import (
    TEXTS,
    Campaign,
    assert_clear,
    damage_bytes,
    damaged,
    pack,
    plain,
    unpack,
)
from tests.values import ME, make_endpoint, make_network, make_snapshot, make_underlay

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

PROD = NetworkName("prod")
_NETWORKS = (
    make_network(subnets=("10.42.0.0/16", "fd00:42::/48"), fallback=True),
    make_network("dev", ("10.43.0.0/16",), 7, direct_routing=True),
)
_SNAPSHOT = make_snapshot(_NETWORKS, 4)
_UNDERLAY = make_underlay(4, 4)


def _keys() -> dict[str, bytes]:
    found = {network_key(n): encode_network(v) for n, v in _SNAPSHOT.networks.items()}
    found |= {host_key(h): encode_host(v) for h, v in _SNAPSHOT.hosts.items()}
    found |= {alive_key(h): encode_claim(c) for h, c in _SNAPSHOT.alive.items()}
    for network, owned in _SNAPSHOT.reservations.items():
        for subnet, host in owned.items():
            reservation = Reservation(network=network, subnet=subnet, host=host)
            found[subnet_key(network, subnet)] = encode_reservation(reservation)
    return found


KEYS = _keys()
_RESERVATION = encode_reservation(
    Reservation(network=PROD, subnet=_NETWORKS[0].subnets[0], host=ME)
)


def _decode_reservation(raw: bytes) -> Reservation:
    return decode_reservation(PROD, "10.42.3.0-24", raw)


_UNDERLAY_NETWORK = encode_network(
    make_network(
        "lan",
        ("192.0.2.0/24",),
        9,
        mode=Mode.MACVLAN,
        parent="eth0",
        ranges=(AddressRange(ip_address("192.0.2.10"), ip_address("192.0.2.20")),),
        gateways=(ip_address("192.0.2.1"),),
    )
)
KINDS: tuple[tuple[tuple[bytes, ...], Callable[[bytes], Any], Callable[[Any], bytes]], ...] = (
    (
        (encode_network(_NETWORKS[0]), _UNDERLAY_NETWORK),
        decode_network,
        encode_network,
    ),
    ((encode_host(_SNAPSHOT.hosts[ME]),), decode_host, encode_host),
    ((encode_claim(_SNAPSHOT.alive[ME]),), decode_claim, encode_claim),
    ((_RESERVATION,), _decode_reservation, encode_reservation),
    (
        (encode_endpoint(make_endpoint(("10.42.0.2/24", "fd00:42::2/64"))),),
        decode_endpoint,
        encode_endpoint,
    ),
)
"""Of each kind of value: good ones, how it is read and how it is written."""


def _make_value(random: Random) -> bytes:
    kind = random.randrange(len(KINDS))
    good = random.choice(KINDS[kind][0])
    if random.randrange(20) == 0:
        return bytes((kind,)) + random.randbytes(random.choice((3, 100, 65_536)))
    return bytes((kind,)) + damaged(random, json.loads(good))


def check_value(data: bytes) -> str:
    """Either a value that is written as it was read, or `BadValueError` in clear words."""
    if not data:
        return "empty"
    _, decode, encode = KINDS[data[0] % len(KINDS)]
    try:
        value = decode(data[1:])
    except BadValueError as error:
        assert_clear(str(error))
        return "refused"
    assert decode(encode(value)) == value
    if decode is decode_network:
        check_network(value)
        msgspec.json.encode(network_document(value, None))
    elif decode is decode_endpoint:
        msgspec.json.encode(endpoint_document(value))
    return "taken"


def _make_key(random: Random) -> bytes:
    """Some keys of a mesh with a value that is damaged or not theirs, or with a damaged name."""
    parts = []
    for _ in range(random.randrange(1, 4)):
        key, value = random.choice(list(KEYS.items()))
        raw = key.encode()
        match random.randrange(6):
            case 0:
                prefix = random.choice(("", "networks/", "hosts/", "alive/", "subnets/", "x/"))
                raw = (MESH + prefix + random.choice(TEXTS)).encode("utf-8", "surrogatepass")
            case 1:
                head = raw.rpartition(b"/")[0] + b"/"
                raw = head + random.choice(TEXTS).encode("utf-8", "surrogatepass")
            case 2:
                raw = MESH.encode() + damage_bytes(random, raw.removeprefix(MESH.encode()))
            case 3:
                value = random.choice(list(KEYS.values()))
            case _:
                value = damaged(random, json.loads(value))
        parts += [raw, value]
    return pack(*parts)


def check_keys(data: bytes) -> str:
    """The mesh with such keys can be planned for and shown; without them it is as before."""
    parts = unpack(data)
    mirror = Mirror()
    mirror.apply(WatchBatch(tuple(Change(k, v, 1) for k, v in KEYS.items()), 1))
    changes = [
        # As `meshnet.store._etcd_messages` reads keys.
        Change(key.decode("utf-8", "surrogateescape"), value, 2)
        for key, value in zip(parts[::2], parts[1::2], strict=False)
    ]
    mirror.apply(WatchBatch(tuple(changes), 2))
    snapshot = mirror.snapshot()
    local = LocalView(host=ME, subnets={n: snapshot.subnets_of(ME, n) for n in snapshot.networks})
    plan = plan_mesh(snapshot, local, _UNDERLAY, NexthopIds())
    for network in snapshot.networks.values():
        check_network(network)
    documents = [host_document(h, snapshot, {}, {}) for h in snapshot.hosts.values()]
    errors = [text for o in plan.networks.values() for text in (*o.errors, *o.peer_errors.values())]
    bad = [*snapshot.bad_values, *snapshot.holes, *snapshot.bad_values.values()]
    msgspec.json.encode([documents, errors, bad])
    for text in bad:
        assert_clear(text)
    for change in changes:
        good = KEYS.get(change.key)
        mirror.apply(WatchBatch((Change(change.key, good, 3),), 3))
    after = mirror.snapshot()
    assert (after.networks, after.hosts) == (_SNAPSHOT.networks, _SNAPSHOT.hosts)
    assert (after.alive, after.reservations) == (_SNAPSHOT.alive, _SNAPSHOT.reservations)
    assert not after.bad_values
    assert not after.holes
    assert HostId("") not in after.hosts
    return "bad" if snapshot.bad_values else "taken"


VALUES = Campaign("values", _make_value, plain(check_value), 900)
STORE = Campaign("keys", _make_key, plain(check_keys), 250)
