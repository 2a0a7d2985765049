"""Endpoints: disk, kernel, addresses and the host's ports change together, or not at all."""

from __future__ import annotations

import errno
import os
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from meshnet.backends.routed_bridge import bridge_name
from meshnet.errors import (
    ConflictError,
    KernelRefusedError,
    MeshnetError,
    NotFoundError,
    PolicyRefusedError,
    UsageError,
)
from meshnet.kernel.fakes.kernel import MemoryKernel
from meshnet.kernel.fakes.wiring import MemoryWiring
from meshnet.model import AddressRange, EndpointId, MeshSnapshot, NetworkName
from meshnet.modes import Mode
from meshnet.ports import parse_all_published
from meshnet.state import Link, LinkKind, endpoint_link_name
from meshnet_agent.dataplane.pass_values import PassResult
from meshnet_agent.endpoints.addresses.former import FormerAddresses
from meshnet_agent.endpoints.addresses.subnet import HostAddresses, SubnetAddresses
from meshnet_agent.endpoints.attach import Attacher
from meshnet_agent.endpoints.directory import EndpointDirectory
from meshnet_agent.endpoints.keeper import Keeper
from meshnet_agent.endpoints.links import EndpointLinks
from meshnet_agent.endpoints.networks import ReadyNetworks
from meshnet_agent.endpoints.published_ports import PublishedPorts
from meshnet_agent.endpoints.records import EndpointRecords
from meshnet_agent.endpoints.request import AttachRequest
from meshnet_agent.endpoints.sandbox import Sandboxes, open_sandbox
from meshnet_agent.state_dir import StateDir
from meshnet_agent.tasks.right_of_way import RightOfWay
from tests.unit.data_plane import FakeDataPlane
from tests.unit.host_ports import FakePorts
from tests.unit.mesh import InlineWorker
from tests.values import ME, make_network, make_snapshot, make_underlay, plan_for, underlay_ip

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from meshnet.model import Endpoint, IpNetwork, Network, PublishedPort

LOCAL = make_network("local", ["172.30.0.0/24", "fd00:30::/64"], mode=Mode.BRIDGE)
BRIDGE = bridge_name(LOCAL)
REFUSED = KernelRefusedError("no pass can run on this host")


def ports(*texts: str) -> tuple[PublishedPort, ...]:
    return parse_all_published(texts)


@dataclass
class _Agent:
    """The parts of an agent that have to do with endpoints."""

    directory: EndpointDirectory
    addresses: HostAddresses
    networks: ReadyNetworks
    keeper: Keeper
    attacher: Attacher

    @property
    def all(self) -> list[Endpoint]:
        return self.directory.all

    async def attach(self, pid: int, *texts: str, name: str = "web") -> Endpoint:
        request = AttachRequest(network="local", name=name, publish=ports(*texts))
        with open_sandbox(pid) as sandbox:
            return await self.attacher.attach(sandbox, request)

    async def detach(self, pid: int) -> None:
        found = self.directory.find_of_process(pid, "local")
        await self.attacher.detach(found.sandbox.netns, "local")

    async def holds_addresses_of(self, endpoint: Endpoint) -> bool:
        """Tell whether an endpoint's addresses are taken for everybody else."""
        ready = await self.networks.ready("local")
        for address in endpoint.addresses:
            try:
                async with self.addresses.allocate(ready, EndpointId("0" * 12), address.ip) as got:
                    self.addresses.free(got)
                return False
            except ConflictError:
                pass
        return True


