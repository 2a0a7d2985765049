"""What agents do with the store: of two at the same instant, never do both win."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest
import trio

from meshnet.codec.endpoints import encode_endpoint
from meshnet.codec.hosts import decode_host, encode_host
from meshnet.codec.networks import encode_network
from meshnet.errors import (
    ConflictError,
    NotFoundError,
    PolicyRefusedError,
    PoolExhaustedError,
    StoreUnavailableError,
    UsageError,
)
from meshnet.model import Claim, Endpoint, Host, HostId, NetworkName
from meshnet.modes import Mode
from meshnet.store import Delete, Put
from meshnet.store.memory import MemoryStore
from meshnet.store.mirror import ALIVE, HOSTS, NETWORKS, SUBNETS, host_key, subnet_key
from meshnet.store.registry import Registry, endpoint_key
from meshnet.store.registry_rules import FIRST_VNI
from tests.values import IPV4, IPV6, make_endpoint, make_network, underlay_ip

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio.testing import MockClock

    from meshnet.model import IpNetwork, Network, Vni
    from meshnet.store import Commit, Condition, LeaseId, Listing, Write

H1, H2 = HostId("h1"), HostId("h2")
PROD = NetworkName("prod")


def make_host(name: str = "h1", number: int = 1) -> Host:
    return Host(id=HostId(name), underlay_ip=underlay_ip(number))


def make_claim(instance: str = "a", number: int = 1) -> Claim:
    return Claim(instance=instance, underlay_ip=underlay_ip(number))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def registry(store: MemoryStore) -> Registry:
    return Registry(store)


async def create(registry: Registry, *subnets: str, name: str = "prod", **more: Any) -> Network:  # noqa: ANN401
    vni: int | None = more.pop("vni", None)

    def build(chosen: Vni) -> Network:
        return make_network(name, subnets or (IPV4,), chosen, **more)

    return await registry.create_network(build, vni)


async def reserve(
    registry: Registry,
    network: Network,
    host: str = "h1",
    prefer: str | None = None,
    known: Mapping[IpNetwork, HostId] | None = None,
) -> IpNetwork:
    subnet, _ = await registry.reserve_subnet(
        network,
        network.subnets[0].version,
        HostId(host),
        known=known,
        prefer=ip_network(prefer) if prefer is not None else None,
        random_below=random.Random(1).randrange,
    )
    return subnet


# --- hosts ---------------------------------------------------------------------------------------


async def test_a_claim_publishes_the_host(registry: Registry) -> None:
    await registry.claim_host(make_host(), make_claim(), 15, set())
    snapshot = await registry.snapshot()
    assert snapshot.hosts == {H1: make_host()}
    assert snapshot.alive == {H1: make_claim()}


async def test_a_host_that_has_not_changed_is_not_written_again(
    registry: Registry, store: MemoryStore
) -> None:
    key = host_key(H1)
    granted: set[LeaseId] = set()
    for number in (1, 1, 2):
        host, claim = make_host(number=number), make_claim(number=number)
        await registry.claim_host(host, claim, 15, granted)
        (item,) = (await store.read(key)).items
        assert decode_host(item.value) == host
    await store.commit([], [Delete(key)])
    await registry.claim_host(host, claim, 15, set())
    assert (await store.read(key)).items
    before = (await store.read(key)).items
    await registry.claim_host(host, claim, 15, set())
    assert (await store.read(key)).items == before


class RemovingStore(MemoryStore):
    """Somebody removes a host's entry right after it was read, once."""

    once = False

    async def read(self, key: str, *, revision: int = 0) -> Listing:
        found = await super().read(key, revision=revision)
        if self.once and key.startswith(HOSTS):
            self.once = False
            await self.commit([], [Delete(key)])
        return found


async def test_a_host_that_is_removed_while_it_starts_again_is_published() -> None:
    store = RemovingStore()
    registry = Registry(store)
    await store.revoke_lease(await registry.claim_host(make_host(), make_claim(), 15, set()))
    store.once = True
    await registry.claim_host(make_host(), make_claim(), 15, set())
    snapshot = await registry.snapshot()
    assert snapshot.hosts.keys() == snapshot.alive.keys() == {H1}


