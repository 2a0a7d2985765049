"""Host subnets and endpoint addresses: none is given twice, and none that is not for use."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.errors import ConflictError, PoolExhaustedError, UsageError
from meshnet.ipam import (
    COOLDOWN,
    AddressPool,
    check_host_prefix,
    check_pool_address,
    choose_address,
    choose_subnet,
    gateway_of,
    pool_range,
)
from meshnet.model import AddressRange
from meshnet.modes import Mode
from tests.unit import strategies
from tests.values import IPV4, IPV6, make_network

if TYPE_CHECKING:
    from meshnet.model import IpAddress, IpNetwork, Network

SMALL = ip_network("10.42.3.0/28")  # 13 addresses: .2 to .14


def pool(subnet: str = "10.42.3.0/24", *in_use: str) -> AddressPool:
    return AddressPool("prod", ip_network(subnet), [ip_address(a) for a in in_use])


# --- host subnets -------------------------------------------------------------------------------


@given(strategies.networks(), st.data())
def test_chosen_subnets_fit_and_never_overlap(network: Network, data: st.DataObject) -> None:
    for cidr in network.subnets:
        taken: set[IpNetwork] = set()
        count = 1 << (network.host_prefix_of(cidr.version) - cidr.prefixlen)
        for _ in range(min(count, 6)):
            skip = data.draw(st.integers(0, 1 << 40))
            subnet = choose_subnet(
                network,
                cidr.version,
                taken,
                random_below=lambda n, s=skip: s % n,  # type: ignore[misc]
            )
            assert network.is_host_subnet(subnet)
            assert not any(subnet.overlaps(other) for other in taken)
            taken.add(subnet)


def test_the_lowest_free_subnet_is_chosen_or_one_from_a_random_place() -> None:
    network = make_network()
    taken: set[IpNetwork] = {ip_network("10.42.0.0/24"), ip_network("10.42.2.0/24")}

    def choose(place: int) -> IpNetwork:
        return choose_subnet(network, 4, taken, random_below=lambda n: place % n)

    assert choose_subnet(network, 4, taken) == ip_network("10.42.1.0/24")
    assert choose(2) == ip_network("10.42.3.0/24")
    assert choose(-1) == ip_network("10.42.255.0/24")
    taken.add(ip_network("10.42.255.0/24"))
    assert choose(-1) == ip_network("10.42.1.0/24")


def test_random_choices_are_spread_over_what_is_free() -> None:
    """Not just over the ends of what is taken: a rack that boots at once would meet there."""
    network = make_network(subnets=("10.0.0.0/8",))
    taken = {ip_network(((10 << 24) + (i << 8), 24)) for i in range(32_768)}
    generator = random.Random(3)
    chosen = {
        choose_subnet(network, 4, taken, random_below=generator.randrange) for _ in range(500)
    }
    assert len(chosen) > 490
    assert not chosen & taken


def test_the_last_of_many_subnets_is_found_quickly() -> None:
    network = make_network(subnets=("10.0.0.0/8",))
    every = [ip_network(((10 << 24) + (i << 8), 24)) for i in range(65_536)]
    taken = {*every, *[ip_network("fd00::/64")]} - {every[777]}
    started = time.process_time()
    for _ in range(5):
        assert (
            choose_subnet(network, 4, taken, random_below=random.Random(5).randrange) == every[777]
        )
    assert time.process_time() - started < 5 * 0.2  # 0.02 s each on an idle machine


def test_no_subnet_is_left() -> None:
    network = make_network(subnets=("10.42.0.0/22", IPV6))
    taken: set[IpNetwork] = set(ip_network("10.42.0.0/22").subnets(new_prefix=24))
    with pytest.raises(PoolExhaustedError, match="all 4 subnets"):
        choose_subnet(network, 4, taken, random_below=lambda n: 3)
    assert choose_subnet(network, 6, taken) == ip_network("fd00:42::/64")


def test_a_network_that_is_one_subnet() -> None:
    network = make_network(subnets=("10.42.0.0/24",))
    assert choose_subnet(network, 4, ()) == ip_network("10.42.0.0/24")


def test_what_counts_as_a_host_subnet() -> None:
    network = make_network(subnets=(IPV4, IPV6))
    for good in ("10.42.255.0/24", "fd00:42:0:ffff::/64"):
        assert network.is_host_subnet(ip_network(good))
    for bad in ("10.43.0.0/24", "10.42.0.0/16", "10.42.0.0/25", "fd00:43::/64", "fd00:42::/48"):
        assert not network.is_host_subnet(ip_network(bad))
    assert not make_network(subnets=(IPV6,)).is_host_subnet(ip_network("10.42.0.0/24"))


@pytest.mark.parametrize(
    ("cidr", "prefix", "fits"),
    [(IPV4, 16, True), (IPV4, 30, True), (IPV4, 31, False), (IPV4, 15, False),
     (IPV6, 64, True), (IPV6, 80, True), (IPV6, 81, False), ("fd00:42::/120", 126, True),
     ("fd00:42::/120", 127, False)],
)  # fmt: skip
def test_host_prefixes(cidr: str, prefix: int, fits: bool) -> None:
    if fits:
        check_host_prefix(ip_network(cidr), prefix)
    else:
        with pytest.raises(UsageError, match=str(prefix)):
            check_host_prefix(ip_network(cidr), prefix)


# --- addresses ----------------------------------------------------------------------------------


@given(
    subnet=st.sampled_from(["10.42.3.0/24", "10.42.3.16/28", "10.42.3.4/30", "fd00::/64"]),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60),
)
def test_no_address_is_given_out_twice(subnet: str, steps: list[tuple[bool, int]]) -> None:
    network = ip_network(subnet)
    addresses = AddressPool("prod", network)
    held: list[IpAddress] = []
    for take, index in steps:
        if take or not held:
            try:
                address = addresses.allocate()
            except PoolExhaustedError:
                assert len(held) == network.num_addresses - 3
                continue
            assert address not in held
            assert address in network
            assert address != network.network_address
            assert address != gateway_of(network)
            assert network.version == 6 or address != network.broadcast_address
            held.append(address)
        else:
            addresses.free(held.pop(index % len(held)))


def test_the_lowest_free_address_comes_first() -> None:
    addresses = pool("10.42.3.0/24", "10.42.3.2", "10.42.3.4")
    assert [str(addresses.allocate()) for _ in range(3)] == ["10.42.3.3", "10.42.3.5", "10.42.3.6"]
    assert str(pool("fd00::/64").allocate()) == "fd00::2"


def test_low_ipv6_subnets_give_ipv6_addresses() -> None:
    # Below 2^32 a number alone would pass for an IPv4 address.
    assert pool("::/96").allocate() == ip_address("::2")


def test_a_freed_address_rests() -> None:
    addresses = pool()
    first = addresses.allocate()
    addresses.free(first)
    assert addresses.allocate() != first
    others = [addresses.allocate() for _ in range(COOLDOWN)]
    for address in others[:-1]:
        addresses.free(address)
    assert addresses.allocate() not in {first, *others[:-1]}
    addresses.free(others[-1])
    assert addresses.allocate() == first


def test_a_resting_address_is_given_out_when_nothing_else_is_left_longest_rested_first() -> None:
    addresses = AddressPool("prod", SMALL)
    held = [addresses.allocate() for _ in range(13)]
    with pytest.raises(PoolExhaustedError, match="all 13 addresses"):
        addresses.allocate()
    for address in (held[7], held[2], held[9]):
        addresses.free(address)
        addresses.free(address)  # twice is once
    assert [addresses.allocate() for _ in range(3)] == [held[7], held[2], held[9]]
    with pytest.raises(PoolExhaustedError):
        addresses.allocate()


def test_a_wanted_address() -> None:
    addresses = pool()
    wanted = ip_address("10.42.3.77")
    assert addresses.allocate(wanted) == wanted
    with pytest.raises(ConflictError, match=r"10\.42\.3\.77"):
        addresses.allocate(wanted)
    addresses.free(wanted)
    assert addresses.allocate(wanted) == wanted  # who asks for it by name gets it at once


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("10.42.3.0", "network, gateway or broadcast"), ("10.42.3.1", "network, gateway or broad"),
     ("10.42.3.255", "network, gateway or broadcast"), ("10.42.4.2", "outside"),
     ("fd00::2", "outside")],
)  # fmt: skip
def test_wanted_addresses_that_cannot_be_had(wanted: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pool().allocate(ip_address(wanted))


def test_the_last_ipv6_address_is_for_use() -> None:
    last = ip_address("fd00::ffff:ffff:ffff:ffff")
    assert pool("fd00::/64").allocate(last) == last


def test_a_pool_of_one() -> None:
    addresses = AddressPool("prod", replace(make_network(), host_prefix=30).subnets[0])
    assert str(addresses.allocate()) == "10.42.0.2"
    assert str(pool("10.42.3.0/30").allocate()) == "10.42.3.2"


# --- pools of underlay networks -----------------------------------------------------------------


def physical(cidr: str, *ends: str) -> Network:
    ranges = (AddressRange(*(ip_address(e) for e in ends)),) if ends else ()
    return make_network(subnets=(cidr,), mode=Mode.MACVLAN, parent="eth0", ranges=ranges)


@pytest.mark.parametrize(
    ("cidr", "ends", "first", "last"),
    [
        ("192.0.2.0/29", (), "192.0.2.1", "192.0.2.6"),
        ("192.0.2.0/24", ("192.0.2.0", "192.0.2.255"), "192.0.2.1", "192.0.2.254"),
        ("192.0.2.0/24", ("192.0.2.9", "192.0.2.9"), "192.0.2.9", "192.0.2.9"),
        ("2001:db8::/64", (), "2001:db8::1", "2001:db8::1:0:0"),
        ("2001:db8::/126", (), "2001:db8::1", "2001:db8::3"),
    ],
)
def test_what_a_pool_is(cidr: str, ends: tuple[str, ...], first: str, last: str) -> None:
    version = ip_network(cidr).version
    assert pool_range(physical(cidr, *ends), version) == (ip_address(first), ip_address(last))


@given(st.sets(st.integers(0, 15)), st.none() | st.integers(0, 2**32))
def test_every_free_address_of_a_pool_is_given_out(held: set[int], seed: int | None) -> None:
    network = physical("192.0.2.0/28")
    taken = {ip_address("192.0.2.0") + n for n in held}
    random_below = random.Random(seed).randrange if seed is not None else None
    free = {ip_address("192.0.2.0") + n for n in range(1, 15)} - taken
    found = []
    for _ in range(len(free)):
        found.append(choose_address(network, 4, taken, random_below=random_below))
        taken.add(found[-1])
    assert sorted(found) == sorted(free)
    assert random_below is not None or found == sorted(free)
    with pytest.raises(PoolExhaustedError, match=r"192\.0\.2\.1-192\.0\.2\.14"):
        choose_address(network, 4, taken, random_below=random_below)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("2001:db8::1", "IPv6"), ("192.0.3.1", "outside"), ("192.0.2.99", "outside"),
     ("192.0.2.101", "gateway or a host of")],
)  # fmt: skip
def test_addresses_that_a_pool_does_not_give(wanted: str, message: str) -> None:
    network = physical("192.0.2.0/24", "192.0.2.100", "192.0.2.200")
    excluded = {ip_address("192.0.2.101")}
    with pytest.raises(UsageError, match=message):
        check_pool_address(network, ip_address(wanted), excluded)
    check_pool_address(network, ip_address("192.0.2.100"), excluded)
