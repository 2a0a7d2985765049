"""What a host does with the subnets that the store says it has."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from meshnet.errors import PolicyRefusedError, StoreUnavailableError
from meshnet.model import Claim, Host, HostId, NetworkName, Reservations
from meshnet.store import Delete, Put
from meshnet.store.memory import MemoryStore
from meshnet.store.mirror import SUBNETS, subnet_key
from meshnet.store.registry import Registry
from meshnet_agent.dataplane.dirty import Dirty
from meshnet_agent.mesh.membership import Claimant, Membership
from tests.unit.mesh import CountedDirty
from tests.values import ME, make_network, make_snapshot, underlay_ip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio.testing import MockClock

    from meshnet.model import IpNetwork
    from meshnet.store import Commit, Condition, LeaseId, Write
    from meshnet_agent.mesh.membership import SubnetUsers

PROD = NetworkName("prod")
SNAPSHOT = make_snapshot([make_network()], 2)
SUBNET = ip_network("10.42.0.0/24")


class NoIdentity:
    """An identity that may write to any store."""

    async def check(self) -> None:
        await trio.lowlevel.checkpoint()


class NoEndpoints:
    """A host without any."""

    def subnet_of(self, network: NetworkName, version: int) -> IpNetwork | None:
        return None


@pytest.fixture
def dirty() -> CountedDirty:
    return CountedDirty()


@pytest.fixture
def membership(dirty: CountedDirty) -> Membership:
    return member(MemoryStore(clock=lambda: 0.0), dirty=dirty)


def test_a_subnet_is_taken_in_once(membership: Membership, dirty: CountedDirty) -> None:
    for _ in range(2):
        membership.mesh_changed(SNAPSHOT, None)
        assert membership.subnets == {PROD: (SUBNET,)}
    assert dirty.count == 1


def test_a_lost_reservation_keeps_the_subnet_until_another_has_it(
    membership: Membership, dirty: CountedDirty
) -> None:
    membership.mesh_changed(SNAPSHOT, None)
    membership.mesh_changed(replace(SNAPSHOT, reservations={}), None)
    assert membership.subnets == {PROD: (SUBNET,)}
    membership.mesh_changed(
        replace(SNAPSHOT, reservations={PROD: Reservations({SUBNET: HostId("h2")})}), None
    )
    assert membership.subnets == {}
    assert dirty.count == 2


def test_a_network_that_is_gone(membership: Membership, dirty: CountedDirty) -> None:
    membership.mesh_changed(SNAPSHOT, None)
    membership.mesh_changed(replace(SNAPSHOT, networks={}), None)
    assert membership.subnets == {}
    assert dirty.count == 2


def test_a_network_that_was_made_anew_with_other_addresses(
    membership: Membership, dirty: CountedDirty
) -> None:
    membership.mesh_changed(SNAPSHOT, None)
    other = make_network(subnets=("10.77.0.0/16",))
    membership.mesh_changed(replace(SNAPSHOT, networks={PROD: other}, reservations={}), None)
    assert membership.subnets == {}
    assert dirty.count == 2


class SlowStore(MemoryStore):
    """Renewals time out, as those of an etcd that is overloaded or unplugged, until it recovers."""

    recovers_at = float("inf")

    async def keep_alive(self, lease_id: LeaseId) -> int:
        if trio.current_time() < self.recovers_at:
            await trio.sleep(5)
            raise StoreUnavailableError("no answer within 5 s")
        return await super().keep_alive(lease_id)


def member(
    store: MemoryStore,
    name: str = "h1",
    endpoints: SubnetUsers | None = None,
    dirty: Dirty | None = None,
) -> Membership:
    claimant = Claimant(
        host=Host(id=HostId(name), underlay_ip=underlay_ip(1)),
        claim=Claim(instance=name, underlay_ip=underlay_ip(1)),
        ttl_s=15,
    )
    return Membership(
        Registry(store), NoIdentity(), claimant, dirty or Dirty(), endpoints or NoEndpoints()
    )


async def join_and_reserve(membership: Membership, registry: Registry) -> None:
    """Join, and reserve subnets of what is there now."""
    await membership.join()
    membership.mesh_changed(await registry.snapshot(), None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(membership.reserve)
        await trio.sleep(5)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", range(8))
async def test_a_renewal_that_times_out_is_tried_again_within_the_lease(
    autojump_clock: MockClock, seed: int
) -> None:
    random.seed(seed)
    store = SlowStore()
    membership = member(store)
    await membership.join()
    lease = membership._lease
    store.recovers_at = trio.current_time() + 9
    async with trio.open_nursery() as nursery:
        nursery.start_soon(membership.keep_alive)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert membership._lease == lease


class LateStore(MemoryStore):
    """A renewal arrives seconds after it was sent."""

    async def keep_alive(self, lease_id: LeaseId) -> int:
        await trio.sleep(3)
        return await super().keep_alive(lease_id)


async def test_a_host_that_moved_is_published_at_once_and_once(autojump_clock: MockClock) -> None:
    """The old lease ends while it is being renewed; the new one is not lost by that."""
    store = LateStore()
    membership = member(store)
    await membership.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(membership.keep_alive)
        nursery.start_soon(membership.reserve)
        membership.mesh_changed(await membership._registry.snapshot(), None)
        await trio.sleep(6.1)  # a renewal is under way
        moved = Host(id=ME, underlay_ip=underlay_ip(2))
        membership.move(moved)
        await trio.testing.wait_all_tasks_blocked()
        assert (await membership._registry.snapshot()).hosts == {ME: moved}
        lease = membership._lease
        await trio.sleep(60)
        assert membership._lease == lease
        assert membership.lease_ok
        nursery.cancel_scope.cancel()


class CountingStore(MemoryStore):
    """Counts transactions."""

    commits = 0

    async def commit(self, when: Sequence[Condition], then: Sequence[Write]) -> Commit:
        self.commits += 1
        return await super().commit(when, then)


async def test_a_subnet_that_is_on_its_way_is_not_reserved_again(autojump_clock: MockClock) -> None:
    """Snapshots lag behind the host's own writes: each would cost etcd another transaction."""
    store = CountingStore()
    membership = member(store)
    registry = membership._registry
    await registry.create_network(lambda vni: make_network(vni=vni), None)
    await membership.join()
    before = await registry.snapshot()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(membership.reserve)
        store.commits = 0
        for _ in range(3):
            membership.mesh_changed(before, None)
            await trio.testing.wait_all_tasks_blocked()
        assert store.commits == 1
        (subnet,) = (await registry.snapshot()).reservations[PROD]
        # Somebody deletes the reservation: it is reserved again once the host sees that.
        await store.commit([], [Delete(subnet_key(PROD, subnet))])
        membership.mesh_changed(await registry.snapshot(), None)
        await trio.testing.wait_all_tasks_blocked()
        assert (await registry.snapshot()).reservations[PROD] == {subnet: ME}
        nursery.cancel_scope.cancel()


