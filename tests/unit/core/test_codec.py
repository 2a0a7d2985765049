"""Values of the store: they are read back as they were written, and nothing else is accepted."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.codec.document import MAX_VALUE_BYTES, BadValueError
from meshnet.codec.endpoints import (
    address_from_key,
    decode_address_holder,
    decode_endpoint,
    encode_address_holder,
    encode_endpoint,
)
from meshnet.codec.hosts import (
    decode_claim,
    decode_host,
    decode_reservation,
    encode_claim,
    encode_host,
    encode_reservation,
    subnet_from_key,
    subnet_to_key,
)
from meshnet.codec.networks import check_network, decode_network, encode_network
from meshnet.errors import UsageError
from meshnet.model import AddressHolder, Claim, HostId, NetworkName, Reservation
from meshnet.modes import Mode
from tests.unit import strategies
from tests.values import make_endpoint, make_network

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.model import Endpoint, Host, IpNetwork, Network

DECODERS: list[Callable[[bytes], object]] = [
    decode_network,
    decode_host,
    decode_claim,
    decode_endpoint,
    lambda raw: decode_reservation(NetworkName("prod"), "10.42.3.0-24", raw),
    decode_address_holder,
]
subnets = st.one_of(strategies.cidrs(4), strategies.cidrs(6))


@given(strategies.networks())
def test_networks(network: Network) -> None:
    assert decode_network(encode_network(network)) == network


@given(strategies.hosts())
def test_hosts(host: Host) -> None:
    assert decode_host(encode_host(host)) == host


@given(st.text(st.characters(codec="utf-8"), max_size=40), strategies.underlay_ips())
def test_claims(instance: str, underlay_ip: Any) -> None:  # noqa: ANN401
    claim = Claim(instance=instance, underlay_ip=underlay_ip)
    assert decode_claim(encode_claim(claim)) == claim


@given(strategies.endpoints())
def test_endpoints(endpoint: Endpoint) -> None:
    assert decode_endpoint(encode_endpoint(endpoint)) == endpoint


@given(subnets, strategies.hosts())
def test_reservations(subnet: IpNetwork, host: Host) -> None:
    reservation = Reservation(network=NetworkName("prod"), subnet=subnet, host=host.id)
    raw, key = encode_reservation(reservation), subnet_to_key(subnet)
    assert "/" not in key
    assert decode_reservation(NetworkName("prod"), key, raw) == reservation


@pytest.mark.parametrize(
    ("holder", "raw"),
    [
        (AddressHolder(HostId("h1"), "0123456789ab"),
         b'{"v":1,"host":"h1","endpoint":"0123456789ab"}'),
        (AddressHolder(HostId("h1")), b'{"v":1,"host":"h1"}'),
        (AddressHolder(HostId(""), held_by=bytes.fromhex("0a0b0c0d0e0f")),
         b'{"v":1,"host":"","held_by":"0a:0b:0c:0d:0e:0f"}'),
    ],
)  # fmt: skip
def test_address_holders(holder: AddressHolder, raw: bytes) -> None:
    assert encode_address_holder(holder) == raw
    assert decode_address_holder(raw) == holder


@pytest.mark.parametrize(
    "raw",
    [
        b'{"v":1,"host":""}',
        b'{"v":1,"host":"h1","held_by":"0a:0b:0c:0d:0e:0f"}',
        b'{"v":1,"host":"","endpoint":"0123456789ab","held_by":"0a:0b:0c:0d:0e:0f"}',
        b'{"v":1,"host":"h1","endpoint":"../../x"}',
        b'{"v":1,"host":"","held_by":"0a:0b:0c:0d:0e:0f\n"}',
        b'{"v":2,"host":"h1"}',
    ],
)
def test_hostile_address_holders(raw: bytes) -> None:
    with pytest.raises(BadValueError):
        decode_address_holder(raw)


@pytest.mark.parametrize(
    "key", ["", "10.0.0.01", "FD00::1", "fd00:0::1", "fe80::1%eth0", "a", "10/8"]
)
def test_keys_that_are_no_address(key: str) -> None:
    with pytest.raises(BadValueError):
        address_from_key(key)
    assert str(address_from_key("fd00::1")) == "fd00::1"


@pytest.mark.parametrize("decode", DECODERS)
@given(raw=st.binary(max_size=200))
def test_random_bytes(decode: Callable[[bytes], object], raw: bytes) -> None:
    with pytest.raises(BadValueError):
        decode(raw)


SAMPLES: list[dict[str, Any]] = [
    json.loads(raw)
    for raw in (
        encode_network(make_network(subnets=("10.42.0.0/16", "fd00:42::/48"))),
        b'{"v":1,"id":"h1","underlay_ip":"10.9.0.1","datapath":"kernel"}',
        b'{"v":1,"instance":"i","underlay_ip":"10.9.0.1"}',
        encode_endpoint(make_endpoint()),
        b'{"v":1,"host":"h1"}',
        b'{"v":1,"host":"h1","endpoint":"0123456789ab"}',
    )
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["", "0", "10.0.0.0/8", "::", "fe80::1%eth0", "h1\n", "x" * 64, "HUGE"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)  # fmt: skip


@pytest.mark.parametrize("index", range(len(DECODERS)))
@given(data=st.data())
def test_values_with_a_field_of_anything(index: int, data: st.DataObject) -> None:
    sample = SAMPLES[index]
    field = data.draw(st.sampled_from([*sample, "unknown"]))
    document = json.dumps(sample | {field: data.draw(values)})
    # A number too long for Python to make a text of.
    raw = document.replace('"HUGE"', "1" + "0" * 5000).encode("utf-8", "surrogatepass")
    try:
        found = DECODERS[index](raw)
    except BadValueError as error:
        str(error)
    else:
        repr(found)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"v":1}' + b" " * MAX_VALUE_BYTES,
        b'{"v":2,"host":"h1"}',
        b'{"v":1,"host":"h1\\n"}',
        b'{"v":1,"host":"../../etc"}',
        b'{"v":1,"host":"\xff"}',
        b'{"v":1,"host":""}',
    ],
)
def test_hostile_reservations(raw: bytes) -> None:
    with pytest.raises(BadValueError):
        decode_reservation(NetworkName("prod"), "10.42.3.0-24", raw)


@pytest.mark.parametrize(
    "key",
    ["", "10.42.3.0", "10.42.3.1-24", "10.42.3.0-255.255.255.0", "10.42.3.0-024", "-", "a-b",
     "FD00::-64", "fd00:0::-64", "10.42.3.0-24-1", "10.42.3.0/24"],
)  # fmt: skip
def test_keys_that_are_no_subnet(key: str) -> None:
    with pytest.raises(BadValueError):
        subnet_from_key(key)


def test_fields_of_a_newer_version_are_ignored() -> None:
    raw = encode_network(make_network())
    assert decode_network(raw[:-1] + b',"colour":"green"}') == make_network()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "name"),
        ({"vni": 0}, "VNI"),
        ({"vni": 1 << 24}, "VNI"),
        ({"port": 65536}, "port"),
        ({"mtu_bytes": 575}, "MTU"),
        ({"subnets": ()}, "subnets"),
        ({"subnets": ("10.0.0.0/16", "10.1.0.0/16")}, "subnets"),
        ({"subnets": ("fd00::/48", "10.1.0.0/16")}, "subnets"),
        ({"subnets": ("224.0.0.0/8",)}, "routed"),
        ({"subnets": ("127.0.0.0/8",)}, "routed"),
        ({"subnets": ("169.254.0.0/16",)}, "routed"),
        ({"subnets": ("fe80::/32",)}, "routed"),
        ({"subnets": ("0.0.0.0/0",)}, "routed"),
        ({"subnets": ("fd00::/48",), "mtu_bytes": 1279}, "MTU"),
        ({"host_prefix": 31}, "/31"),
        ({"host_prefix": 15}, "/15"),
        ({"subnets": ("fd00::/16",), "host_prefix6": 64}, "2\\^32"),
        ({"subnets": ("10.77.0.0/31",)}, "10.77.0.0/31 has no room"),
    ],
)
def test_networks_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    if "subnets" in changes:
        changes = changes | {"subnets": tuple(ip_network(s) for s in changes["subnets"])}
    network = replace(make_network(), **changes)
    with pytest.raises(UsageError, match=message):
        check_network(network)
    with pytest.raises(BadValueError):
        decode_network(encode_network(network))


@pytest.mark.parametrize(
    "address", ["", "0.0.0.0", "::", "127.0.0.1", "::1", "224.0.0.1", "ff02::1", "fe80::1%eth0"]
)
def test_addresses_no_host_has_on_the_underlay(address: str) -> None:
    raw = json.dumps({"v": 1, "id": "h1", "underlay_ip": address}).encode()
    with pytest.raises(BadValueError):
        decode_host(raw)


def test_an_endpoint_has_at_most_one_gateway_for_each_address() -> None:
    for broken in (
        replace(make_endpoint(), gateways=make_endpoint().gateways * 2),
        replace(make_endpoint(), addresses=(), gateways=()),
    ):
        with pytest.raises(BadValueError):
            decode_endpoint(encode_endpoint(broken))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"mode": Mode.UDP}, "mode udp"), ({"port": 24097}, "24097")],
)
def test_fallbacks_that_cannot_be_had(settings: dict[str, Any], message: str) -> None:
    network = make_network(fallback=True, **settings)
    with pytest.raises(UsageError, match=message):
        check_network(network)
    with pytest.raises(BadValueError, match=message):
        decode_network(encode_network(network))
