"""Addresses of one pool for all hosts: none twice, none lost, none leaked."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
import trio

from meshnet.backends import HostLink
from meshnet.codec.endpoints import decode_address_holder
from meshnet.errors import (
    ConflictError,
    KernelRefusedError,
    MeshnetError,
    NotFoundError,
    PoolExhaustedError,
    StoreUnavailableError,
    UsageError,
)
from meshnet.model import (
    AddressHolder,
    AddressRange,
    Claim,
    EndpointId,
    Host,
    HostId,
    MeshSnapshot,
)
from meshnet.modes import Mode
from meshnet.store import Delete, Put
from meshnet.store.addresses import SET_ASIDE_S, address_key, hold_addresses, list_pool
from meshnet.store.memory import MemoryStore
from meshnet.store.mirror import ADDRESSES, network_key, printable_key
from meshnet.store.registry import Registry
from meshnet_agent.dataplane.pass_values import PassResult
from meshnet_agent.endpoints.addresses.pool import PoolAddresses
from meshnet_agent.endpoints.request import ReadyNetwork
from tests.unit.mesh import CountedDirty, MemoryProber, until
from tests.values import make_endpoint, make_network, make_underlay, underlay_ip

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from trio.testing import MockClock

    from meshnet.model import Endpoint, Network, Vni
    from meshnet.store import Commit, Condition, Write

V4, V6 = "10.9.0.0/16", "fd09::/64"
OUTSIDER = bytes.fromhex("0a0000000001")
LEAVING = bytes.fromhex("02650a090801")
GATEWAY = ip_address("10.9.8.3")
UNDERLAY = replace(
    make_underlay(), links={"eth0": HostLink(1500, frozenset({ip_address("10.9.8.2")}))}
)


class CountingStore(MemoryStore):
    """Counts transactions; its connections count their own."""

    commits = 0

    async def commit(self, when: Sequence[Condition], then: Sequence[Write]) -> Commit:
        self.commits += 1
        return await super().commit(when, then)


@dataclass
class Member:
    """A host's pool and its surroundings: this is its mesh and its endpoints, too."""

    store: MemoryStore
    host: HostId
    snapshot: MeshSnapshot
    prober: MemoryProber = field(default_factory=MemoryProber)
    recorded: set[str] = field(default_factory=set)
    endpoints: list[Endpoint] = field(default_factory=list)
    connected: bool = True
    dirty: CountedDirty = field(default_factory=CountedDirty)

    def __post_init__(self) -> None:
        self.pool = self.start()

    def start(self) -> PoolAddresses:
        """As the agent does; what was known before is forgotten."""
        self.pool = PoolAddresses(self.store, self.host, self.prober, self, self, self.dirty)
        self.passed()
        return self.pool

    def passed(self) -> None:
        """A pass over this host's links has ended."""
        self.pool.passed(PassResult(underlay=UNDERLAY))

    async def check_store(self) -> None:
        """It is this host's mesh."""
        await trio.lowlevel.checkpoint()

    @property
    def all(self) -> list[Endpoint]:
        """This host's endpoints."""
        return self.endpoints

    def recorded_ids(self) -> set[str]:
        """What is on this host's disk."""
        return set(self.recorded)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the block runs, what is not needed is given back."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.pool.run)
            yield
            nursery.cancel_scope.cancel()

    async def attach(self, number: int, wanted: str | None = None) -> list[str]:
        """Take addresses for an endpoint, and record it as the agent does."""
        identity = EndpointId(f"{number:012x}")
        network = next(iter(self.snapshot.networks.values()))
        ready = ReadyNetwork(
            network=network, subnets=network.subnets, uplink="eth0", mtu_bytes=1500
        )
        ip = ip_address(wanted) if wanted is not None else None
        async with self.pool.allocate(ready, identity, ip) as addresses:
            self.recorded.add(identity)
        return [str(a) for a in addresses]

    def detach(self, number: int) -> None:
        self.recorded.discard(f"{number:012x}")
        self.pool.free(())


