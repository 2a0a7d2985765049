"""What a host makes of the subnets that the store says it has."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest
import trio

from meshnet.model import Claim, Host, HostId, NetworkName, Reservations
from meshnet.store.memory import MemoryStore
from meshnet.store.registry import Registry
from meshnet_agent.membership import Membership
from tests.values import ME, make_network, make_snapshot, underlay_ip

PROD = NetworkName("prod")
SNAPSHOT = make_snapshot([make_network()], 2)
SUBNET = ip_network("10.42.0.0/24")


@pytest.fixture
def changes() -> list[None]:
    return []


@pytest.fixture
def membership(changes: list[None]) -> Membership:
    return Membership(
        Registry(MemoryStore(clock=lambda: 0.0)),
        Host(id=ME, underlay_ip=underlay_ip(1)),
        Claim(instance="h1", underlay_ip=underlay_ip(1)),
        ttl_s=15,
        check_store=trio.lowlevel.checkpoint,
        on_change=lambda: changes.append(None),
    )


def test_a_subnet_is_taken_in_once(membership: Membership, changes: list[None]) -> None:
    for _ in range(2):
        membership.follow(SNAPSHOT)
        assert membership.subnets == {PROD: (SUBNET,)}
    assert len(changes) == 1


def test_a_lost_reservation_keeps_the_subnet_until_another_has_it(
    membership: Membership, changes: list[None]
) -> None:
    membership.follow(SNAPSHOT)
    membership.follow(replace(SNAPSHOT, reservations={}))
    assert membership.subnets == {PROD: (SUBNET,)}
    membership.follow(replace(SNAPSHOT, reservations={PROD: Reservations({SUBNET: HostId("h2")})}))
    assert membership.subnets == {}
    assert len(changes) == 2


def test_a_network_that_is_gone(membership: Membership, changes: list[None]) -> None:
    membership.follow(SNAPSHOT)
    membership.follow(replace(SNAPSHOT, networks={}))
    assert membership.subnets == {}
    assert len(changes) == 2


def test_a_network_that_was_made_anew_with_other_addresses(
    membership: Membership, changes: list[None]
) -> None:
    membership.follow(SNAPSHOT)
    other = make_network(subnets=("10.77.0.0/16",))
    membership.follow(replace(SNAPSHOT, networks={PROD: other}, reservations={}))
    assert membership.subnets == {}
    assert len(changes) == 2