class _SlowStore(MemoryStore):
    """Answers so late that the first leases have run out."""

    def __init__(self, too_late: int) -> None:
        super().__init__()
        self._too_late = too_late

    async def grant_lease(self, ttl_s: int) -> LeaseId:
        lease = await super().grant_lease(ttl_s)
        self._too_late -= 1
        if self._too_late >= 0:
            await self.revoke_lease(lease)
        return lease


async def test_a_lease_that_runs_out_before_the_host_is_claimed_is_granted_anew() -> None:
    store = _SlowStore(too_late=2)
    lease = await Registry(store).claim_host(make_host(), make_claim(), 2, set())
    assert await store.keep_alive(lease) == 2
    assert (await Registry(store).snapshot()).alive == {"h1": make_claim()}
    with pytest.raises(StoreUnavailableError, match="longer --lease-ttl"):
        await Registry(_SlowStore(too_late=1000)).claim_host(make_host(), make_claim(), 2, set())


async def test_a_second_agent_of_one_host_id_is_refused(registry: Registry) -> None:
    await registry.claim_host(make_host(), make_claim(), 15, set())
    with pytest.raises(ConflictError, match=r"held by an agent at underlay address 10\.9\.0\.1"):
        await registry.claim_host(make_host(number=2), make_claim("b", 2), 15, set())
    assert (await registry.snapshot()).hosts == {H1: make_host()}


async def test_a_host_id_is_free_after_its_lease(
    registry: Registry, autojump_clock: MockClock
) -> None:
    await registry.claim_host(make_host(), make_claim(), 15, set())
    await trio.sleep(15.1)
    assert (await registry.snapshot()).alive == {}
    await registry.claim_host(make_host(number=2), make_claim("b", 2), 15, set())
    assert (await registry.snapshot()).hosts[H1].underlay_ip == underlay_ip(2)


async def test_a_restarted_agent_takes_over_at_once(
    registry: Registry, store: MemoryStore, autojump_clock: MockClock
) -> None:
    old = await registry.claim_host(make_host(), make_claim(), 15, set())
    new = await registry.claim_host(make_host(), make_claim(), 15, set())
    assert new != old
    snapshot = await registry.snapshot()
    assert snapshot.alive == {H1: make_claim()}  # its old lease took nothing along
    await trio.sleep(10)
    await store.keep_alive(new)
    await trio.sleep(10)
    assert (await registry.snapshot()).alive


async def test_a_copy_of_a_state_directory_is_no_restart(registry: Registry) -> None:
    """Two machines would take the host from each other, and every host would follow."""
    await registry.claim_host(make_host(), make_claim(), 15, set())
    with pytest.raises(ConflictError, match=r"10\.9\.0\.1 with this state directory, or a copy"):
        await registry.claim_host(make_host(number=2), make_claim(number=2), 15, set())
    assert (await registry.snapshot()).hosts == {H1: make_host()}


async def test_an_agent_moves_under_its_own_lease(registry: Registry) -> None:
    granted: set[LeaseId] = set()
    await registry.claim_host(make_host(), make_claim(), 15, granted)
    await registry.claim_host(make_host(number=2), make_claim(number=2), 15, granted)
    assert (await registry.snapshot()).alive == {"h1": make_claim(number=2)}


class AnswerlessStore(MemoryStore):
    """Transactions succeed, and the answer to the first is lost."""

    lost = False

    async def commit(self, when: Sequence[Condition], then: Sequence[Write]) -> Commit:
        done = await super().commit(when, then)
        if not self.lost:
            self.lost = True
            raise StoreUnavailableError("the connection was closed")
        return done


async def test_an_agent_that_moves_again_is_not_refused_for_a_claim_of_its_own() -> None:
    registry = Registry(AnswerlessStore())
    granted: set[LeaseId] = set()
    with pytest.raises(StoreUnavailableError):
        await registry.claim_host(make_host(), make_claim(), 15, granted)
    assert (await registry.snapshot()).alive == {"h1": make_claim()}
    await registry.claim_host(make_host(number=2), make_claim(number=2), 15, granted)
    assert (await registry.snapshot()).alive == {"h1": make_claim(number=2)}