async def test_many_hosts_that_lost_their_leases_come_back_one_after_the_other(
    autojump_clock: MockClock,
) -> None:
    """All of ten thousand within 100 seconds, and one that is alone at once."""
    store = MemoryStore()
    for dead, least_s, most_s in ((1, 0.1, 1.0), (1_000, 0.1, 1.0), (10_000, 50.0, 100.0)):
        snapshot = make_snapshot([], 1)
        hosts = {HostId(f"h{i}"): snapshot.hosts[ME] for i in range(1, dead + 1)}
        pauses = []
        for _ in range(20):
            membership = member(store)
            membership.mesh_changed(replace(snapshot, hosts=hosts, alive={}), None)
            pauses.append(membership._rejoin_pause_s())
        assert least_s <= max(pauses) <= most_s


class ForgetfulStore(MemoryStore):
    """Makes a write and does not answer, once, as an etcd that is killed does."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: 0.0)
        self.forget = False

    async def commit(self, when: Sequence[Condition], then: Sequence[Write]) -> Commit:
        outcome = await super().commit(when, then)
        if self.forget:
            self.forget = False
            raise StoreUnavailableError("no answer")
        return outcome


@pytest.mark.parametrize("answer", [True, False])
async def test_a_snapshot_that_lags_behind_makes_no_second_reservation(
    autojump_clock: MockClock, answer: bool
) -> None:
    store = ForgetfulStore()
    registry = Registry(store)
    network = await registry.create_network(lambda vni: make_network(vni=vni), None)
    membership = member(store)
    await membership.join()
    before = await registry.snapshot()
    # So that choices are random.
    others = {ip_network(f"10.42.{i}.0/24"): HostId(f"old{i}") for i in range(100)}
    stale = replace(before, reservations={network.name: Reservations(others)})
    store.forget = not answer
    async with trio.open_nursery() as nursery:
        nursery.start_soon(membership.reserve)
        for _ in range(3):
            membership.mesh_changed(stale, None)
            await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert len((await registry.snapshot()).reservations[network.name]) == 1


class Denying(MemoryStore):
    """A store whose user may write no reservation of network ``prod``."""

    async def commit(self, when: Sequence[Condition], then: Sequence[Write]) -> Commit:
        if any(isinstance(w, Put) and w.key.startswith(f"{SUBNETS}prod/") for w in then):
            raise PolicyRefusedError("permission denied")
        return await super().commit(when, then)


async def test_a_network_that_may_not_be_joined_holds_up_no_other(
    autojump_clock: MockClock,
) -> None:
    store = Denying()
    registry = Registry(store)
    for network in (make_network(), make_network("test", ("10.43.0.0/16",), 7)):
        await registry.create_network(lambda _, made=network: made, network.vni)  # type: ignore[misc]
    membership = member(store)
    await join_and_reserve(membership, registry)
    assert (await registry.snapshot()).reserved_by(ME).keys() == {"test"}
    assert str(membership.errors[PROD]) == "permission denied"


async def test_a_host_that_was_forgotten_takes_the_subnet_that_its_endpoints_are_in(
    autojump_clock: MockClock,
) -> None:
    store = MemoryStore(clock=trio.current_time)
    registry = Registry(store)
    network = await registry.create_network(lambda _: make_network(), None)
    where = {4: ip_network("10.42.129.0/24"), 6: ip_network("fd00:42:0:9::/64")}

    class Endpoints:
        def subnet_of(self, name: NetworkName, version: int) -> IpNetwork | None:
            return where[version] if name == network.name else None

    membership = member(store, endpoints=Endpoints())
    await join_and_reserve(membership, registry)
    owned = (await registry.snapshot()).subnets_of(ME, network.name)
    assert set(owned) == {where[cidr.version] for cidr in network.subnets}