class _Host(FakeDataPlane):
    """What outlives an agent; `rules` is what the last pass made of the endpoints.

    It is the mesh and this host's part in it, too.

    Attributes:
        busy: passes do not end as long as this is not set.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.kernel = MemoryKernel(underlay_ip(1))
        self.kernel.add_endpoint_link(BRIDGE, Link(LinkKind.BRIDGE, 1500, bytes(6)))
        self.wiring = MemoryWiring(self.kernel)
        self.sockets = FakePorts()
        self.rules: dict[str, tuple[PublishedPort, ...]] = {}
        self.failure: KernelRefusedError | None = None
        self.busy = trio.Event()
        self.busy.set()
        self.snapshot = MeshSnapshot()
        self.subnets: dict[NetworkName, tuple[IpNetwork, ...]] = {}
        self.errors: dict[NetworkName, MeshnetError] = {}
        self.running: EndpointDirectory | None = None
        self.see(LOCAL)

    def see(self, network: Network) -> None:
        """The mesh has this network alone, and a pass has brought it up."""
        self.snapshot = make_snapshot([network], 1)
        self.subnets = {network.name: network.subnets}
        planned = plan_for(make_snapshot([LOCAL], 1), make_underlay())
        self.result = PassResult(networks=planned.networks)

    connected = True

    async def check_store(self) -> None:
        await trio.lowlevel.checkpoint()

    async def network_exists(self, name: NetworkName) -> bool:
        await trio.lowlevel.checkpoint()
        return name in self.snapshot.networks

    async def settle(self) -> None:
        await trio.lowlevel.checkpoint()
        await self.busy.wait()
        if self.failure is not None:
            raise self.failure
        assert self.running is not None
        self.rules = {e.name: e.published for e in self.running.all if e.published}

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[_Agent]:
        """The endpoints of an agent that ends without cleaning up."""
        disk = StateDir(self.directory, lambda: "i1")
        self.sockets.held.clear()
        worker = InlineWorker(self.wiring)
        records = EndpointRecords(disk.endpoints)
        links = EndpointLinks(worker, records)
        directory = self.running = EndpointDirectory(records, ME)
        published = PublishedPorts(self.sockets, self)
        networks = ReadyNetworks(self, self, self, self, worker)
        addresses = HostAddresses(directory, SubnetAddresses(directory, FormerAddresses()))
        keeper = Keeper(directory, Sandboxes(worker), links, published, addresses, networks)
        attacher = Attacher(directory, keeper, links, published, addresses, networks, RightOfWay())
        try:
            async with trio.open_nursery() as nursery:
                await keeper.load()
                await nursery.start(keeper.run)
                await self.settle()
                yield _Agent(directory, addresses, networks, keeper, attacher)
                nursery.cancel_scope.cancel()
        finally:
            disk.close()

    def recorded(self) -> dict[str, tuple[PublishedPort, ...]]:
        """What the next agent would find."""
        endpoints, _ = EndpointRecords(self.directory / "endpoints").load()
        return {e.name: e.published for e in endpoints}


@pytest.fixture
def host(tmp_path: Path, elsewhere: None) -> _Host:
    return _Host(tmp_path)


@pytest.fixture
def pid(process: subprocess.Popen[bytes]) -> int:
    return process.pid


async def test_published_hot_and_taken_away(host: _Host, pid: int) -> None:
    async with host.agent() as agent:
        endpoint = await agent.attach(pid, "8080:80")
        assert host.rules == {"web": ports("8080:80")}
        wanted = ports("8080:80", "53:53/udp", "9000-9001:90-91")
        after = await agent.attacher.publish("web", wanted[1:])
        assert after.published == wanted
        assert host.rules == {"web": wanted}
        assert len(host.sockets.held) == 2 * len(wanted)  # IPv4 and IPv6
        gone = await agent.attacher.unpublish(endpoint.id, ["8080", "9000:90", "9001/tcp"])
        assert gone.published == ports("53:53/udp")
        assert host.rules == {"web": gone.published}
        with pytest.raises(NotFoundError, match="no published port 53: it has 53:53/udp"):
            await agent.attacher.unpublish("web", ["53/udp", "53"])
        with pytest.raises(NotFoundError, match="nobody does not exist on this host"):
            await agent.attacher.publish("nobody", ports("1:1"))
        assert agent.all == [gone]
        await agent.detach(pid)
        assert (host.rules, host.sockets.held) == ({}, set())
    assert host.recorded() == {}


async def test_who_comes_back_by_the_same_name_has_the_same_address(
    host: _Host, process: subprocess.Popen[bytes]
) -> None:
    async with host.agent() as agent:
        first = await agent.attach(process.pid)
        await agent.detach(process.pid)
        other = await agent.attach(process.pid, name="other")
        assert other.addresses != first.addresses
        await agent.detach(process.pid)
        assert (await agent.attach(process.pid)).addresses == first.addresses
    # The power is cut: the next agent finds the record of a process that is gone.
    process.kill()
    process.wait()
    host.wiring.remove_link(endpoint_link_name(agent.all[0].id))
    async with host.agent() as agent:
        assert agent.all == []
        assert (await agent.attach(os.getpid(), name="new")).addresses != first.addresses
        await agent.detach(os.getpid())
        assert (await agent.attach(os.getpid())).addresses == first.addresses


async def test_after_a_crash_all_is_as_recorded(host: _Host, pid: int) -> None:
    async with host.agent() as agent:
        await agent.attach(pid, "8080:80", "80")
        before = agent.all
    assert host.recorded() == host.rules
    host.rules.clear()
    async with host.agent() as agent:
        assert agent.all == before
        assert host.rules == {"web": before[0].published}
        assert len(host.sockets.held) == 4
        with pytest.raises(ConflictError, match="is published for endpoint web"):
            await agent.attacher.publish("web", ports("8080:81"))


async def test_what_no_pass_can_bring_to_the_kernel_is_undone(host: _Host, pid: int) -> None:
    async with host.agent() as agent:
        host.failure = REFUSED
        with pytest.raises(KernelRefusedError):
            await agent.attach(pid, "8080:80")
        assert (agent.all, host.sockets.held) == ([], set())
        assert list(host.kernel.dump().links) == [BRIDGE]
        host.failure = None
        endpoint = await agent.attach(pid, "8080:80")
        held = set(host.sockets.held)
        host.failure = REFUSED
        with pytest.raises(KernelRefusedError):
            await agent.attacher.publish("web", ports("9000:90"))
        with pytest.raises(KernelRefusedError):
            await agent.attacher.unpublish("web", ["8080"])
        assert agent.all == [endpoint]
        assert host.sockets.held == held
        # A process can be detached all the same.
        await agent.detach(pid)
        assert (agent.all, host.sockets.held) == ([], set())


async def test_a_refused_port_leaves_nothing(host: _Host, pid: int) -> None:
    internal = replace(LOCAL, internal=True)
    physical = replace(
        LOCAL, mode=Mode.MACVLAN, parent="eth0",
        ranges=(AddressRange(LOCAL.subnets[0][8], LOCAL.subnets[0][9]),),
    )  # fmt: skip
    async with host.agent() as agent:
        for network, kind in ((internal, PolicyRefusedError), (physical, UsageError)):
            host.see(network)
            with pytest.raises(kind, match="publish"):
                await agent.attach(pid, "8080:80")
        host.see(LOCAL)
        first = await agent.attach(pid)
        for network, kind in ((internal, PolicyRefusedError), (physical, UsageError)):
            host.see(network)
            with pytest.raises(kind, match="publish"):
                await agent.attacher.publish("web", ports("8080:80"))
        host.see(LOCAL)
        assert (host.sockets.held, agent.all) == (set(), [first])
        await agent.detach(pid)
        second = await agent.attach(pid, "8080:80", name="other")
        # The address of a detached endpoint rests before it is given again; that of a failed
        # attach does not.
        assert second.addresses[0].ip == first.addresses[0].ip + 1


async def test_the_port_leads_nowhere_once_the_process_has_ended(
    host: _Host, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host.agent() as agent:
        await agent.attach(process.pid, "8080:80")
        await agent.directory.changed.wait()
        monkeypatch.setattr("meshnet_agent.endpoints.sandbox.find_process", lambda _: None)
        process.kill()
        with trio.fail_after(5):
            await agent.directory.changed.wait()
        assert (agent.all, host.rules, host.sockets.held) == ([], {}, set())


# --- all or nothing ------------------------------------------------------------------------------


async def test_an_agent_that_is_out_of_descriptors_leaves_nothing(
    host: _Host, pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host.agent() as agent:
        with monkeypatch.context() as patch:
            patch.setattr("meshnet_agent.endpoints.sandbox.os.dup", _no_descriptor)
            with pytest.raises(OSError, match="Too many open files"):
                await agent.attach(pid, "8080:80")
        assert (agent.all, host.sockets.held, host.recorded()) == ([], set(), {})
        assert list(host.kernel.dump().links) == [BRIDGE]
        endpoint = await agent.attach(pid, "8080:80")
        assert await agent.holds_addresses_of(endpoint)


def _no_descriptor(_fd: int) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("failure", [None, REFUSED])
async def test_an_attach_that_is_cancelled_is_made_whole_or_undone(
    host: _Host, pid: int, failure: KernelRefusedError | None
) -> None:
    async with host.agent() as agent:
        await _cancel_in_a_pass(host, lambda: agent.attach(pid, "8080:80"), failure)
        if failure is None:
            (endpoint,) = agent.all
            assert await agent.holds_addresses_of(endpoint)
            assert host.rules == host.recorded() == {"web": ports("8080:80")}
            assert len(host.sockets.held) == 2
        else:
            assert (agent.all, host.sockets.held, host.recorded()) == ([], set(), {})
            assert list(host.kernel.dump().links) == [BRIDGE]


@pytest.mark.parametrize("failure", [None, REFUSED])
async def test_a_publication_that_is_cancelled_is_made_whole_or_undone(
    host: _Host, pid: int, failure: KernelRefusedError | None
) -> None:
    async with host.agent() as agent:
        await agent.attach(pid, "8080:80")
        before = ports("8080:80")
        publish = lambda: agent.attacher.publish("web", ports("9000:90"))  # noqa: E731
        await _cancel_in_a_pass(host, publish, failure)
        after = before if failure is not None else (*before, *ports("9000:90"))
        assert agent.all[0].published == after
        assert host.recorded() == {"web": after}
        assert len(host.sockets.held) == 2 * len(after)


async def test_a_detach_that_is_cancelled_is_made_whole(host: _Host, pid: int) -> None:
    async with host.agent() as agent:
        endpoint = await agent.attach(pid, "8080:80")
        await _cancel_in_a_pass(host, lambda: agent.detach(pid), None)
        assert (agent.all, host.sockets.held, host.recorded()) == ([], set(), {})
        assert host.rules == {}
        assert not await agent.holds_addresses_of(endpoint)


async def _cancel_in_a_pass(
    host: _Host, call: Callable[[], Awaitable[object]], failure: KernelRefusedError | None
) -> None:
    """Cancel a call while the pass that it waits for runs, which ends later, or fails."""

    async def run() -> None:
        with scope:
            try:
                await call()
            except KernelRefusedError as error:
                assert error is failure  # noqa: PT017  (it may be cancelled instead)

    host.busy = trio.Event()
    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        host.failure = failure
        host.busy.set()
    host.failure = None


async def test_what_cannot_be_undone_keeps_its_addresses(
    host: _Host, pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another endpoint with these addresses would take this one's packets."""

    def refuse(_endpoint: Endpoint) -> None:
        raise KernelRefusedError("its link stays")

    async with host.agent() as agent:
        host.failure = REFUSED
        with monkeypatch.context() as patch:
            patch.setattr(host.wiring, "disconnect", refuse)
            with pytest.raises(KernelRefusedError, match="no pass can run"):
                await agent.attach(pid, "8080:80")
        host.failure = None
        (endpoint,) = agent.all
        assert await agent.holds_addresses_of(endpoint)
        assert host.recorded() == {"web": ports("8080:80")}
        assert len(host.sockets.held) == 2
        await agent.detach(pid)
        assert (agent.all, host.sockets.held, host.recorded()) == ([], set(), {})