async def test_a_claim_that_cannot_be_read_is_somebodys(
    registry: Registry, store: MemoryStore
) -> None:
    await store.commit([], [Put(ALIVE + "h1", b"?")])
    with pytest.raises(ConflictError, match="cannot be read"):
        await registry.claim_host(make_host(), make_claim(), 15, set())


async def test_a_host_whose_name_begins_with_anothers(registry: Registry) -> None:
    await registry.claim_host(make_host("h10", 10), make_claim("x", 10), 15, set())
    await registry.claim_host(make_host("h1"), make_claim(), 15, set())
    assert len((await registry.snapshot()).alive) == 2


async def test_of_many_agents_with_one_id_one_wins(store: MemoryStore) -> None:
    outcomes = []

    async def claim(number: int) -> None:
        try:
            await Registry(store).claim_host(
                make_host(number=number), make_claim(str(number)), 15, set()
            )
            outcomes.append(True)
        except ConflictError:
            outcomes.append(False)

    async with trio.open_nursery() as nursery:
        for number in range(1, 9):
            nursery.start_soon(claim, number)
    assert sorted(outcomes) == [False] * 7 + [True]


async def test_removing_a_host(registry: Registry, store: MemoryStore) -> None:
    networks = [await create(registry), await create(registry, "10.43.0.0/16", name="test")]
    lease = await registry.claim_host(make_host(), make_claim(), 15, set())
    await registry.claim_host(make_host("h2", 2), make_claim("b", 2), 15, set())
    endpoint = make_endpoint()
    other = replace(endpoint, host=H2)
    for network in networks:
        for host in ("h1", "h2"):
            await reserve(registry, network, host)
    await registry.publish({endpoint_key(e): encode_endpoint(e) for e in (endpoint, other)}, [])
    with pytest.raises(ConflictError, match="alive"):
        await registry.remove_host(H1)
    assert (await registry.snapshot()).hosts.keys() == {H1, H2}
    await store.revoke_lease(lease)
    assert await registry.remove_host(H1) == [endpoint]
    snapshot = await registry.snapshot()
    assert snapshot.hosts.keys() == {H2}
    assert {host for owned in snapshot.reservations.values() for host in owned.values()} == {H2}
    assert await registry.list_endpoints() == [other]
    with pytest.raises(NotFoundError, match="h1"):
        await registry.remove_host(H1)


async def test_removing_a_host_that_is_on_very_many_networks(
    registry: Registry, store: MemoryStore
) -> None:
    await store.commit([], [Put(host_key(H1), encode_host(make_host()))])
    for i in range(130):
        network = make_network(f"n{i}", (f"10.{i}.0.0/16",), i + 1)
        key = subnet_key(network.name, ip_network(f"10.{i}.0.0/24"))
        await store.commit([], [Put(key, b'{"v":1,"host":"h1"}')])
    await registry.remove_host(H1)
    snapshot = await registry.snapshot()
    assert (snapshot.hosts, snapshot.reservations) == ({}, {})


async def test_removing_a_host_whose_entry_cannot_be_read(
    registry: Registry, store: MemoryStore
) -> None:
    await store.commit([], [Put(HOSTS + "h1", b"?")])
    await registry.remove_host(H1)
    assert (await registry.snapshot()).bad_values == {}


# --- subnets -------------------------------------------------------------------------------------


async def test_hosts_get_the_lowest_free_subnet_and_keep_it(registry: Registry) -> None:
    network = await create(registry)
    assert await reserve(registry, network, "h1") == ip_network("10.42.0.0/24")
    assert await reserve(registry, network, "h2") == ip_network("10.42.1.0/24")
    assert await reserve(registry, network, "h1") == ip_network("10.42.0.0/24")


async def test_the_preferred_subnet_if_it_is_free(registry: Registry) -> None:
    network = await create(registry)
    assert await reserve(registry, network, "h1", "10.42.9.0/24") == ip_network("10.42.9.0/24")
    assert await reserve(registry, network, "h2", "10.42.9.0/24") == ip_network("10.42.0.0/24")