class Wire:
    """Several hosts and one store."""

    def __init__(self) -> None:
        self.store = CountingStore()
        self.registry = Registry(self.store)

    async def network(self, *subnets: str, count: int = 250, **more: Any) -> Network:  # noqa: ANN401
        first = ip_address("10.9.8.1")
        ranges = (AddressRange(first, first + (count - 1)),) if V4 in (subnets or (V4,)) else ()

        def build(vni: Vni) -> Network:
            return make_network(
                "phys", subnets or (V4,), vni, mode=Mode.MACVLAN, parent="eth0",
                ranges=ranges, gateways=(GATEWAY,) if ranges else (), **more,
            )  # fmt: skip

        return await self.registry.create_network(build, None)

    async def members(self, count: int = 2) -> list[Member]:
        snapshot = await self.registry.snapshot()
        return [Member(self.store, HostId(f"h{i}"), snapshot) for i in range(1, count + 1)]

    async def holders(self) -> dict[str, AddressHolder]:
        items = (await self.store.list_prefix(ADDRESSES)).items
        return {i.key.rpartition("/")[2]: decode_address_holder(i.value) for i in items}

    async def until_held(self, count: int) -> None:
        """Wait until so many addresses are held."""
        with trio.fail_after(60):
            while len(await self.holders()) != count:  # noqa: ASYNC110  (there is no event for it)
                await trio.sleep(0.1)


@pytest.fixture
def wire() -> Wire:
    return Wire()


async def test_the_lowest_that_is_nobodys(autojump_clock: MockClock, wire: Wire) -> None:
    await wire.network()
    one, two = await wire.members()
    # .2 is the host's own and .3 the gateway's.
    assert await one.attach(1) == ["10.9.8.1/16"]
    assert await two.attach(2) == ["10.9.8.4/16"]
    assert await one.attach(3) == ["10.9.8.5/16"]
    assert (await wire.holders())["10.9.8.4"] == AddressHolder(HostId("h2"), f"{2:012x}")


async def test_both_ip_versions_in_one_transaction(autojump_clock: MockClock, wire: Wire) -> None:
    await wire.network(V4, V6)
    (one,) = await wire.members(1)
    before = wire.store.commits
    assert await one.attach(1) == ["10.9.8.1/16", "fd09::1/64"]
    assert wire.store.commits == before + 1
    assert await one.attach(2, "fd09::77") == ["10.9.8.4/16", "fd09::77/64"]


@pytest.mark.parametrize("each", [30, 200])
async def test_two_hosts_at_the_same_instant(
    autojump_clock: MockClock, wire: Wire, each: int
) -> None:
    """No duplicate, none lost, and not a transaction for every pair of attaches."""
    await wire.network(count=2 * each + 100)
    members = await wire.members()
    got: list[str] = []
    before = wire.store.commits

    async def attach(member: Member, number: int) -> None:
        got.extend(await member.attach(number))

    async with trio.open_nursery() as nursery:
        for index, member in enumerate(members):
            for number in range(each):
                nursery.start_soon(attach, member, index * each + number)
    assert len(got) == len(set(got)) == 2 * each
    held = await wire.holders()
    assert {f"{a}/16" for a in held} == set(got)
    assert Counter(h.host for h in held.values()) == {"h1": each, "h2": each}
    assert wire.store.commits - before < 5 * each


async def test_an_address_that_is_asked_for(autojump_clock: MockClock, wire: Wire) -> None:
    await wire.network()
    one, two = await wire.members()
    assert await one.attach(1, "10.9.8.50") == ["10.9.8.50/16"]
    with pytest.raises(ConflictError, match="held by host h1"):
        await two.attach(2, "10.9.8.50")
    for wrong, message in (("10.9.9.77", "outside"), ("10.9.8.3", "gateway"), ("fd00::1", "IPv6")):
        with pytest.raises(UsageError, match=message):
            await two.attach(2, wrong)
    assert await wire.holders() == {"10.9.8.50": AddressHolder(HostId("h1"), f"{1:012x}")}


async def test_a_full_pool(autojump_clock: MockClock, wire: Wire) -> None:
    await wire.network(count=5)
    one, two = await wire.members()
    async with one.running():
        for number in range(3):
            await one.attach(number)
        with pytest.raises(PoolExhaustedError, match="all 5 addresses"):
            await two.attach(10)
        one.detach(1)
        await wire.until_held(2)
        assert await two.attach(11) == ["10.9.8.4/16"]