# --- networks ------------------------------------------------------------------------------------


async def test_a_network_is_up_once_its_uplink_is_there(host: _Host, pid: int) -> None:
    host.kernel.remove_endpoint_link(BRIDGE)
    async with host.agent() as agent:
        with pytest.raises(ConflictError, match="network local is not up on this host"):
            await agent.networks.ready("local")
        attached: list[Endpoint] = []

        async def attach() -> None:
            attached.append(await agent.attach(pid))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(attach)
            await trio.testing.wait_all_tasks_blocked()
            assert attached == []
            host.kernel.add_endpoint_link(BRIDGE, Link(LinkKind.BRIDGE, 1500, bytes(6)))
        assert agent.all == attached
        with pytest.raises(NotFoundError, match="network nothere does not exist"):
            await agent.networks.wait_for("nothere")


async def test_a_network_that_is_gone_takes_its_endpoints_with_it(host: _Host, pid: int) -> None:
    async with host.agent() as agent:
        await agent.attach(pid, "8080:80")
        await agent.directory.changed.wait()
        agent.keeper.mesh_changed(MeshSnapshot(holes=frozenset({"a key"})), None)
        agent.keeper.mesh_changed(MeshSnapshot(), None)
        with trio.fail_after(5):
            await agent.directory.changed.wait()
        assert (agent.all, host.rules, host.sockets.held) == ([], {}, set())


async def test_a_link_that_somebody_deleted_is_made_again(host: _Host, pid: int) -> None:
    async with host.agent() as agent:
        endpoint = await agent.attach(pid)
        (name,) = host.wiring.list_endpoint_links()
        host.wiring.remove_link(name)
        agent.keeper.passed(PassResult(missing=frozenset({"mne000000000000"})))  # nobody's link
        await trio.testing.wait_all_tasks_blocked()
        assert host.wiring.list_endpoint_links() == []
        host.kernel.remove_endpoint_link(BRIDGE)
        agent.keeper.passed(PassResult(missing=frozenset({name})))
        await trio.testing.wait_all_tasks_blocked()
        assert "is not up" in agent.directory.unhealed[endpoint.id]
        host.kernel.add_endpoint_link(BRIDGE, Link(LinkKind.BRIDGE, 1500, bytes(6)))
        agent.keeper.passed(PassResult(missing=frozenset({name})))
        await trio.testing.wait_all_tasks_blocked()
        assert agent.directory.unhealed == {}
        assert host.wiring.list_endpoint_links() == [name]
        assert agent.all == [endpoint]
