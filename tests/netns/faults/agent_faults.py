"""Faults of the agent's process: they must not cost a packet."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from meshnet.store.saved import decode_saved
from meshnet.unix_http import HttpConnection
from tests.netns.cgroups import removed
from tests.netns.faults.fault import CutsHosts, Injected
from tests.netns.faults.mesh import TTL_S
from tests.netns.mesh import meshnet

if TYPE_CHECKING:
    from random import Random

    from meshnet.lab.host import LabHost
    from tests.netns.faults.mesh import FaultMesh

_CGROUPS = Path("/sys/fs/cgroup")
_SAVED_S = 30.0
"""Within which the agent has on its disk what it knows."""


def revive(host: LabHost) -> None:
    """Start a host's agent if it does not run: what systemd does."""
    if not host.is_agent_running():
        host.start_agent()


@dataclass(frozen=True, slots=True)
class _AgentEnded:
    """SIGKILL or SIGTERM, and a start sooner or later."""

    name: str
    in_order: bool

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """End one."""
        host = mesh.host_to_end(rng)
        if self.in_order:
            status = host.stop_agent()
            assert status == 0, f"{host.name}: the agent ended with {status}"
        else:
            host.kill_agent()
        return Injected(
            f"{self.name} on {host.name}",
            host.start_agent,
            rng.uniform(0, 2 * TTL_S),
            says="stopping" if self.in_order else "ready",
        )


KILLED = _AgentEnded("agent killed", in_order=False)
STOPPED = _AgentEnded("agent stopped", in_order=True)


@dataclass(frozen=True, slots=True)
class AgentFrozen:
    """SIGSTOP for longer than the lease lasts."""

    name: str = "agent frozen"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Freeze one."""
        host = rng.choice(mesh.lab.hosts)
        pid = host.agent_pid
        os.kill(pid, signal.SIGSTOP)
        return Injected(
            f"agent of {host.name} frozen",
            lambda: os.kill(pid, signal.SIGCONT),
            rng.uniform(1.5, 3) * TTL_S,
            says="lease ran out",
        )


@dataclass(frozen=True, slots=True)
class SecondAgent:
    """Another machine's agent claims to be a host that is there; it is refused.

    It has a state directory of its own, or a copy of that host's, as a cloned machine has.
    """

    name: str = "two agents with one id"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Start one on a machine that is not of the mesh."""
        lab = mesh.lab
        host = rng.choice(lab.hosts)
        other = lab.add_host("double", agent=False)
        whose = f"held by an agent at underlay address {host.underlay_ip}"
        if rng.randrange(2):
            unfinished = shutil.ignore_patterns("*.new")  # which may be gone meanwhile
            shutil.copytree(host.state_dir, other.state_dir, dirs_exist_ok=True, ignore=unfinished)
            whose += " with this state directory, or a copy of it"
        try:
            command = ["python", "-m", "meshnet_agent", "--host-id", host.name]
            command += ["--etcd", lab.etcd_url, "--underlay-ip", str(other.underlay_ip)]
            command += ["--run-dir", str(other.run_dir), "--state-dir", str(other.state_dir)]
            done = other.run(command, check=False)
        except subprocess.TimeoutExpired:
            # On a busy machine a lease may run out by itself; then it is nobody's host to take.
            assert "lease ran out" in host.log_path.read_text()
            return Injected(
                f"a second agent was {host.name}",
                partial(revive, host),
                cuts=CutsHosts(frozenset({host.name})),
            )
        finally:
            lab.remove_host(other.name)
        assert done.returncode == 5, f"{done.returncode}: {done.stderr}"
        assert whose in done.stderr, done.stderr
        return Injected(f"a second agent claimed to be {host.name}", lambda: None)


