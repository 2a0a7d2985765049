"""Addresses of a network's CIDRs that something else has: whoever it is keeps them."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from meshnet.backends import NexthopIds, Occupant
from meshnet.backends.occupied import (
    Underlays,
    check_free,
    is_within,
    refusal,
    reserved_apart,
    spans_of,
)
from meshnet.errors import PoolExhaustedError
from meshnet.ipam import choose_subnet
from meshnet.model import Host, HostId, MeshSnapshot, NetworkName
from meshnet.modes import Mode
from meshnet.plan import LocalView, MeshPlan, plan_hosts, plan_mesh
from meshnet.state import Nexthop, Route
from tests.values import (
    IPV4,
    ME,
    make_network,
    make_snapshot,
    make_underlay,
    plan_for,
)

NETWORK, PROD = make_network(), NetworkName("prod")
OWN = [ip_network("10.42.0.0/24")]


def occupant(prefix: str, *, vital: bool = False, aggregate: bool = False) -> Occupant:
    return Occupant(ip_network(prefix), "the subnet of link docker0", "docker0", vital, aggregate)


@pytest.mark.parametrize("prefix", ["10.42.7.0/24", "10.42.9.9/32", IPV4, "10.0.0.0/8"])
def test_what_overlaps_a_cidr_is_no_place_for_a_network(prefix: str) -> None:
    problem = check_free(NETWORK, [occupant("172.17.0.0/16"), occupant(prefix)])
    assert problem is not None
    assert prefix.removesuffix("/32") in problem
    assert "docker0: choose another --subnet" in problem


def test_a_gateway_may_lead_to_more_than_is_there() -> None:
    assert check_free(NETWORK, [occupant("10.0.0.0/8", aggregate=True)]) is None
    assert check_free(NETWORK, [occupant("10.42.0.0/16", aggregate=True)]) is not None
    assert check_free(NETWORK, [occupant("fd00::/8")]) is None


def test_the_physical_network_has_everything_in_it() -> None:
    lan = make_network(mode=Mode.MACVLAN, parent="eth0")
    everything = [occupant(IPV4, vital=True)]
    assert check_free(lan, everything) is None
    assert refusal(lan, [], everything) is None
    assert spans_of([lan]) == frozenset()


@pytest.mark.parametrize(
    ("found", "refused"),
    [
        (occupant("10.42.7.0/24"), False),
        (occupant("10.42.7.0/24", vital=True), True),
        (occupant("10.42.0.128/25"), True),  # of this host's own subnet
        (occupant("10.42.0.0/23"), True),
        (occupant(IPV4), True),
        (occupant("10.0.0.0/8", vital=True), False),  # the network's routes are more specific
        (occupant("172.17.0.0/16", vital=True), False),
    ],
)
def test_a_host_refuses_a_network_that_it_cannot_have(found: Occupant, refused: bool) -> None:
    problem = refusal(NETWORK, OWN, [found])
    assert (problem is not None) == refused
    plan = plan_for(make_snapshot([NETWORK], 2), replace(make_underlay(peers=1), occupied=(found,)))
    outcome = plan.networks[PROD]
    assert (outcome.refused, outcome.plan is None) == (refused, refused)
    assert outcome.errors == ((problem,) if problem is not None else ())
    assert bool(plan.state.links) != refused


def test_subnets_are_reserved_apart_from_the_hosts_links() -> None:
    apart = reserved_apart(NETWORK, [occupant("10.42.0.64/26"), occupant("10.0.0.0/8")])
    assert apart == (ip_network("10.42.0.64/26"),)
    assert choose_subnet(NETWORK, 4, (), apart=apart) == ip_network("10.42.1.0/24")
    for place in range(256):
        chosen = choose_subnet(NETWORK, 4, (), apart=apart, random_below=lambda _: place)  # noqa: B023
        assert chosen == ip_network(f"10.42.{place or 1}.0/24") or place == 0
        assert chosen != ip_network("10.42.0.0/24")
    small = make_network(subnets=("10.9.0.0/28",), host_prefix=29)
    with pytest.raises(PoolExhaustedError, match=r"or overlap 10\.9\.0\.8/29 of this host"):
        choose_subnet(small, 4, {ip_network("10.9.0.0/29")}, apart=[ip_network("10.9.0.8/29")])


def with_stranger(address: str, mode: Mode = Mode.VXLAN) -> MeshSnapshot:
    """Three hosts; the last one's underlay address is in the network."""
    snapshot = make_snapshot([make_network(mode=mode)], 3)
    stranger = Host(id=HostId("h3"), underlay_ip=ip_address(address))
    return replace(snapshot, hosts={**snapshot.hosts, stranger.id: stranger})