# --- the wire ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mac", "ttl_s"), [(OUTSIDER, SET_ASIDE_S), (LEAVING, 30)])
async def test_an_address_that_an_outsider_has(
    autojump_clock: MockClock, wire: Wire, mac: bytes, ttl_s: int
) -> None:
    network = await wire.network(V4, V6)
    one, two = await wire.members()
    taken = ip_address("10.9.8.1")
    one.prober.answers[taken] = two.prober.answers[taken] = mac
    assert await one.attach(1) == ["10.9.8.4/16", "fd09::1/64"]
    assert one.pool.report().set_aside == [(network.name, taken, mac)]
    assert (await wire.holders())["10.9.8.1"] == AddressHolder(HostId(""), held_by=mac)
    await two.pool.load()
    assert two.pool.report().set_aside == [(network.name, taken, mac)]
    with pytest.raises(ConflictError, match=mac.hex(":")):
        await two.attach(2, "10.9.8.1")
    # It is tried again once the lease has run out.
    await trio.sleep(ttl_s + 1)
    assert "10.9.8.1" not in await wire.holders()
    del two.prober.answers[taken]
    assert (await two.attach(3, "10.9.8.1"))[0] == "10.9.8.1/16"


async def test_an_address_that_is_asked_for_and_answered(
    autojump_clock: MockClock, wire: Wire
) -> None:
    network = await wire.network()
    (one,) = await wire.members(1)
    wanted = ip_address("10.9.8.77")
    one.prober.answers[wanted] = OUTSIDER
    with pytest.raises(ConflictError, match="0a:00:00:00:00:01"):
        await one.attach(1, str(wanted))
    assert one.pool.report().set_aside == [(network.name, wanted, OUTSIDER)]


async def test_somebody_who_answers_for_everything(autojump_clock: MockClock, wire: Wire) -> None:
    await wire.network()
    (one,) = await wire.members(1)
    one.prober.answers = {ip_address(f"10.9.8.{n}"): OUTSIDER for n in range(256)}
    with pytest.raises(ConflictError, match="proxy ARP"):
        await one.attach(1)
    assert len(await wire.holders()) == 10


async def test_a_wire_that_cannot_be_asked(autojump_clock: MockClock, wire: Wire) -> None:
    await wire.network()
    (one,) = await wire.members(1)

    one.prober.error = KernelRefusedError("link eth0 is down")
    async with one.running():
        with pytest.raises(KernelRefusedError, match="down"):
            await one.attach(1)
        await wire.until_held(0)


# --- nothing leaks -------------------------------------------------------------------------------


async def test_an_agent_that_is_killed_holds_nothing_too_much_after(
    autojump_clock: MockClock, wire: Wire
) -> None:
    await wire.network()
    (one,) = await wire.members(1)
    for number in range(5):
        await one.attach(number)
    one.recorded -= {f"{3:012x}", f"{4:012x}"}  # killed before it recorded them
    one.start()
    async with one.running():
        one.pool.refresh()
        await wire.until_held(3)
    assert {h.endpoint for h in (await wire.holders()).values()} == one.recorded


async def test_while_the_store_is_away(autojump_clock: MockClock, wire: Wire) -> None:
    await wire.network()
    (one,) = await wire.members(1)
    await one.attach(1)
    await one.attach(2)
    async with one.running():
        wire.store.set_available(False)
        with pytest.raises(StoreUnavailableError):
            await one.attach(3)
        one.detach(1)  # needs no store
        await trio.sleep(5)
        wire.store.set_available(True)
        await wire.until_held(1)


async def test_a_write_whose_answer_was_lost(autojump_clock: MockClock, wire: Wire) -> None:
    await wire.network()
    (one,) = await wire.members(1)
    await one.pool.load()

    async def lose(*arguments: Any) -> bool:  # noqa: ANN401
        assert await hold_addresses(*arguments)
        raise StoreUnavailableError("no answer")

    async with one.running():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("meshnet_agent.endpoints.addresses.pool_store.hold_addresses", lose)
            with pytest.raises(StoreUnavailableError):
                await one.attach(1)
        await wire.until_held(0)


async def test_an_attach_that_fails_later_gives_its_address_back(
    autojump_clock: MockClock, wire: Wire
) -> None:
    network = await wire.network()
    (one,) = await wire.members(1)
    ready = ReadyNetwork(network=network, subnets=network.subnets, uplink="eth0", mtu_bytes=1500)
    async with one.running():
        with pytest.raises(MeshnetError, match="the kernel would not"):
            async with one.pool.allocate(ready, EndpointId("0" * 12), None):
                raise KernelRefusedError("the kernel would not")
        await wire.until_held(0)


# --- the store -----------------------------------------------------------------------------------


