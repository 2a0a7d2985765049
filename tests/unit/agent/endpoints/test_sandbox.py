"""Sandboxes of processes: opened, known again, inherited, and watched for their end."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from meshnet.errors import NotFoundError, PolicyRefusedError
from meshnet.kernel.fakes.kernel import MemoryKernel
from meshnet.kernel.fakes.wiring import MemoryWiring
from meshnet.kernel.netns import own_netns
from meshnet.sandbox import ProcessSandbox
from meshnet_agent.endpoints import sandbox as module
from meshnet_agent.endpoints.sandbox import Sandboxes, open_sandbox, reopen, select_of_process
from tests.unit.mesh import InlineWorker
from tests.values import make_endpoint, underlay_ip

if TYPE_CHECKING:
    import subprocess

    from meshnet.sandbox import NetnsId

LINK = "mne0123456789ab"


@pytest.fixture
def sandboxes() -> Sandboxes:
    return Sandboxes(InlineWorker(MemoryWiring(MemoryKernel(underlay_ip(1)))))


def test_the_hosts_own_namespace_is_refused(process: subprocess.Popen[bytes]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PolicyRefusedError, match="this host's own network namespace"):
        open_sandbox(process.pid)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("elsewhere")
def test_a_process_that_has_ended(process: subprocess.Popen[bytes]) -> None:
    with open_sandbox(process.pid) as opened:
        value = opened.value
    assert value.netns == own_netns()
    process.kill()
    process.wait()
    with pytest.raises(NotFoundError, match=f"process {process.pid} does not exist"):
        open_sandbox(process.pid)
    with pytest.raises(NotFoundError, match=f"process {process.pid} does not exist"):
        reopen(value)


@pytest.mark.usefixtures("elsewhere")
def test_another_process_of_the_same_pid_is_another_sandbox(
    process: subprocess.Popen[bytes],
) -> None:
    with open_sandbox(process.pid) as opened:
        value = opened.value
    assert isinstance(value, ProcessSandbox)
    reopen(value).close()
    before = len(os.listdir("/proc/self/fd"))
    elsewhere = value.netns._replace(inode=1)
    for other in (replace(value, pid_start_ticks=1), replace(value, netns=elsewhere)):
        with pytest.raises(NotFoundError, match="is not the one that was attached"):
            reopen(other)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("elsewhere")
async def test_its_end_is_told_also_after_it_was_closed(process: subprocess.Popen[bytes]) -> None:
    with open_sandbox(process.pid) as opened:
        end = opened.end()
    assert end is not None
    with trio.move_on_after(0.05) as waiting:
        await end.wait()
    assert waiting.cancelled_caught
    process.kill()
    with trio.fail_after(5):
        await end.wait()
    end.close()


@pytest.mark.usefixtures("elsewhere")
async def test_an_heir_is_found_while_there_is_a_link(
    process: subprocess.Popen[bytes], sandboxes: Sandboxes
) -> None:
    ended = ProcessSandbox(pid=process.pid, pid_start_ticks=1, netns=own_netns())
    endpoint = replace(make_endpoint(), sandbox=ended)
    assert await sandboxes.find(endpoint, {"mne000000000000"}) is None
    found = await sandboxes.find(endpoint, {LINK})
    assert found is not None
    with found:
        assert found.value.netns == ended.netns
        assert found.value != ended
    # A macvlan shows in the namespace alone: without one it is another that got the inode.
    assert await sandboxes.find(replace(endpoint, parent="eth0"), {LINK}) is None


async def test_nobody_inherits_a_namespace_without_processes(
    process: subprocess.Popen[bytes], sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.kill()
    process.wait()
    looked_for: list[NetnsId] = []

    def find_process(netns: NetnsId) -> int | None:
        looked_for.append(netns)
        return process.pid if len(looked_for) == 1 else None  # it ends before it is opened

    monkeypatch.setattr(module, "find_process", find_process)
    endpoint = make_endpoint()
    assert await sandboxes.find_heir(endpoint) is None
    assert looked_for == [endpoint.sandbox.netns] * 2


def test_endpoints_of_a_process(process: subprocess.Popen[bytes]) -> None:
    """When a process has ended, its endpoints are those that were attached by its pid."""
    own = ProcessSandbox(pid=1, pid_start_ticks=1, netns=own_netns())
    gone = replace(own, pid=process.pid, netns=own.netns._replace(inode=1))
    here, there = (replace(make_endpoint(), sandbox=each) for each in (own, gone))
    assert select_of_process([here, there], process.pid) == [here]
    process.kill()
    process.wait()
    assert select_of_process([here, there], process.pid) == [there]