@pytest.mark.parametrize("known", [None, {}], ids=["listed", "nothing known"])
async def test_a_race_of_many_hosts_gives_each_its_own(
    store: MemoryStore, known: Mapping[IpNetwork, HostId] | None
) -> None:
    network = await create(Registry(store), "10.42.0.0/22", host_prefix=28)  # 64 subnets
    found: dict[int, IpNetwork] = {}
    generator = random.Random(7)

    async def one(number: int) -> None:
        found[number], _ = await Registry(store).reserve_subnet(
            network,
            4,
            HostId(f"h{number}"),
            known=known,
            prefer=None,
            random_below=generator.randrange,
        )

    async with trio.open_nursery() as nursery:
        for number in range(60):
            nursery.start_soon(one, number)
    assert len(set(found.values())) == 60
    snapshot = await Registry(store).snapshot()
    assert {s: f"h{n}" for n, s in found.items()} == snapshot.reservations[PROD]


class CountingStore(MemoryStore):
    """Counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    async def list_prefix(self, prefix: str) -> Listing:
        self.calls["list"] += 1
        return await super().list_prefix(prefix)

    async def read(self, key: str, *, revision: int = 0) -> Listing:
        self.calls["read"] += 1
        return await super().read(key, revision=revision)

    async def commit(self, when: Sequence[Condition], then: Sequence[Write]) -> Commit:
        self.calls["commit"] += 1
        return await super().commit(when, then)


def many_reservations(count: int) -> dict[IpNetwork, HostId]:
    """Of a /8, from below."""
    return {ip_network(((10 << 24) + (i << 8), 24)): HostId(f"old{i}") for i in range(count)}


async def test_who_knows_the_reservations_need_not_list_them() -> None:
    store = CountingStore()
    registry = Registry(store)
    network = await create(registry, "10.0.0.0/8")
    store.calls.clear()
    subnet = await reserve(registry, network, known=many_reservations(20_000))
    assert subnet not in many_reservations(20_000)
    assert store.calls == {"read": 1, "commit": 1}


async def test_hosts_that_start_at_once_hardly_ever_collide() -> None:
    store = CountingStore()
    network = await create(Registry(store), "10.0.0.0/8")
    known = many_reservations(10_000)
    store.calls.clear()
    generator = random.Random(11)
    found = []

    async def one(number: int) -> None:
        subnet, _ = await Registry(store).reserve_subnet(
            network,
            4,
            HostId(f"h{number}"),
            known=known,
            prefer=None,
            random_below=generator.randrange,
        )
        found.append(subnet)

    async with trio.open_nursery() as nursery:
        for number in range(500):
            nursery.start_soon(one, number)
    assert len(set(found)) == 500
    assert not known.keys() & set(found)
    assert store.calls["commit"] < 510
    assert store.calls["list"] == 0


async def test_stale_knowledge_is_corrected_key_by_key_then_listed() -> None:
    store = CountingStore()
    registry = Registry(store)
    network = await create(registry, "10.42.0.0/22")  # four subnets
    for host in ("h1", "h2", "h3"):
        await reserve(registry, network, host)
    store.calls.clear()
    assert await reserve(registry, network, "h4", known={}) == ip_network("10.42.3.0/24")
    assert store.calls["commit"] <= 4
    assert store.calls["list"] <= 1
    with pytest.raises(PoolExhaustedError):
        await reserve(registry, network, "h5", known={})
    full = (await registry.snapshot()).reservations[PROD]
    store.calls.clear()
    with pytest.raises(PoolExhaustedError):
        await reserve(registry, network, "h5", known=full)
    assert not store.calls


async def test_a_reservation_that_is_not_known_yet_is_found_by_preferring_it(
    registry: Registry,
) -> None:
    network = await create(registry)
    first = await reserve(registry, network, known={})
    assert await reserve(registry, network, known={}, prefer=str(first)) == first
    assert (await registry.snapshot()).reservations == {PROD: {first: H1}}


async def test_a_subnet_is_never_taken_from_a_host_that_is_not_known(registry: Registry) -> None:
    network = await create(registry)
    first = await reserve(registry, network, "h1")
    second = await reserve(registry, network, "h2", prefer=str(first), known={})
    assert second != first
    assert (await registry.snapshot()).reservations == {PROD: {first: H1, second: H2}}


async def test_no_subnet_is_left(registry: Registry) -> None:
    network = await create(registry, "10.42.0.0/23")
    for host in ("h1", "h2"):
        await reserve(registry, network, host)
    with pytest.raises(PoolExhaustedError, match="all 2 subnets"):
        await reserve(registry, network, "h3")


async def test_a_reservation_that_cannot_be_read_is_not_overwritten(
    registry: Registry, store: MemoryStore
) -> None:
    network = await create(registry)
    await store.commit([], [Put(SUBNETS + "prod/10.42.0.0-24", b"?")])
    assert await reserve(registry, network) == ip_network("10.42.1.0/24")
    assert await reserve(registry, network, "h2", known={}) not in (
        ip_network("10.42.0.0/24"),
        ip_network("10.42.1.0/24"),
    )


async def test_a_reservation_that_is_no_host_subnet_does_not_count(
    registry: Registry, store: MemoryStore
) -> None:
    network = await create(registry)
    await store.commit([], [Put(SUBNETS + "prod/10.99.0.0-16", b'{"v":1,"host":"h1"}')])
    assert await reserve(registry, network) == ip_network("10.42.0.0/24")


async def test_reserving_of_a_network_that_is_gone(registry: Registry) -> None:
    network = await create(registry)
    await create(registry, "10.43.0.0/16", name="prod2")  # its key begins with the other's
    await registry.remove_network(PROD)
    with pytest.raises(NotFoundError, match="prod"):
        await reserve(registry, network)


async def test_reserving_of_a_network_written_by_a_newer_version(
    registry: Registry, store: MemoryStore
) -> None:
    network = await create(registry)
    newer = encode_network(network)[:-1] + b',"colour":"green"}'
    await store.commit([], [Put(NETWORKS + "prod", newer)])
    assert await reserve(registry, network) == ip_network("10.42.0.0/24")


# --- networks ------------------------------------------------------------------------------------


async def test_networks_get_the_lowest_free_vni(registry: Registry) -> None:
    first = await create(registry)
    second = await create(registry, "10.43.0.0/16", name="b", vni=FIRST_VNI + 1)
    third = await create(registry, "10.44.0.0/16", name="c")
    assert [n.vni for n in (first, second, third)] == [FIRST_VNI, FIRST_VNI + 1, FIRST_VNI + 2]
    snapshot = await registry.snapshot()
    assert list(snapshot.networks.values()) == [first, second, third]  # the oldest first


@pytest.mark.parametrize(
    ("subnets", "more", "message"),
    [
        (("10.50.0.0/16",), {"name": "prod"}, "network prod exists"),
        (("10.50.0.0/16",), {"vni": FIRST_VNI}, "VNI 4097 belongs to network prod"),
        (("10.42.128.0/17",), {}, "overlaps"),
        (("10.0.0.0/8",), {}, "overlaps"),
        (("10.50.0.0/16", IPV6), {}, "overlaps"),
        (("10.50.0.0/16",), {"name": "broken"}, "cannot be read"),
        (("10.50.0.0/16",), {"mode": Mode.UDP}, "UDP port 4789 is network prod's.* --port"),
    ],
)
async def test_networks_that_conflict(
    registry: Registry,
    store: MemoryStore,
    subnets: tuple[str, ...],
    more: dict[str, Any],
    message: str,
) -> None:
    await create(registry, IPV4, IPV6)
    await registry.claim_host(make_host(), make_claim(), 15, set())
    await store.commit([], [Put(NETWORKS + "broken", b"?")])
    with pytest.raises(ConflictError, match=message):
        await create(registry, *subnets, **{"name": "new", **more})
    assert (await registry.snapshot()).networks.keys() == {"prod"}


async def test_a_network_whose_addresses_are_in_use(registry: Registry) -> None:
    def refuse(network: Network) -> None:
        raise PolicyRefusedError(f"{network.name} is refused")

    await registry.claim_host(make_host(), make_claim(), 15, set())
    with pytest.raises(PolicyRefusedError, match=r"contains 10\.9\.0\.1, the .* of host h1"):
        await create(registry, "10.9.0.0/16")
    # Endpoints there are the hosts' neighbours.
    await create(registry, "10.9.0.0/16", name="lan", mode=Mode.MACVLAN, parent="eth0")
    with pytest.raises(PolicyRefusedError, match="new is refused"):
        await registry.create_network(lambda vni: make_network("new", vni=vni), None, refuse)
    assert (await registry.snapshot()).networks.keys() == {"lan"}


async def test_a_network_that_cannot_work(registry: Registry) -> None:
    with pytest.raises(UsageError):
        await create(registry, host_prefix=31)
    with pytest.raises(UsageError):
        await create(registry, vni=1 << 24)


async def test_a_race_of_networks_gives_each_its_own_vni(store: MemoryStore) -> None:
    async def one(number: int) -> None:
        await create(Registry(store), f"10.{number}.0.0/16", name=f"n{number}")

    async with trio.open_nursery() as nursery:
        for number in range(20, 32):
            nursery.start_soon(one, number)
    networks = (await Registry(store).snapshot()).networks.values()
    assert sorted(n.vni for n in networks) == list(range(FIRST_VNI, FIRST_VNI + 12))


async def test_of_networks_that_overlap_one_wins(store: MemoryStore) -> None:
    outcomes = []

    async def one(name: str) -> None:
        try:
            await create(Registry(store), name=name)
            outcomes.append(True)
        except ConflictError:
            outcomes.append(False)

    async with trio.open_nursery() as nursery:
        for name in "abcd":
            nursery.start_soon(one, name)
    assert sorted(outcomes) == [False, False, False, True]


async def test_removing_a_network(registry: Registry) -> None:
    network = await create(registry)
    other = await create(registry, "10.43.0.0/16", name="prod2")
    for each in (network, other):
        await reserve(registry, each)
    endpoint = make_endpoint()
    await registry.publish({endpoint_key(endpoint): encode_endpoint(endpoint)}, [])
    with pytest.raises(ConflictError, match=r"1 endpoints \(e-0123 on h1\)"):
        await registry.remove_network(PROD)
    await registry.publish({}, [endpoint_key(endpoint)])
    await registry.remove_network(PROD)
    snapshot = await registry.snapshot()
    assert snapshot.networks.keys() == snapshot.reservations.keys() == {"prod2"}
    assert not await registry.network_exists(PROD)
    with pytest.raises(NotFoundError, match="prod"):
        await registry.remove_network(PROD)


async def test_removing_a_network_of_ten_thousand_hosts(
    registry: Registry, store: MemoryStore
) -> None:
    network = await create(registry, "10.0.0.0/8")
    writes = [
        Put(subnet_key(network.name, subnet), b'{"v":1,"host":"h1"}')
        for subnet in many_reservations(10_000)
    ]
    for first in range(0, len(writes), 100):
        await store.commit([], writes[first : first + 100])
    assert len((await registry.snapshot()).reservations[PROD]) == 10_000
    await registry.remove_network(PROD)
    assert (await registry.snapshot()).reservations == {}


# --- endpoints -----------------------------------------------------------------------------------


async def test_endpoints_are_published_and_listed(registry: Registry, store: MemoryStore) -> None:
    some: list[Endpoint] = [
        make_endpoint((f"10.42.{i // 250}.{i % 250 + 2}/24",), identity=f"{i:012x}")
        for i in range(1_000)
    ]
    await registry.publish({endpoint_key(e): encode_endpoint(e) for e in some}, [])
    assert await registry.list_endpoints() == some
    assert await registry.list_endpoints(NetworkName("other")) == []
    assert len(await registry.list_published(PROD, H1)) == 1_000
    assert await registry.list_published(PROD, H2) == {}
    await registry.publish({}, [endpoint_key(e) for e in some[1:]])
    await store.commit([], [Put(endpoint_key(some[1]), b"?")])
    assert await registry.list_endpoints(PROD) == some[:1]
