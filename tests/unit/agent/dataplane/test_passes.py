"""Passes over some hosts have the same result as a pass over everything."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnet.backends import UnderlayPath
from meshnet.kernel.fakes.kernel import MemoryKernel
from meshnet.model import Host, HostId, MeshSnapshot, NetworkName
from meshnet.modes import Mode
from meshnet.plan import LocalView
from meshnet.state import Nexthop, RouteKey
from meshnet.tables import Table
from meshnet_agent.dataplane.pass_values import HostView, PartInput, PassInput, PassResult
from meshnet_agent.dataplane.passes import Passes
from tests.values import IPV4, IPV6, ME, make_network, make_snapshot, underlay_ip

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from meshnet.model import IpAddress, Network
    from meshnet.state import KernelState
    from meshnet.tables import Op

PROD, BACK = NetworkName("prod"), NetworkName("back")
NETWORKS = {
    "plain": [make_network()],
    "dual-stack": [make_network(subnets=(IPV4, IPV6))],
    "direct": [make_network(direct_routing=True)],
    "udp": [make_network(subnets=(IPV4, IPV6), mode=Mode.UDP)],
    "fallback": [make_network(subnets=(IPV4, IPV6), fallback=True)],
    "fallback direct": [
        make_network(direct_routing=True, fallback=True),
        make_network("back", ("10.43.0.0/16",), 7, fallback=True),
    ],
    "udp direct": [make_network(mode=Mode.UDP, direct_routing=True)],
    "two direct": [
        make_network(direct_routing=True),
        make_network("back", ("10.43.0.0/16",), 7, direct_routing=True),
    ],
    "mixed": [make_network(direct_routing=True), make_network("back", ("10.43.0.0/16",), 7)],
}
CROWD = [HostId(f"h{i}") for i in range(2, 8)]


Fallen = tuple[NetworkName, HostId]


def local_view(
    snapshot: MeshSnapshot, expired: Collection[HostId] = (), fallen: Collection[Fallen] = ()
) -> LocalView:
    return LocalView(
        host=ME,
        subnets={n: snapshot.subnets_of(ME, n) for n in snapshot.networks},
        expired=frozenset(expired),
        fallen=frozenset(fallen),
    )


def full(
    snapshot: MeshSnapshot, expired: Collection[HostId] = (), fallen: Collection[Fallen] = ()
) -> PassInput:
    return PassInput(
        snapshot=snapshot, local=local_view(snapshot, expired, fallen), underlay_ip=underlay_ip(1)
    )


def part(
    snapshot: MeshSnapshot,
    hosts: Collection[HostId],
    expired: Collection[HostId] = (),
    fallen: Collection[Fallen] = (),
) -> PartInput:
    return PartInput(
        hosts={h: HostView(snapshot.hosts.get(h), snapshot.reserved_by(h)) for h in hosts},
        expired=frozenset(expired),
        fallen=frozenset(fallen),
    )


def settled(kernel: MemoryKernel, passes: Passes, given: PassInput) -> None:
    while passes.run_all(kernel, given).writes:
        pass


def without_ids(state: KernelState) -> KernelState:
    """A state in which nexthops are known by what they are, not by a number."""
    routes = {
        k: (state.nexthops.get(r.nexthop_id, r.via), r.source) for k, r in state.routes.items()
    }
    return replace(
        state,
        nexthops=dict.fromkeys(sorted(set(state.nexthops.values()))),  # type: ignore[arg-type]
        routes=routes,  # type: ignore[arg-type]
    )


class Mesh:
    """A snapshot that changes, and which hosts did."""

    def __init__(self, networks: Sequence[Network], hosts: int) -> None:
        made = make_snapshot(networks, hosts)
        self.hosts = dict(made.hosts)
        self.reservations = {n: held.copy() for n, held in made.reservations.items()}
        self.networks = made.networks
        self.expired: set[HostId] = set()
        self.fallen: set[Fallen] = set()
        self.touched: set[HostId] = set()

    def snapshot(self) -> MeshSnapshot:
        return MeshSnapshot(
            networks=self.networks,
            hosts=dict(self.hosts),
            reservations={n: held.copy() for n, held in self.reservations.items() if held},
        )

    def change(self, kind: str, host: HostId, number: int) -> None:
        if kind == "move":
            self.hosts[host] = Host(id=host, underlay_ip=underlay_ip(number))
        elif kind == "leave":
            self.hosts.pop(host, None)
            for held in self.reservations.values():
                held.assign(host, ())
        elif kind == "forget":
            self.hosts.pop(host, None)
        elif kind == "expire":
            self.expired ^= {host}
            return
        elif kind == "fall":
            self.fallen ^= {(list(self.networks)[number % len(self.networks)], host)}
            return
        else:
            for name, held in self.reservations.items():
                for cidr in self.networks[name].subnets:
                    prefix = self.networks[name].host_prefix_of(cidr.version)
                    subnet = ip_network(
                        (
                            int(cidr.network_address)
                            + (number << ((32 if cidr.version == 4 else 128) - prefix)),
                            prefix,
                        )
                    )
                    if held.get(subnet) != ME and len(held.of(host)) < len(
                        cidr.network_address.packed
                    ):
                        self.touched |= {h for h in [held.put(subnet, host)] if h is not None}
        self.touched.add(host)


changes = st.tuples(
    st.sampled_from(["own", "own", "move", "leave", "forget", "expire", "fall", "fall"]),
    st.sampled_from(CROWD),
    st.integers(2, 9),
)


def run(passes: Passes, kernel: MemoryKernel, mesh: Mesh, batch: Collection[HostId]) -> PassResult:
    """A pass over some hosts, or over everything where that gives up."""
    done = passes.run_part(kernel, part(mesh.snapshot(), batch, mesh.expired, mesh.fallen))
    if done is None:
        mesh.touched.clear()
        done = passes.run_all(kernel, full(mesh.snapshot(), mesh.expired, mesh.fallen))
    return done


@pytest.mark.parametrize("networks", NETWORKS.values(), ids=NETWORKS.keys())
@given(
    steps=st.lists(st.lists(changes, max_size=3), max_size=8),
    take=st.integers(1, 4),
    objects=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_parts_end_where_a_whole_ends(
    networks: list[Network], steps: list[list[tuple[str, HostId, int]]], take: int, objects: bool
) -> None:
    mesh, passes = Mesh(networks, 4), Passes()
    kernel = MemoryKernel(underlay_ip(1), nexthop_objects=objects)
    kernel.routed[underlay_ip(3)] = UnderlayPath("eth0", False, 1500)
    settled(kernel, passes, full(mesh.snapshot()))
    for step in steps:
        for change in step:
            mesh.change(*change)
        # Not all at once: the rest comes with the next step.
        batch = set(sorted(mesh.touched)[:take])
        mesh.touched -= batch
        run(passes, kernel, mesh, batch)
    result = run(passes, kernel, mesh, mesh.touched)
    fresh = MemoryKernel(underlay_ip(1), nexthop_objects=objects)
    fresh.routed = kernel.routed
    alone = Passes()
    settled(fresh, alone, full(mesh.snapshot(), mesh.expired, mesh.fallen))
    assert without_ids(kernel.dump()) == without_ids(fresh.dump())
    whole = passes.run_all(kernel, full(mesh.snapshot(), mesh.expired, mesh.fallen))
    assert whole.writes == 0
    assert result.networks == whole.networks
    assert not result.failures


class CountingKernel(MemoryKernel):
    """Knows what it was asked."""

    dumps = 0
    looked_up = 0

    def dump(self) -> KernelState:
        self.dumps += 1
        return super().dump()

    def find_paths(self, addresses: Collection[IpAddress]) -> dict[IpAddress, UnderlayPath]:
        self.looked_up += len(addresses)
        return super().find_paths(addresses)


@pytest.fixture
def crowd() -> tuple[Mesh, CountingKernel, Passes]:
    mesh, kernel, passes = Mesh([make_network()], 100), CountingKernel(underlay_ip(1)), Passes()
    settled(kernel, passes, full(mesh.snapshot()))
    kernel.dumps = kernel.looked_up = 0
    return mesh, kernel, passes


@pytest.mark.parametrize(
    ("kind", "writes"), [("move", 3), ("leave", 5), ("forget", 5), ("expire", 5)]
)
def test_one_host_costs_one_hosts_work(
    crowd: tuple[Mesh, CountingKernel, Passes], kind: str, writes: int
) -> None:
    mesh, kernel, passes = crowd
    mesh.change(kind, HostId("h7"), 200)
    result = passes.run_part(kernel, part(mesh.snapshot(), mesh.touched, mesh.expired))
    assert result is not None
    assert (result.writes, kernel.dumps) == (writes, 0)
    assert kernel.looked_up <= 1
    assert result.networks[PROD].peers == (99 if kind == "move" else 98)


def test_a_peer_that_falls_costs_its_own_routes() -> None:
    network = make_network(subnets=(IPV4, IPV6), fallback=True)
    mesh, kernel, passes = Mesh([network], 100), CountingKernel(underlay_ip(1)), Passes()
    settled(kernel, passes, full(mesh.snapshot()))
    kernel.dumps = 0
    before = kernel.dump()
    for fallen, writes in (({(PROD, HostId("h7"))}, 4), (set(), 4)):
        result = passes.run_part(kernel, part(mesh.snapshot(), (), fallen=fallen))
        assert result is not None
        # A route for each IP version, and a nexthop object that is not needed or needed again.
        assert (result.writes, kernel.dumps) == (writes, 1)
        ways = [r.via for r in kernel._state.routes.values() if r.via is not None]
        assert ways == [Nexthop("mnu4097", b"")] * 2 * len(fallen)
    assert without_ids(kernel.dump()) == without_ids(before)


def test_a_host_that_did_not_change_after_all(crowd: tuple[Mesh, CountingKernel, Passes]) -> None:
    mesh, kernel, passes = crowd
    result = passes.run_part(kernel, part(mesh.snapshot(), {HostId("h7"), HostId("nobody")}))
    assert result is not None
    assert result.writes == 0


def test_nothing_is_left_of_a_pass_to_a_first_part() -> None:
    assert Passes().run_part(MemoryKernel(underlay_ip(1)), part(MeshSnapshot(), ())) is None


def test_a_narrower_path_takes_a_pass_over_everything(
    crowd: tuple[Mesh, CountingKernel, Passes],
) -> None:
    mesh, kernel, passes = crowd
    kernel.routed[underlay_ip(200)] = UnderlayPath("eth0", False, 1400)
    mesh.change("move", HostId("h7"), 200)
    assert passes.run_part(kernel, part(mesh.snapshot(), mesh.touched)) is None
    passes.run_all(kernel, full(mesh.snapshot()))
    assert {link.mtu_bytes for link in kernel.dump().links.values()} == {1350}
    # A second path that is as narrow changes nothing: a pass over that host is enough.
    kernel.routed[underlay_ip(201)] = UnderlayPath("eth0", False, 1400)
    mesh.change("move", HostId("h8"), 201)
    assert passes.run_part(kernel, part(mesh.snapshot(), mesh.touched)) is not None


def test_a_refused_operation_stays_known_and_the_next_on_it_takes_a_look(
    crowd: tuple[Mesh, CountingKernel, Passes],
) -> None:
    mesh, kernel, passes = crowd
    mesh.change("leave", HostId("h7"), 0)
    mesh.change("leave", HostId("h8"), 0)
    kernel.fail_next(Table.ROUTE)
    result = passes.run_part(kernel, part(mesh.snapshot(), mesh.touched))
    assert result is not None
    assert len(result.failures) == 1
    mesh.touched.clear()
    mesh.change("move", HostId("h9"), 200)
    other = passes.run_part(kernel, part(mesh.snapshot(), mesh.touched))
    assert other is not None
    assert other.failures == result.failures
    for host, number in ((HostId("h7"), 6), (HostId("h8"), 7)):
        mesh.change("move", host, number + 1)
        mesh.change("own", host, number)
    again = part(mesh.snapshot(), {HostId("h7"), HostId("h8")})
    assert passes.run_part(kernel, again) is None
    assert passes.run_all(kernel, full(mesh.snapshot())).failures == ()


def test_progress_tells_what_is_left(crowd: tuple[Mesh, CountingKernel, Passes]) -> None:
    mesh, kernel, passes = crowd
    seen = []

    class Watched(CountingKernel):
        def _write(self, op: Op) -> None:
            seen.append(passes.progress.left)
            super()._write(op)

    kernel.__class__ = Watched
    mesh.change("leave", HostId("h7"), 0)
    passes.run_part(kernel, part(mesh.snapshot(), mesh.touched))
    assert max(seen) == 5
    assert passes.progress.left == 0


def test_an_underlay_address_in_a_network_concerns_the_whole_of_it() -> None:
    kernel, passes, stranger = MemoryKernel(underlay_ip(1)), Passes(), HostId("h3")
    before = make_snapshot([make_network()], 2)
    host = Host(id=stranger, underlay_ip=ip_address("10.42.200.9"))
    after = replace(before, hosts={**before.hosts, stranger: host})
    cidr = RouteKey(ip_network(IPV4).network_address.packed, 16)
    settled(kernel, passes, full(before))
    assert cidr in kernel.dump().routes
    assert passes.run_part(kernel, part(after, [stranger])) is None
    settled(kernel, passes, full(after))
    assert cidr not in kernel.dump().routes
    # What else happens to it is its own affair.
    assert passes.run_part(kernel, part(after, [stranger])) is not None
    assert passes.run_part(kernel, part(before, [stranger])) is None
    settled(kernel, passes, full(before))
    assert cidr in kernel.dump().routes