async def test_a_host_that_is_gone_for_good(autojump_clock: MockClock, wire: Wire) -> None:
    await wire.network()
    one, two = await wire.members()
    host = Host(id=one.host, underlay_ip=underlay_ip(1))
    claim = Claim(instance="a", underlay_ip=underlay_ip(1))
    lease = await wire.registry.claim_host(host, claim, 15, set())
    await one.attach(1)
    await two.attach(2)
    with pytest.raises(ConflictError, match="alive"):
        await wire.registry.remove_host(one.host)
    assert len(await wire.holders()) == 2
    await wire.store.revoke_lease(lease)
    await wire.registry.remove_host(one.host)
    assert [h.host for h in (await wire.holders()).values()] == ["h2"]


async def test_a_network_that_is_removed(autojump_clock: MockClock, wire: Wire) -> None:
    network = await wire.network()
    one, _ = await wire.members()
    await one.attach(1)
    await wire.registry.remove_network(network.name)
    assert await wire.holders() == {}
    with pytest.raises(NotFoundError):
        await one.attach(2)
    # A new network of that name is another network.
    await wire.network(host_access=True)
    with pytest.raises(NotFoundError):
        await one.attach(3)
    assert await wire.holders() == {}


async def test_hostile_keys(autojump_clock: MockClock, wire: Wire) -> None:
    network = await wire.network()
    (one,) = await wire.members(1)
    first = address_key(network.name, ip_address("10.9.8.1"))
    nonsense = f"{ADDRESSES}phys/x\n"
    await wire.store.commit([], [Put(first, b"{"), Put(nonsense, b'{"v":1,"host":"h1"}')])
    assert await one.attach(1) == ["10.9.8.4/16"]  # the other machine keeps it
    assert one.pool.report().bad_values.keys() == {first, printable_key(nonsense)}
    with pytest.raises(ConflictError, match="cannot be read"):
        await one.attach(2, "10.9.8.1")
    listing = await list_pool(wire.store, network)
    assert listing.holders[ip_address("10.9.8.1")] == AddressHolder(HostId(""))
    await wire.store.commit([], [Put(network_key(network.name), b"{")])
    with pytest.raises(NotFoundError):
        await list_pool(wire.store, network)


async def test_what_the_store_lost_is_taken_again(autojump_clock: MockClock, wire: Wire) -> None:
    network = await wire.network()
    one, two = await wire.members()
    for number in (1, 2):
        (text,) = await one.attach(number)
        one.endpoints.append(_endpoint(network, one, number, text))
    keys = [address_key(network.name, a.ip) for e in one.endpoints for a in e.addresses]
    await wire.store.commit([], [Delete(key) for key in keys])
    # Another host got one of them meanwhile.
    assert await two.attach(9) == ["10.9.8.1/16"]
    async with one.running():
        one.pool.refresh()
        await until(lambda: bool(one.pool.report().errors[network.name]), "the conflict is told")
    assert "host h2 holds" in one.pool.report().errors[network.name][0]
    assert (await wire.holders())["10.9.8.4"] == AddressHolder(one.host, f"{2:012x}")


def _endpoint(network: Network, member: Member, number: int, text: str) -> Endpoint:
    made = make_endpoint((text,), identity=f"{number:012x}")
    return replace(made, network=network.name, host=member.host, gateways=())


async def test_an_address_for_the_host_itself(autojump_clock: MockClock, wire: Wire) -> None:
    network = await wire.network(V4, V6, host_access=True)
    (one,) = await wire.members(1)
    async with one.running():
        one.passed()
        await until(lambda: bool(one.pool.host_addresses), "the host has addresses")
    assert [str(a) for a in one.pool.host_addresses[network.name]] == ["10.9.8.1", "fd09::1"]
    assert set((await wire.holders()).values()) == {AddressHolder(one.host)}
    assert one.dirty.count == 1
    # After a restart they are the same, before anything is planned.
    one.start()
    await one.pool.load()
    assert [str(a) for a in one.pool.host_addresses[network.name]] == ["10.9.8.1", "fd09::1"]


async def test_no_address_for_the_host_itself(autojump_clock: MockClock, wire: Wire) -> None:
    network = await wire.network(host_access=True)
    (one,) = await wire.members(1)
    one.prober.error = KernelRefusedError("link eth0 is down")
    async with one.running():
        one.passed()
        await until(lambda: bool(one.pool.report().errors.get(network.name)), "it is told")
        assert "eth0 is down" in one.pool.report().errors[network.name][0]
        one.prober.error = None
        one.passed()
        await until(lambda: bool(one.pool.host_addresses), "the host has an address")
        assert one.pool.report().errors[network.name] == []
