"""One real agent in a simulated mesh: a lab of one host, and what can be asked of the agent.

The agent is a process of its own with its own network namespace, kernel devices and etcd; what it
did is read from its log, its ``status`` and /proc.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from meshnet.cli.client import Client
from meshnet.errors import AgentUnreachableError, StoreUnavailableError
from meshnet.lab.netns import ETCD, netns_name, netns_path
from meshnet.lab.poll import wait_until
from meshnet.lab.topology import Lab
from meshnet.lab.underlay import ETCD_PORT
from meshnet.model import HostId
from tests.bench.exact import differences
from tests.bench.gateway import Gateway
from tests.bench.notifications import Watch
from tests.bench.simulated import NAME, TUNNEL, VNI, SimulatedMesh

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meshnet.lab.host import LabHost

Document = dict[str, Any]

_counter = itertools.count()
_TICKS = os.sysconf("SC_CLK_TCK")
START_DEADLINE_S = 120.0
SYNC_DEADLINE_S = 120.0


class Event(NamedTuple):
    """A line of the agent's log.

    Attributes:
        at: seconds since the epoch.
    """

    name: str
    at: float
    fields: Document


class AgentView:
    """What can be asked of a host's agent."""

    def __init__(self, host: LabHost) -> None:
        self.host = host
        self.client = Client(str(host.socket_path))

    def status(self) -> Document:
        """Its ``status``."""
        document: Document = self.client.get("status")
        return document

    def wait_in_sync(
        self, peers: int, revision: int = 0, deadline_s: float = SYNC_DEADLINE_S
    ) -> Document:
        """Wait until it is in sync with so many peers and a revision of the store.

        Raises:
            TimeoutError: it is not in time, or not with as many peers.
        """

        def in_sync() -> Document | None:
            try:
                document = self.status()
            except (AgentUnreachableError, StoreUnavailableError):
                if not self.host.is_agent_running():
                    raise
                return None
            network = next((n for n in document["networks"] if n["name"] == NAME), None)
            good = (
                network is not None
                and network["in_sync"]
                and network["peers"] == peers
                and document["store"]["revision"] >= revision
            )
            return document if good else None

        found = wait_until(in_sync, deadline_s, f"{self.host.name} in sync with {peers:,} peers")
        assert found is not None  # wait_until returns only what is true
        return found

    def cpu_s(self) -> float:
        """CPU seconds it has used since it started, in steps of 10 ms."""
        stat = Path(f"/proc/{self.host.agent_pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS  # utime, stime: proc(5)

    def memory_mib(self) -> tuple[float, float]:
        """Its resident set, now and at most."""
        lines = Path(f"/proc/{self.host.agent_pid}/status").read_text().splitlines()
        kib = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
        return int(kib["VmRSS"]) / 1024, int(kib["VmHWM"]) / 1024

    def log_size(self) -> int:
        """Where the log ends now."""
        return self.host.log_path.stat().st_size if self.host.log_path.exists() else 0

    def events(self, offset: int = 0) -> list[Event]:
        """The log's lines from an offset on; the agent must log JSON."""
        with self.host.log_path.open("rb") as file:
            file.seek(offset)
            lines = file.read().decode(errors="replace").splitlines()
        found = []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError):
                fields = json.loads(line)
                at = datetime.fromisoformat(fields["timestamp"]).timestamp()
                found.append(Event(fields["event"], at, fields))
        return found


class Site(AgentView):
    """A lab of one host whose etcd has a simulated mesh; no agent runs yet.

    Attributes:
        mesh: its hosts; empty at first, the network is there.
    """

    def __init__(self, lab: Lab, gateway: Gateway, mesh: SimulatedMesh) -> None:
        super().__init__(lab.hosts[0])
        self.lab = lab
        self.gateway = gateway
        self.mesh = mesh

    def start_agent(self, *options: str) -> tuple[Document, float]:
        """Start the agent and wait until it is in sync; returns status, and seconds that took."""
        started = time.monotonic()
        self.host.start_agent(["--log-format", "json", *options], wait=False)
        document = self.wait_in_sync(len(self.mesh.hosts), deadline_s=START_DEADLINE_S)
        return document, time.monotonic() - started

    def settle(self, deadline_s: float = SYNC_DEADLINE_S) -> Document:
        """Wait until the agent has done all that the mesh asks for."""
        return self.wait_in_sync(len(self.mesh.hosts), self.gateway.revision, deadline_s)

    def watch(self) -> Watch:
        """Listen to the kernel of the agent's namespace."""
        return Watch({self.host.name: self.host.netns_path})

    def differences(self) -> list[str]:
        """How the kernel differs from what the mesh asks for (`tests.bench.exact`)."""
        return differences(self.host, self.mesh)

    def provoke_pass(self) -> None:
        """Make a route that the agent has to look at and leave as it is."""
        prefix = f"198.51.100.{next(_counter) % 256}/32"
        self.host.run(["ip", "route", "replace", prefix, "dev", TUNNEL])

    def empty_kernel(self) -> None:
        """Remove all that an agent left; none may be running."""
        commands = (
            f"ip link del {TUNNEL}",
            f"ip link del mnb{VNI}",
            "ip nexthop flush proto 109",
            "ip route flush proto 109",
            "nft delete table inet meshnet",
        )
        for command in commands:
            self.host.run(command.split(), check=False, timeout=SYNC_DEADLINE_S)


@contextlib.contextmanager
def site(*, dual_stack: bool = False) -> Iterator[Site]:
    """A `Site` of a name that nobody else uses; nothing is left of it."""
    name = f"bench{os.getpid()}x{next(_counter)}"
    with (
        Lab(name, hosts=1, start_agents=False) as lab,
        site_in(lab, dual_stack=dual_stack) as place,
    ):
        yield place


@contextlib.contextmanager
def site_in(lab: Lab, *, dual_stack: bool = False) -> Iterator[Site]:
    """A `Site` in a lab of one host without an agent."""
    with connect(lab) as gateway:
        mesh = SimulatedMesh(gateway, dual_stack=dual_stack)
        mesh.create_network()
        # Otherwise it takes a random one, which may be one that a simulated host will have.
        mesh.reserve(HostId(lab.hosts[0].name), 0)
        yield Site(lab, gateway, mesh)


def connect(lab: Lab) -> Gateway:
    """A connection to a lab's etcd; the caller closes it."""
    address = (str(lab.underlay.etcd_ip()), ETCD_PORT)
    return Gateway(address, netns_path(netns_name(lab.name, ETCD)))
