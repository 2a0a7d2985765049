"""MTU arithmetic and computed MACs."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.errors import UsageError
from meshnet.wire.mac import (
    endpoint_mac,
    gateway_mac,
    is_endpoint_mac,
    link_local_of,
    vtep_mac,
)
from meshnet.wire.mtu import (
    MINIMUM_MTU_BYTES,
    encapsulation_bytes,
    gso_max_bytes,
    overlay_mtu_bytes,
)
from meshnet.wire.segment import MAX_SEGMENTS, MAX_SEND_BYTES
from meshnet.wire.vxlan import ENCAPSULATION_BYTES
from tests.unit import strategies

if TYPE_CHECKING:
    from meshnet.model import IpNetwork, Network


@pytest.mark.parametrize(
    ("underlay", "version", "overlay"),
    [(1500, 4, 1450), (1500, 6, 1430), (9000, 4, 8950), (9000, 6, 8930)],
)
def test_the_usual_mtus(underlay: int, version: int, overlay: int) -> None:
    for inner in (4, 6):
        assert overlay_mtu_bytes(underlay, version, inner) == overlay


@given(st.integers(1280, 9000), st.sampled_from([40, 52, 60, 72]), st.sampled_from([257, 321]))
def test_a_limited_super_packet_is_one_send(mtu: int, headers: int, reserved: int) -> None:
    segments = (gso_max_bytes(mtu) - reserved) // (mtu - headers)
    assert 0 < segments * (mtu + ENCAPSULATION_BYTES) <= MAX_SEND_BYTES
    assert segments <= MAX_SEGMENTS


@given(
    underlay=st.integers(0, 70_000), version=st.sampled_from([4, 6]), inner=st.sampled_from([4, 6])
)
def test_an_overlay_packet_fits_the_underlay(underlay: int, version: int, inner: int) -> None:
    try:
        mtu = overlay_mtu_bytes(underlay, version, inner)
    except UsageError:
        assert underlay < MINIMUM_MTU_BYTES[inner] + encapsulation_bytes(version)
    else:
        assert mtu >= MINIMUM_MTU_BYTES[inner]
        assert mtu + encapsulation_bytes(version) == underlay


@given(strategies.networks(), st.data())
def test_vtep_macs_differ_within_a_network(network: Network, data: st.DataObject) -> None:
    for cidr in network.subnets:
        prefix = network.host_prefix_of(cidr.version)
        step = 1 << (cidr.max_prefixlen - prefix)
        numbers = st.integers(0, (1 << (prefix - cidr.prefixlen)) - 1)
        chosen = data.draw(st.sets(numbers, max_size=20))
        subnets: list[IpNetwork] = [
            type(cidr)((int(cidr.network_address) + n * step, prefix)) for n in chosen
        ]
        macs = {vtep_mac(s) for s in subnets} | {gateway_mac(s) for s in subnets}
        assert len(macs) == 2 * len(subnets)
        assert {mac[0] & 3 for mac in macs} <= {2}  # locally administered, unicast


def test_macs() -> None:
    assert vtep_mac(ip_network("10.42.3.0/24")).hex(":") == "02:6d:0a:2a:03:00"
    assert gateway_mac(ip_network("10.42.3.0/24")).hex(":") == "02:67:0a:2a:03:00"
    assert vtep_mac(ip_network("fd00:42:0:3::/64")).hex(":") == "02:6d:00:00:00:03"
    assert vtep_mac(ip_network("fd00:0:12:345::/64")).hex(":") == "02:6d:00:12:03:45"
    assert endpoint_mac(ip_address("10.42.3.2")).hex(":") == "02:65:0a:2a:03:02"
    six = {endpoint_mac(ip_address(f"fd00:{i:x}::{j:x}:0:2")) for i in range(99) for j in range(99)}
    assert len(six) == 99 * 99  # although all end alike
    assert all(mac[0] & 3 == 2 and mac[1] == 0x45 and is_endpoint_mac(mac) for mac in six)
    assert is_endpoint_mac(endpoint_mac(ip_address("10.42.3.2")))
    assert not is_endpoint_mac(vtep_mac(ip_network("10.42.3.0/24")))


def test_the_link_local_address_of_a_mac() -> None:
    packed = link_local_of(bytes.fromhex("026d0a2a0300"))
    assert ip_address(packed) == ip_address("fe80::6d:aff:fe2a:300")