@dataclass(frozen=True, slots=True)
class OutOfDescriptors:
    """The agent can open hardly any more files; it reports what it cannot do, and goes on."""

    name: str = "out of descriptors"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Lower the limit of a running agent to little more than it uses."""
        host = rng.choice(mesh.lab.hosts)
        pid = host.agent_pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1
        most = used + rng.randrange(3)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, before[1]))
        container = host.spawn_container()
        try:
            # Whatever the outcome, the client gets an answer and the agent lives.
            network = rng.choice(sorted({member.network for member in mesh.members}))
            command = ["meshnet", "attach", str(container.pid), "--net", network]
            done = host.run(command, check=False, timeout=90)
        finally:
            container.end()
        assert done.returncode in (0, 5, 7), f"{done.returncode}: {done.stderr}"

        def heal() -> None:
            if host.is_agent_running():
                resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            revive(host)

        what = f"agent of {host.name} at {most} descriptors, {used} used"
        return Injected(what, heal, rng.uniform(0, TTL_S))


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """The kernel kills the agent because its cgroup is full; it is started again without."""

    name: str = "out of memory"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Put an agent in a cgroup with next to no memory, and take that."""
        host = mesh.host_to_end(rng)
        pid = host.agent_pid
        cgroup = _make_cgroup(f"{host.netns}-oom")
        try:
            (cgroup / "cgroup.procs").write_text(str(pid))
            take_memory(host)
            status = host.stop_agent()
            assert status in (None, -signal.SIGKILL), f"ended with {status}"
        finally:
            host.kill_agent()
            wait_until(partial(removed, cgroup), 10, f"{cgroup} is empty")
        return Injected(f"agent of {host.name} out of memory", host.start_agent, says="ready")


def take_memory(host: LabHost) -> None:
    """Have an agent hold more and more, in requests that do not end, until the kernel kills it."""
    with contextlib.ExitStack() as held:

        def killed() -> bool:
            with contextlib.suppress(OSError):
                request = held.enter_context(HttpConnection(str(host.socket_path), 5))
                request.begin_upload("POST", "/v1/networks")
                request.write(bytes(60_000))
            return not host.is_agent_running()

        wait_until(killed, 30, f"the agent of {host.name} is out of memory")


def _make_cgroup(name: str) -> Path:
    """A memory cgroup, of version 2 or 1, with room for some pages."""
    unified = _CGROUPS / "cgroup.controllers"
    directory = _CGROUPS / name if unified.exists() else _CGROUPS / "memory" / name
    directory.mkdir()
    limit = "memory.max" if unified.exists() else "memory.limit_in_bytes"
    (directory / limit).write_text(str(64 << 10))
    return directory


@dataclass(frozen=True, slots=True)
class Reboot:
    """A power cut: all kernel state is gone, and all containers; the disk is as it was."""

    name: str = "machine rebooted"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Cut the power of one host."""
        lab = mesh.lab
        name = mesh.host_to_end(rng).name
        networks = [member.network for member in mesh.members if member.host == name]
        lab.remove_host(name, keep_state=True)
        mesh.members[:] = [member for member in mesh.members if member.host != name]

        def heal() -> None:
            host = lab.add_host(name)
            assert meshnet(host, "endpoint", "ls") == [] or all(
                document["host"] != name for document in meshnet(host, "endpoint", "ls")
            )
            for network in networks:
                mesh.add(name, network)

        return Injected(
            f"{name} rebooted",
            heal,
            rng.uniform(0, 2 * TTL_S),
            CutsHosts(frozenset({name})),
            says="endpoint freed" if networks else "",
        )


@dataclass(frozen=True, slots=True)
class RebootInSilence:
    """A power cut while etcd is frozen: the host starts from its disk, and is whole."""

    name: str = "machine rebooted while etcd is silent"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Freeze etcd, cut the power of one host, and start it."""
        lab = mesh.lab
        host = mesh.host_to_end(rng)
        name = host.name
        networks = [member.network for member in mesh.members if member.host == name]
        revision = meshnet(host, "status")["store"]["revision"]
        file = host.state_dir / "snapshot.json"
        wait_until(
            lambda: file.exists() and decode_saved(file.read_bytes()).mirror.revision >= revision,
            *(_SAVED_S, f"{name} has saved what it knows"),
        )
        etcds = list(lab.etcds.values())
        for etcd in etcds:
            etcd.pause()
        try:
            lab.remove_host(name, keep_state=True)
            mesh.members[:] = [member for member in mesh.members if member.host != name]
            lab.add_host(name)
            for network in networks:
                mesh.add(name, network)
        except BaseException:
            for etcd in etcds:
                etcd.resume()
            raise

        def heal() -> None:
            for etcd in etcds:
                etcd.resume()
            for etcd in etcds:
                etcd.wait_healthy()

        return Injected(
            f"{name} rebooted while etcd is frozen",
            heal,
            rng.uniform(0, 2 * TTL_S),
            CutsHosts(frozenset({name})),
            whole_within_s=25.0,
            says="started from disk",
        )