def routes_of(plan: MeshPlan) -> dict[str, Route]:
    return {
        str(ip_network((key.prefix, key.prefix_length))): route
        for key, route in plan.state.routes.items()
    }


def test_no_route_covers_a_members_underlay_address() -> None:
    """It joined, or moved there, when the network was there: the others go on without it."""
    plan = plan_for(with_stranger("10.42.9.9"), make_underlay(peers=2))
    assert routes_of(plan).keys() == {"10.42.1.0/24", "10.42.2.0/24"}  # and no ``unreachable``
    outcome = plan.networks[PROD]
    assert not outcome.refused
    assert len(outcome.errors) == 1
    assert "10.42.9.9, the underlay address of host h3: give that host" in outcome.errors[0]
    plan = plan_for(with_stranger("10.42.1.9"), make_underlay(peers=2))
    assert routes_of(plan).keys() == {"10.42.2.0/24"}
    assert "host h2 is not reached from here" in plan.networks[PROD].peer_errors[HostId("h2")]


def test_a_userspace_vtep_without_a_route_for_the_whole_cidr() -> None:
    plan = plan_for(with_stranger("10.42.9.9", Mode.UDP), make_underlay(peers=2))
    routes = routes_of(plan)
    assert routes.keys() == {"10.42.1.0/24", "10.42.2.0/24"}
    assert all(route.via == Nexthop("mnu4097", b"") for route in routes.values())


def test_hosts_that_change_are_planned_with_what_is_kept_off() -> None:
    snapshot = make_snapshot([NETWORK], 3)
    underlay = replace(make_underlay(peers=2), occupied=(occupant("10.42.1.0/24"),))
    local = LocalView(host=ME, subnets={PROD: snapshot.subnets_of(ME, PROD)})
    ids = NexthopIds()
    whole = plan_mesh(snapshot, local, underlay, ids)
    part = plan_hosts(snapshot, local, underlay, ids, whole.networks, [HostId("h2"), HostId("h3")])
    assert part.errors[PROD].keys() == whole.networks[PROD].peer_errors.keys() == {"h2"}
    assert part.state.routes.items() <= whole.state.routes.items()
    assert part.peers == {PROD: 1}


def test_etcd_is_never_in_a_network() -> None:
    snapshot = make_snapshot([NETWORK, make_network("other", ("10.43.0.0/16",), 4098)], 2)
    local = LocalView(
        host=ME,
        subnets={name: snapshot.subnets_of(ME, name) for name in snapshot.networks},
        store_addresses=frozenset({ip_address("10.42.200.1")}),
    )
    plan = plan_mesh(snapshot, local, make_underlay(peers=1), NexthopIds())
    assert plan.networks[PROD].refused
    assert "contains 10.42.200.1, an address of etcd" in plan.networks[PROD].errors[0]
    assert plan.networks[NetworkName("other")].plan is not None


def test_underlay_addresses_are_found_by_order() -> None:
    hosts = [
        Host(id=HostId(address), underlay_ip=ip_address(address))
        for address in ("10.41.255.255", "10.42.0.0", "10.42.255.255", "10.43.0.0", "fd00:42::1")
    ]
    dual = make_network(subnets=(IPV4, "fd00:42::/48"))
    inside = {str(o.prefix.network_address) for o in Underlays(hosts).inside(dual)}
    assert inside == {"10.42.0.0", "10.42.255.255", "fd00:42::1"}
    assert inside == {h.id for h in hosts if is_within(h.underlay_ip, spans_of([dual]))}
