"""Tests of the plan: from what the mesh agreed on to what one host's kernel should hold."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest
from hypothesis import given

from meshnet.backends import HostLink, NexthopIds, UnderlayPath
from meshnet.backends.conflicts import find_conflict
from meshnet.backends.table import BACKENDS
from meshnet.firewall import Firewall
from meshnet.firewall.elements import endpoint_elements
from meshnet.model import Datapath, HostId, NetworkName, Reservations, Vni
from meshnet.modes import Mode
from meshnet.plan import LocalView, plan_mesh, plan_takeovers, probed_peers
from meshnet.state import (
    NEXTHOP_ID_FIRST,
    AddressKey,
    KernelState,
    LinkKind,
    Nexthop,
    Route,
    RouteKey,
    Vxlan,
)
from meshnet.wire.mtu import gso_max_bytes
from tests.unit import strategies
from tests.values import (
    IPV4,
    IPV6,
    ME,
    make_endpoint,
    make_network,
    make_snapshot,
    make_underlay,
    plan_for,
    underlay_ip,
)

if TYPE_CHECKING:
    from meshnet.model import IpNetwork, MeshSnapshot
    from meshnet.plan import MeshPlan
    from tests.unit.strategies import Scene

PROD = NetworkName("prod")
DUAL = make_network(subnets=(IPV4, IPV6))


def key(text: str) -> RouteKey:
    network = ip_network(text)
    return RouteKey(network.network_address.packed, network.prefixlen)


def reserve(snapshot: MeshSnapshot, subnet: str, host: str) -> MeshSnapshot:
    owned: dict[IpNetwork, HostId] = {
        **snapshot.reservations[PROD],
        ip_network(subnet): HostId(host),
    }
    return replace(snapshot, reservations={PROD: Reservations(owned)})


def errors_of(plan: MeshPlan) -> str:
    outcome = plan.networks[PROD]
    return "; ".join((*outcome.errors, *outcome.peer_errors.values()))


# --- one host of three ---------------------------------------------------------------------------


def test_links_and_addresses() -> None:
    plan = plan_for(make_snapshot([DUAL], 3), make_underlay(peers=2), endpoints=[make_endpoint()])
    bridge, tunnel, port = (
        plan.state.links[name] for name in ("mnb4097", "mnv4097", "mne0123456789ab")
    )
    assert (bridge.kind, bridge.mtu_bytes, bridge.master) == (LinkKind.BRIDGE, 1450, "")
    assert bridge.mac == bytes.fromhex("02670a2a0000")
    assert (tunnel.kind, tunnel.mtu_bytes) == (LinkKind.VXLAN, 1450)
    assert tunnel.mac == bytes.fromhex("026d0a2a0000")
    assert tunnel.vxlan == Vxlan(4097, 4789, underlay_ip(1).packed)
    assert (port.kind, port.mac, port.master) == (LinkKind.VETH, None, "mnb4097")
    assert len(plan.state.links) == 3
    assert {(a.dev, a.prefix_length) for a in plan.state.addresses} == {
        ("mnb4097", 24),
        ("mnb4097", 64),
    }
    settings = {f"{f}/{k}": v for f, k, v in tunnel.sysctls}
    assert settings["ipv4/forwarding"] == "1"
    assert settings["ipv6/disable_ipv6"] == "0"


def test_one_object_of_each_kind_for_each_remote_host() -> None:
    state = plan_for(make_snapshot([make_network()], 3), make_underlay(peers=2)).state
    assert state.nexthops == {
        NEXTHOP_ID_FIRST: Nexthop("mnv4097", bytes((10, 42, 1, 0))),
        NEXTHOP_ID_FIRST + 1: Nexthop("mnv4097", bytes((10, 42, 2, 0))),
    }
    assert {n.address: mac.hex() for n, mac in state.neighbours.items()} == {
        bytes((10, 42, 1, 0)): "026d0a2a0100",
        bytes((10, 42, 2, 0)): "026d0a2a0200",
    }
    assert {e.mac.hex(): remote for e, remote in state.fdb.items()} == {
        "026d0a2a0100": underlay_ip(2).packed,
        "026d0a2a0200": underlay_ip(3).packed,
    }
    gateway = bytes((10, 42, 0, 1))
    assert state.routes == {
        key("10.42.1.0/24"): Route(NEXTHOP_ID_FIRST, gateway),
        key("10.42.2.0/24"): Route(NEXTHOP_ID_FIRST + 1, gateway),
        key(IPV4): Route(0),
    }


def test_dual_stack_shares_the_fdb_entry() -> None:
    state = plan_for(make_snapshot([DUAL], 3), make_underlay(peers=2)).state
    assert (len(state.nexthops), len(state.neighbours), len(state.fdb)) == (4, 4, 2)
    assert key("fd00:42:0:1::/64") in state.routes
    assert state.routes[key(IPV6)] == Route(0)


def test_a_host_that_has_one_ip_version_so_far() -> None:
    snapshot = make_snapshot([DUAL], 2)
    owned = {s: h for s, h in snapshot.reservations[PROD].items() if s.version == 6 or h != ME}
    snapshot = replace(snapshot, reservations={PROD: Reservations(owned)})
    state = plan_for(snapshot, make_underlay(peers=1)).state
    assert {len(k.prefix) for k in state.routes} == {16}
    # The peer's MAC is still the one that the peer computes, from its IPv4 subnet.
    assert [e.mac.hex() for e in state.fdb] == ["026d0a2a0100"]


def test_an_ipv4_network_switches_ipv6_off_on_its_links() -> None:
    links = plan_for(make_snapshot([make_network()], 1), make_underlay()).state.links
    assert all(("ipv6", "disable_ipv6", "1") in link.sysctls for link in links.values())
    no_ipv6 = replace(make_underlay(), ipv6=False)
    links = plan_for(make_snapshot([make_network()], 1), no_ipv6).state.links
    assert {f for link in links.values() for f, _, _ in link.sysctls} == {"ipv4"}


def test_the_own_subnet_is_the_whole_network() -> None:
    network = make_network(subnets=("10.42.0.0/24",))
    state = plan_for(make_snapshot([network], 1), make_underlay()).state
    assert state.routes == {}  # the connected route is the CIDR's


def test_a_single_host_of_a_network_drops_what_nobody_owns() -> None:
    state = plan_for(make_snapshot([make_network()], 1), make_underlay()).state
    assert state.routes == {key(IPV4): Route(0)}


def test_networks_this_host_has_no_part_in() -> None:
    snapshot = make_snapshot([make_network()], 1)
    plan = plan_for(snapshot, make_underlay(), host=HostId("h2"))
    assert plan.state == KernelState()
    assert "no subnet" in errors_of(plan)


@pytest.mark.parametrize(
    ("subnets", "vni", "message"),
    [(("10.43.0.0/16",), 4097, "VNI 4097"), (("10.42.128.0/17",), 7, "overlaps"),
     (("10.0.0.0/8",), 7, "overlaps"), ((IPV6, ), 7, "overlaps")],
)  # fmt: skip
def test_of_networks_that_contradict_each_other_the_older_one_counts(
    subnets: tuple[str, ...], vni: int, message: str
) -> None:
    alone = plan_for(make_snapshot([DUAL], 3), make_underlay(peers=2))
    younger = make_network("a", subnets, vni)
    both = plan_for(make_snapshot([DUAL, younger], 3), make_underlay(peers=2))
    assert both.state == alone.state
    assert both.networks[PROD] == alone.networks[PROD]
    assert message in both.networks[younger.name].errors[0]


def test_a_fallback_is_beside_the_device_and_only_fallen_peers_are_sent_to_by_it() -> None:
    network = replace(DUAL, fallback=True)
    snapshot = make_snapshot([network], 3)
    state = plan_for(snapshot, make_underlay(peers=2)).state
    plain = plan_for(make_snapshot([DUAL], 3), make_underlay(peers=2)).state
    assert state.links["mnu4097"].vxlan == Vxlan(4097, 24097, underlay_ip(1).packed)
    assert {m.port for m in state.members.values()} == {24097}
    assert len(state.members) == 2
    assert (state.routes, state.fdb) == (plain.routes, plain.fdb)
    assert isinstance(state.firewall, Firewall)
    assert 24097 in state.firewall.networks[0].ports
    after = plan_for(snapshot, make_underlay(peers=2), fallen=[(PROD, HostId("h2"))]).state
    assert (after.neighbours, after.fdb, after.members) == (
        state.neighbours, state.fdb, state.members
    )  # fmt: skip
    for subnet, source in (("10.42.1.0/24", bytes((10, 42, 0, 1))), ("fd00:42:0:1::/64", None)):
        route = after.routes[key(subnet)]
        assert route.via == Nexthop("mnu4097", b"")
        assert source in (None, route.source)
    assert len(after.nexthops) == 2


def test_who_has_no_fallback() -> None:
    network = make_network(fallback=True)
    snapshot = make_snapshot([network], 4)
    hosts = {**snapshot.hosts}
    hosts[HostId("h2")] = replace(hosts[HostId("h2")], datapath=Datapath.USERSPACE)
    hosts[HostId("h4")] = replace(hosts[HostId("h4")], underlay_ip=underlay_ip(3))
    snapshot = replace(snapshot, hosts=hosts)
    fallen = [(PROD, h) for h in hosts]
    plan = plan_for(snapshot, make_underlay(peers=2), fallen=fallen)
    assert [r.via for k, r in plan.state.routes.items() if k == key("10.42.2.0/24")] == [
        Nexthop("mnu4097", b"")
    ]
    assert len([r for r in plan.state.routes.values() if r.via]) == 1
    assert "h4" in errors_of(plan)
    local = LocalView(host=ME, subnets={PROD: snapshot.subnets_of(ME, PROD)})
    underlay, outcome = make_underlay(peers=2), plan.networks[PROD]
    probed = probed_peers(network, snapshot, local, underlay, outcome)
    assert probed.keys() == {"h3", "h4"}
    direct = replace(network, direct_routing=True)
    assert probed_peers(direct, snapshot, local, underlay, outcome) == {}
    assert probed_peers(make_network(), snapshot, local, underlay, outcome) == {}


def test_a_fallback_needs_a_port_of_its_own() -> None:
    first = make_network(fallback=True)
    for other in (
        make_network("b", ("10.43.0.0/16",), 14097, fallback=True),
        make_network("b", ("10.43.0.0/16",), 7, mode=Mode.UDP, port=24097),
        make_network("b", ("10.43.0.0/16",), 7, port=24097),
    ):
        plan = plan_for(make_snapshot([first, other], 2), make_underlay(peers=1))
        assert "24097" in plan.networks[other.name].errors[0]
        assert plan.networks[PROD].errors == ()
    fine = make_network("b", ("10.43.0.0/16",), 4098, fallback=True)
    plan = plan_for(make_snapshot([first, fine], 2), make_underlay(peers=1))
    assert plan.networks[fine.name].errors == ()


def test_every_mode_has_a_backend() -> None:
    assert BACKENDS.keys() == set(Mode)


def test_a_userspace_network_has_a_port_of_its_own() -> None:
    assert BACKENDS[Mode.VXLAN].default_port(Vni(4097)) == 4789
    assert BACKENDS[Mode.UDP].default_port(Vni(4097)) == 24097
    assert BACKENDS[Mode.UDP].default_port(Vni((1 << 24) - 1)) < 30000


# --- macvlan --------------------------------------------------------------------------------------

PHYSICAL = make_network("phys", ("10.9.0.0/16",), 9, mode=Mode.MACVLAN, parent="eth0")


def test_macvlan_needs_nothing_of_the_host() -> None:
    plan = plan_for(make_snapshot([PHYSICAL], 3), make_underlay(peers=2))
    assert plan.state == KernelState()
    planned = plan.networks[PHYSICAL.name].plan
    assert planned is not None
    assert (planned.uplink, planned.endpoint_link) == ("eth0", LinkKind.MACVLAN)
    # Nor does it change anything for an overlay, or for what leaves that for the physical network.
    alone = plan_for(make_snapshot([DUAL], 3), make_underlay(peers=2))
    both = plan_for(make_snapshot([DUAL, PHYSICAL], 3), make_underlay(peers=2))
    assert both.state == alone.state


@pytest.mark.parametrize(
    ("parent_mtu", "wanted", "mtu", "errors"),
    [(1400, None, 1400, 0), (1500, 1300, 1300, 0), (1400, 1500, 1400, 1)],
)
def test_mtu_of_macvlans(parent_mtu: int, wanted: int | None, mtu: int, errors: int) -> None:
    network = replace(PHYSICAL, mtu_bytes=wanted)
    plan = plan_for(make_snapshot([network], 1), make_underlay(mtu_bytes=parent_mtu))
    outcome = plan.networks[network.name]
    assert outcome.plan is not None
    assert (outcome.plan.mtu_bytes, len(outcome.errors)) == (mtu, errors)


def test_a_host_that_is_not_on_the_physical_network() -> None:
    plan = plan_for(make_snapshot([replace(PHYSICAL, parent="eth7")], 1), make_underlay())
    outcome = plan.networks[PHYSICAL.name]
    assert outcome.plan is None
    assert outcome.refused
    assert "eth7" in outcome.errors[0]


def test_a_host_reaches_its_own_endpoints_by_a_macvlan() -> None:
    own = {PHYSICAL.name: (ip_address("10.9.8.1"),)}
    endpoint = replace(make_endpoint(("10.9.8.2/16",)), network=PHYSICAL.name, parent="eth0")
    snapshot = make_snapshot([replace(PHYSICAL, host_access=True)], 1)
    state = plan_for(snapshot, make_underlay(), endpoints=[endpoint], addresses=own).state
    shim = state.links["mns9"]
    assert (shim.kind, shim.parent) == (LinkKind.MACVLAN, "eth0")
    assert {("ipv4", "forwarding", "0"), ("ipv4", "arp_ignore", "1")} <= set(shim.sysctls)
    first, second = (ip_address(a).packed for a in ("10.9.8.1", "10.9.8.2"))
    assert state.addresses == {AddressKey("mns9", first, 32): True}
    assert state.routes == {RouteKey(second, 32): Route(0, first, Nexthop("mns9", b""))}


# --- underlay-bridge ------------------------------------------------------------------------------

BRIDGED = make_network("lan", ("10.9.0.0/16",), 9, mode=Mode.UNDERLAY_BRIDGE, parent="eth0")


def test_a_link_that_is_taken_over_carries_endpoints() -> None:
    underlay = make_underlay()
    underlay = replace(underlay, links={**underlay.links, "mnp9": HostLink(1400)})
    endpoint = replace(make_endpoint(("10.9.8.2/16",)), network=BRIDGED.name, mtu_bytes=1400)
    snapshot = make_snapshot([BRIDGED], 1)
    plan = plan_for(snapshot, underlay, endpoints=[endpoint], takeovers={BRIDGED.name: ""})
    (link,) = plan.state.links.values()
    assert (link.kind, link.master, link.mtu_bytes) == (LinkKind.VETH, "mnp9", 1400)
    # What is on the bridge is the host's own; what the endpoint sends is looked at.
    assert plan.state.elements == endpoint_elements(endpoint)
    assert plan.state.firewall is not None
    rest = replace(plan.state, links={}, elements={}, firewall=None)
    assert rest == KernelState()
    planned = plan.networks[BRIDGED.name].plan
    assert planned is not None
    assert (planned.uplink, planned.mtu_bytes) == ("mnp9", 1400)


def test_until_its_link_is_taken_over_a_network_is_not_up() -> None:
    underlay = make_underlay()
    snapshot = make_snapshot([BRIDGED], 1)
    for takeovers, error, refused in (
        ({}, "being taken over", False),
        ({BRIDGED.name: ""}, "being taken over", False),  # by the next pass it is
        ({BRIDGED.name: "gateway silent"}, "gateway silent", True),
    ):
        outcome = plan_for(snapshot, underlay, takeovers=takeovers).networks[BRIDGED.name]
        assert outcome.plan is None
        assert error in outcome.errors[0]
        assert outcome.refused is refused


@pytest.mark.parametrize("older", [Mode.MACVLAN, Mode.UNDERLAY_BRIDGE])
def test_a_link_that_another_network_has_is_not_taken(older: Mode) -> None:
    other = make_network("other", ("10.8.0.0/16",), 8, mode=older, parent="eth0")
    snapshot = make_snapshot([other, BRIDGED], 1)
    outcome = plan_for(snapshot, make_underlay()).networks[BRIDGED.name]
    assert outcome.refused
    assert "network other's" in outcome.errors[0]
    bridged = {"mnp8": other} if older is Mode.UNDERLAY_BRIDGE else {}
    assert plan_takeovers(snapshot, make_underlay()) == bridged
    apart = replace(other, parent="eth1", subnets=(ip_network("10.7.0.0/16"),))
    assert find_conflict(apart, BRIDGED, kernel_vxlan=True) is None
    missing = make_snapshot([replace(BRIDGED, parent="eth7")], 1)
    assert plan_takeovers(missing, make_underlay()) == {}


# --- hosts that are gone, and reservations that are wrong -----------------------------------------


def test_a_dead_host_keeps_its_route_until_it_is_expired() -> None:
    snapshot = make_snapshot([make_network()], 3, dead=["h2"])
    route = key("10.42.1.0/24")
    assert route in plan_for(snapshot, make_underlay(peers=2)).state.routes
    plan = plan_for(snapshot, make_underlay(peers=2), expired=[HostId("h2")])
    assert route not in plan.state.routes
    assert len(plan.state.nexthops) == len(plan.state.fdb) == len(plan.state.neighbours) == 1
    assert plan.networks[PROD].peers == 1


def test_this_host_stays_even_if_others_count_it_as_expired() -> None:
    snapshot = make_snapshot([make_network()], 2, dead=["h1"])
    assert plan_for(snapshot, make_underlay(peers=1), expired=[ME]).state.links


def test_a_reservation_of_a_host_without_an_entry() -> None:
    snapshot = make_snapshot([make_network()], 2)
    hosts = {ME: snapshot.hosts[ME]}
    plan = plan_for(replace(snapshot, hosts=hosts), make_underlay(peers=1))
    assert "h2" in errors_of(plan)
    assert plan.networks[PROD].peers == 0
    assert key("10.42.1.0/24") not in plan.state.routes


@pytest.mark.parametrize(
    "subnet",
    ["10.43.0.0/24", "10.42.0.2/32", "10.42.0.0/16", "10.42.1.0/25", "0.0.0.0/0", "::/0",
     "fd00:43::/64", "255.255.255.255/32"],
)  # fmt: skip
def test_reservations_that_are_no_host_subnet(subnet: str) -> None:
    good = plan_for(make_snapshot([make_network()], 2), make_underlay(peers=1))
    snapshot = reserve(make_snapshot([make_network()], 2), subnet, "h2")
    plan = plan_for(snapshot, make_underlay(peers=1))
    assert plan.state == good.state
    assert subnet in errors_of(plan)
    # Nor does this host take one, be it its own.
    snapshot = reserve(make_snapshot([make_network()], 2), subnet, ME)
    assert plan_for(snapshot, make_underlay(peers=1)).state == good.state


def test_a_host_with_two_subnets_has_one_mac() -> None:
    snapshot = reserve(make_snapshot([make_network()], 3), "10.42.9.0/24", "h2")
    state = plan_for(snapshot, make_underlay(peers=2)).state
    assert len(state.fdb) == 2
    macs = {n.address: mac for n, mac in state.neighbours.items()}
    assert macs[bytes((10, 42, 9, 0))] == macs[bytes((10, 42, 1, 0))]
    its_own = plan_for(snapshot, make_underlay(peers=2), host=HostId("h2")).state
    assert its_own.links["mnv4097"].mac == macs[bytes((10, 42, 9, 0))]


def test_underlays_of_two_ip_versions() -> None:
    snapshot = make_snapshot([make_network()], 3)
    hosts = {**snapshot.hosts}
    hosts[HostId("h2")] = replace(hosts[HostId("h2")], underlay_ip=underlay_ip(2, 6))
    plan = plan_for(replace(snapshot, hosts=hosts), make_underlay(peers=2))
    assert "h2" in errors_of(plan)
    assert plan.state.routes.keys() == {key("10.42.2.0/24"), key(IPV4)}


@given(strategies.scenes())
def test_any_mesh_can_be_planned(scene: Scene) -> None:
    plan = plan_mesh(scene.snapshot, scene.local, scene.underlay, NexthopIds())
    assert plan.networks.keys() == scene.snapshot.networks.keys()
    state = plan.state
    assert {r.nexthop_id for r in state.routes.values()} - {0} == state.nexthops.keys()
    assert {n.dev for n in state.nexthops.values()} <= {*state.links, scene.underlay.dev}
    for table in (state.neighbours, state.fdb, state.addresses):
        assert {key[0] for key in table} <= state.links.keys()
    own = [s for subnets in scene.local.subnets.values() for s in subnets]
    assert not {key(str(s)) for s in own} & state.routes.keys()


# --- the underlay --------------------------------------------------------------------------------


def test_the_mtu_is_what_the_narrowest_path_leaves() -> None:
    underlay = make_underlay(peers=3, mtu_bytes=9000)
    paths = {**underlay.paths, underlay_ip(3): UnderlayPath("eth0", False, 1500)}
    plan = plan_for(make_snapshot([DUAL], 4), replace(underlay, paths=paths))
    outcome = plan.networks[PROD].plan
    assert outcome is not None
    assert outcome.mtu_bytes == 1450
    assert {link.mtu_bytes for link in plan.state.links.values()} == {1450}


def test_the_networks_own_mtu_wins() -> None:
    plan = plan_for(make_snapshot([make_network(mtu_bytes=1300)], 2), make_underlay(peers=1))
    assert {link.mtu_bytes for link in plan.state.links.values()} == {1300}


@pytest.mark.parametrize("mode", [Mode.VXLAN, Mode.UDP])
def test_how_large_a_super_packet_endpoints_send(mode: Mode) -> None:
    """Only those that a userspace VTEP carries have a limit."""
    expected = {True: None, False: gso_max_bytes(1450)}
    for kernel_vxlan in (True, False):
        underlay = replace(make_underlay(peers=1), kernel_vxlan=kernel_vxlan)
        plan = plan_for(make_snapshot([make_network(mode=mode)], 2), underlay).networks[PROD].plan
        assert plan is not None
        assert plan.gso_max_bytes == expected[kernel_vxlan and mode is Mode.VXLAN]


def test_an_underlay_that_is_too_narrow_is_an_error_and_no_reason_to_stop() -> None:
    plan = plan_for(make_snapshot([DUAL], 2), make_underlay(peers=1, mtu_bytes=1300))
    assert "1300" in errors_of(plan)
    assert {link.mtu_bytes for link in plan.state.links.values()} == {1280}


def test_direct_routes_to_peers_that_are_on_link() -> None:
    underlay = make_underlay(peers=2)
    paths = {**underlay.paths, underlay_ip(3): UnderlayPath("eth0", False, 1500)}
    network = make_network(direct_routing=True)
    state = plan_for(make_snapshot([network], 3), replace(underlay, paths=paths)).state
    assert set(state.nexthops.values()) == {
        Nexthop("eth0", underlay_ip(2).packed),
        Nexthop("mnv4097", bytes((10, 42, 2, 0))),
    }
    assert len(state.neighbours) == len(state.fdb) == 1


def test_a_peer_without_a_path_goes_by_the_tunnel() -> None:
    network = make_network(direct_routing=True)
    state = plan_for(make_snapshot([network], 2), make_underlay(peers=0)).state
    assert [n.dev for n in state.nexthops.values()] == ["mnv4097"]


def test_ipv6_goes_by_the_tunnel_where_the_underlay_is_ipv4() -> None:
    network = replace(DUAL, direct_routing=True)
    state = plan_for(make_snapshot([network], 2), make_underlay(peers=1)).state
    assert sorted(n.dev for n in state.nexthops.values()) == ["eth0", "mnv4097"]


def test_two_networks_share_a_direct_nexthop() -> None:
    networks = [
        make_network(direct_routing=True),
        make_network("test", ("10.43.0.0/16",), 7, direct_routing=True),
    ]
    state = plan_for(make_snapshot(networks, 2), make_underlay(peers=1)).state
    assert len(state.nexthops) == 1
    assert len(state.routes) == 4


def test_sysctls() -> None:
    underlay = replace(make_underlay(), forwarding_links=("eth0", "eth1"), ra_links=("eth1",))
    forwarding = {f"net/ipv4/conf/{dev}/forwarding": "1" for dev in ("eth0", "eth1")}
    only4 = plan_for(make_snapshot([make_network()], 1), underlay).state
    assert only4.sysctls == forwarding
    dual = plan_for(make_snapshot([DUAL], 1), underlay).state
    assert dual.sysctls == forwarding | {
        "net/ipv6/conf/eth1/accept_ra": "2",
        "net/ipv6/conf/all/forwarding": "1",
    }
    # What must come first: a router that does not accept RAs forgets its default route.
    assert list(dual.sysctls)[-1] == "net/ipv6/conf/all/forwarding"


# --- nexthop ids ---------------------------------------------------------------------------------


def test_nexthop_ids_stay_and_keep_off_others() -> None:
    a, b, c = (Nexthop("mnv1", bytes((10, 0, i, 0))) for i in range(3))
    ids = NexthopIds()
    ids.adopt({NEXTHOP_ID_FIRST + 1: b}, {NEXTHOP_ID_FIRST})
    assert ids.id_of(b) == NEXTHOP_ID_FIRST + 1
    assert ids.id_of(a) == NEXTHOP_ID_FIRST + 2
    assert ids.id_of(c) == NEXTHOP_ID_FIRST + 3
    assert ids.id_of(a) == NEXTHOP_ID_FIRST + 2
    ids.adopt({}, ())
    assert ids.id_of(c) == NEXTHOP_ID_FIRST


def test_no_nexthop_id_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshnet.backends.NEXTHOP_ID_LAST", NEXTHOP_ID_FIRST + 9)
    ids = NexthopIds()
    ids.adopt({}, range(NEXTHOP_ID_FIRST, NEXTHOP_ID_FIRST + 9))
    last = Nexthop("mnv1", bytes(4))
    assert ids.id_of(last) == NEXTHOP_ID_FIRST + 9
    with pytest.raises(OverflowError):
        ids.id_of(Nexthop("mnv2", bytes(4)))
    assert ids.id_of(last) == NEXTHOP_ID_FIRST + 9
