"""Elements as messages and as text: the same bytes there and back."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.firewall import elements
from meshnet.firewall.elements import SETS, format_element, key_size
from meshnet.kernel.wire import nftnl, rtnl
from meshnet.model import Endpoint, Protocol, PublishedPort
from meshnet.state import ElementKey
from meshnet.tables import Op, Table
from tests.unit import strategies
from tests.values import make_endpoint

BOTH = ("10.42.0.2/24", "fd00:42::2/64")
PORTS = (
    PublishedPort(Protocol.TCP, 8080, 80),
    PublishedPort(Protocol.UDP, 53, 5353, ip_address("192.0.2.1")),
    PublishedPort(Protocol.TCP, 8443, 443, ip_address("2001:db8::1")),
)


@st.composite
def some_elements(draw: st.DrawFn) -> tuple[ElementKey, bytes]:
    name = draw(st.sampled_from(sorted(SETS)))
    sizes = key_size(SETS[name].key), key_size(SETS[name].value)
    key, value = (draw(st.binary(min_size=size, max_size=size)) for size in sizes)
    return ElementKey(name, key), value


def body(request: rtnl.Request) -> rtnl.Body:
    return request.body, 0, len(request.body)


@given(some_elements())
def test_what_is_added_is_what_a_dump_says(element: tuple[ElementKey, bytes]) -> None:
    key, value = element
    (added,) = nftnl.encode_element(Op(Table.ELEMENT, key, value, False))
    assert nftnl.decode_elements(key.set_name, [body(added)]) == {key: value}
    (deleted,) = nftnl.encode_element(Op(Table.ELEMENT, key, None, True))
    assert deleted.kind == added.kind + 2  # NFT_MSG_DELSETELEM
    first, second = nftnl.encode_element(Op(Table.ELEMENT, key, value, True))
    assert (first, second) == (deleted, added)


def test_an_element_for_everything_else_has_no_key() -> None:
    key = ElementKey("members4", b"")
    (added,) = nftnl.encode_element(Op(Table.ELEMENT, key, b"", False))
    assert nftnl.decode_elements("members4", [body(added)]) == {key: b""}
    assert str(Op(Table.ELEMENT, key, None, True)) == "delete element { * } of set members4"


@given(some_elements(), st.integers(4, 200))
def test_a_message_that_is_cut_short_ends(element: tuple[ElementKey, bytes], length: int) -> None:
    key, value = element
    (added,) = nftnl.encode_element(Op(Table.ELEMENT, key, value, False))
    data = added.body[:length]
    found = nftnl.decode_elements(key.set_name, [(data, 0, len(data))])
    assert found.keys() <= {key}


@given(strategies.endpoints())
def test_keys_and_values_have_the_length_of_their_set(endpoint: Endpoint) -> None:
    made = elements.endpoint_elements(endpoint)
    for key, value in made.items():
        named = SETS[key.set_name]
        assert len(key.key) == key_size(named.key)
        assert len(value) == key_size(named.value)


def texts(endpoint_elements: dict[ElementKey, bytes]) -> set[tuple[str, str]]:
    return {(k.set_name, format_element(k, v)) for k, v in endpoint_elements.items()}


def test_an_endpoint_sends_from_what_is_its_own() -> None:
    link = '"mne0123456789ab" . 02:65:0a:2a:00:02'
    assert texts(elements.source_elements(make_endpoint(BOTH))) == {
        ("sources4", f"{link} . 10.42.0.2"),
        ("sources6", f"{link} . fd00:42::2"),
        ("sources6", f"{link} . fe80::65:aff:fe2a:2"),
        ("targets6", f"{link} . 0xfd000042000000000000000000000002"),
        ("targets6", f"{link} . 0xfe8000000000000000650afffe2a0002"),
    }


@pytest.mark.parametrize("default_route", [True, False])
def test_published_ports_lead_to_the_address_of_their_ip_version(default_route: bool) -> None:
    endpoint = replace(make_endpoint(BOTH, default_route=default_route), published=PORTS)
    found = texts(elements.published_elements(endpoint))
    no_way_back = {("no_default4", "10.42.0.2"), ("no_default6", "fd00:42::2")}
    assert found == {
        ("published4", "6 . 8080 : 10.42.0.2 . 80"),
        ("published6", "6 . 8080 : fd00:42::2 . 80"),
        ("published_at4", "192.0.2.1 . 17 . 53 : 10.42.0.2 . 5353"),
        ("published_at6", "2001:db8::1 . 6 . 8443 : fd00:42::2 . 443"),
        *(() if default_route else no_way_back),
    }
    assert elements.published_elements(replace(endpoint, published=())) == {}


def test_counters() -> None:
    counted = rtnl.attr(1, (180).to_bytes(8, "big")) + rtnl.attr(2, (3).to_bytes(8, "big"))
    data = bytes(4) + rtnl.attr(2, b"unpublished\0") + rtnl.attr(4 | rtnl.NLA_F_NESTED, counted)
    others = bytes(4) + rtnl.attr(2, b"somebody's\0") + rtnl.attr(4, counted)
    found = nftnl.decode_counters([(d, 0, len(d)) for d in (data, others)])
    assert {name: tuple(count) for name, count in found.items()} == {"unpublished": (3, 180)}
