"""Publication of ports: disk, kernel and the host's ports go together, or nothing has happened."""

from __future__ import annotations

import subprocess
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from meshnet.errors import (
    ConflictError,
    KernelRefusedError,
    NotFoundError,
    PolicyRefusedError,
    UsageError,
)
from meshnet.kernel.fakes.kernel import MemoryKernel
from meshnet.kernel.fakes.wiring import MemoryWiring
from meshnet.model import AddressRange, Mode
from meshnet.ports import parse_all_published
from meshnet.state import Link, LinkKind
from meshnet_agent.endpoints.addresses.subnet import SubnetAddresses
from meshnet_agent.endpoints.attach import Endpoints
from meshnet_agent.endpoints.published_ports import PublishedPorts
from meshnet_agent.endpoints.request import AttachRequest, ReadyNetwork
from meshnet_agent.state_dir import StateDir
from tests.unit.host_ports import FakePorts
from tests.unit.mesh import InlineWorker
from tests.values import ME, make_network, underlay_ip

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from meshnet.model import Endpoint, PublishedPort

LOCAL = make_network("local", ["172.30.0.0/24", "fd00:30::/64"], mode=Mode.BRIDGE)
READY = ReadyNetwork(network=LOCAL, subnets=LOCAL.subnets, uplink="mnb1", mtu_bytes=1500)
REFUSED = KernelRefusedError("no pass can run on this host")


def ports(*texts: str) -> tuple[PublishedPort, ...]:
    return parse_all_published(texts)


class _Host:
    """What outlives an agent; `rules` is what the last pass made of the endpoints."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kernel = MemoryKernel(underlay_ip(1))
        self.kernel.add_endpoint_link("mnb1", Link(LinkKind.BRIDGE, 1500, bytes(6)))
        self.sockets = FakePorts()
        self.rules: dict[str, tuple[PublishedPort, ...]] = {}
        self.failure: KernelRefusedError | None = None

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[Endpoints]:
        """The endpoints of an agent, which ends without a word."""
        disk = StateDir(self.directory, lambda: "i1")
        self.sockets.held.clear()

        async def settle() -> None:
            await trio.lowlevel.checkpoint()
            if self.failure is not None:
                raise self.failure
            self.rules = {e.name: e.published for e in endpoints.all if e.published}

        endpoints = Endpoints(
            InlineWorker(MemoryWiring(self.kernel)),
            disk,
            ME,
            SubnetAddresses(list),
            PublishedPorts(self.sockets),
            settle,
        )
        try:
            async with trio.open_nursery() as nursery:
                await endpoints.load()
                await nursery.start(endpoints.run)
                await settle()
                yield endpoints
                nursery.cancel_scope.cancel()
        finally:
            disk.close()

    def recorded(self) -> dict[str, tuple[PublishedPort, ...]]:
        """What the next agent would find."""
        disk = StateDir(self.directory, lambda: "i1")
        try:
            return {e.name: e.published for e in disk.load_endpoints()[0]}
        finally:
            disk.close()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Host:
    # The processes are in this machine's own namespace, which is as good as any for a fake.
    monkeypatch.setattr("meshnet_agent.endpoints.attach.host_netns_inodes", set)
    return _Host(tmp_path)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


@pytest.fixture
def pid(process: subprocess.Popen[bytes]) -> int:
    return process.pid


def request(pid: int, *texts: str) -> AttachRequest:
    return AttachRequest(pid=pid, network="local", name="web", publish=ports(*texts))


async def attach(endpoints: Endpoints, pid: int, *texts: str) -> Endpoint:
    return await endpoints.attach(request(pid, *texts), READY)


async def test_published_hot_and_taken_away(host: _Host, pid: int) -> None:
    async with host.agent() as endpoints:
        endpoint = await attach(endpoints, pid, "8080:80")
        assert host.rules == {"web": ports("8080:80")}
        wanted = ports("8080:80", "53:53/udp", "9000-9001:90-91")
        after = await endpoints.publish("web", wanted[1:], LOCAL)
        assert after.published == wanted
        assert host.rules == {"web": wanted}
        assert len(host.sockets.held) == 2 * len(wanted)  # IPv4 and IPv6
        gone = await endpoints.unpublish(endpoint.id, ["8080", "9000:90", "9001/tcp"])
        assert gone.published == ports("53:53/udp")
        assert host.rules == {"web": gone.published}
        with pytest.raises(NotFoundError, match="no published port 53: it has 53:53/udp"):
            await endpoints.unpublish("web", ["53/udp", "53"])
        with pytest.raises(NotFoundError, match="nobody does not exist on this host"):
            await endpoints.publish("nobody", ports("1:1"), LOCAL)
        assert endpoints.all == [gone]
        await endpoints.detach(pid, "local")
        assert (host.rules, host.sockets.held) == ({}, set())
    assert host.recorded() == {}


async def test_udp_flows_follow_every_change(host: _Host, pid: int) -> None:
    def redirected() -> set[int]:
        found, host.sockets.redirected = host.sockets.redirected, []
        return {binding.port for binding in found}

    async with host.agent() as endpoints:
        await attach(endpoints, pid, "53:53", "54:53/udp")
        assert redirected() == {54}
        await endpoints.publish("web", ports("55-56:55-56/udp"), LOCAL)
        assert redirected() == {55, 56}
        await endpoints.unpublish("web", ["55/udp", "53"])
        assert redirected() == {55}
        await endpoints.detach(pid, "local")
        assert redirected() == {54, 56}


async def test_after_a_crash_all_is_as_recorded(host: _Host, pid: int) -> None:
    async with host.agent() as endpoints:
        await attach(endpoints, pid, "8080:80", "80")
        before = endpoints.all
    assert host.recorded() == host.rules
    host.rules.clear()
    async with host.agent() as endpoints:
        assert endpoints.all == before
        assert host.rules == {"web": before[0].published}
        assert len(host.sockets.held) == 4
        with pytest.raises(ConflictError, match="is published for endpoint web"):
            await endpoints.publish("web", ports("8080:81"), LOCAL)


async def test_what_no_pass_can_bring_to_the_kernel_is_undone(host: _Host, pid: int) -> None:
    async with host.agent() as endpoints:
        host.failure = REFUSED
        with pytest.raises(KernelRefusedError):
            await attach(endpoints, pid, "8080:80")
        assert (endpoints.all, host.sockets.held) == ([], set())
        assert list(host.kernel.dump().links) == ["mnb1"]
        host.failure = None
        endpoint = await attach(endpoints, pid, "8080:80")
        held = set(host.sockets.held)
        host.failure = REFUSED
        with pytest.raises(KernelRefusedError):
            await endpoints.publish("web", ports("9000:90"), LOCAL)
        with pytest.raises(KernelRefusedError):
            await endpoints.unpublish("web", ["8080"])
        assert endpoints.all == [endpoint]
        assert host.sockets.held == held
        # A process can be taken off all the same.
        await endpoints.detach(pid, "local")
        assert (endpoints.all, host.sockets.held) == ([], set())


async def test_a_refused_port_leaves_nothing(host: _Host, pid: int) -> None:
    internal = replace(LOCAL, internal=True)
    physical = replace(
        LOCAL, mode=Mode.MACVLAN, parent="eth0",
        ranges=(AddressRange(LOCAL.subnets[0][8], LOCAL.subnets[0][9]),),
    )  # fmt: skip
    async with host.agent() as endpoints:
        for network, kind in ((internal, PolicyRefusedError), (physical, UsageError)):
            with pytest.raises(kind, match="publish"):
                await endpoints.attach(request(pid, "8080:80"), replace(READY, network=network))
        first = await attach(endpoints, pid)
        for network, kind in ((internal, PolicyRefusedError), (physical, UsageError)):
            with pytest.raises(kind, match="publish"):
                await endpoints.publish("web", ports("8080:80"), network)
        assert (host.sockets.held, endpoints.all) == (set(), [first])
        await endpoints.detach(pid, "local")
        second = await attach(endpoints, pid, "8080:80")
        assert second.addresses[0].ip == first.addresses[0].ip + 1  # of what failed nothing rests


async def test_the_port_leads_nowhere_once_the_process_has_ended(
    host: _Host, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host.agent() as endpoints:
        await attach(endpoints, process.pid, "8080:80")
        await endpoints.changed.wait()
        monkeypatch.setattr("meshnet_agent.endpoints.sandbox.find_process", lambda _: None)
        process.kill()
        with trio.fail_after(5):
            await endpoints.changed.wait()
        assert (endpoints.all, host.rules, host.sockets.held) == ([], {}, set())
