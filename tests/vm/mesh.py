"""Machines with agents: the verbs that tests of the product have on labs, too."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

from meshnet.lab.poll import wait_until
from tests.vm.switch import GATEWAY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.lab.etcd import EtcdServer
    from tests.vm.machine import Machine
    from tests.vm.switch import Switch

_READY_S = 90
_CONFIG = f'etcd = ["http://{GATEWAY}:2379"]\nunderlay-dev = "eth0"\n'
_NOT_OURS = re.compile(
    # Of the machine itself: slow, emulated, and without what real ones have.
    r"clocksource|hrtimer|TSC|RETBleed|Spectre|MDS|SRBDS|rcu:|systemd-journald|workqueue|"
    r"process '.*' started with executable stack|Time jumped|random: crng|tsc:|APIC|PNP0A03|"
    r"device-mapper: core|EXT4-fs .*recovery|orphan cleanup"
)
"""What the kernel warns of on a machine that does not run the product, too."""


class Mesh:
    """Some machines, the etcd that their agents share, and what is between them.

    Attributes:
        allowed: patterns of warnings of agents that a test expects.
    """

    def __init__(self, machines: Sequence[Machine], etcd: EtcdServer, switch: Switch) -> None:
        self.machines = machines
        self.etcd = etcd
        self.switch = switch
        self.allowed: list[str] = []
        for machine in machines:
            machine.run("dmesg --clear")

    def start_agents(self, *, config: str = "") -> None:
        """Configure and start the agent of every machine, and wait until it is ready."""
        for machine in self.machines:
            machine.write("/etc/meshnet/agent.toml", _CONFIG + config)
            machine.run("systemctl enable --now --no-block meshnet-agent", timeout_s=60)
        for machine in self.machines:
            wait_active(machine)

    def create(self, name: str, *options: str) -> dict[str, Any]:
        """Create a network, and wait until it is in sync with every machine."""
        created: dict[str, Any] = meshnet(self.machines[0], "network", "create", name, *options)
        self.wait_in_sync()
        return created

    def wait_in_sync(self, deadline_s: float = 60) -> None:
        """Wait until every network of every machine is in sync, with all the others as peers."""
        for machine in self.machines:

            def in_sync(machine: Machine = machine) -> bool:
                networks = meshnet(machine, "status")["networks"]
                others = len(self.machines) - 1
                return bool(networks) and all(
                    n["in_sync"] and n["peers"] in (0, others) for n in networks
                )

            wait_until(in_sync, deadline_s, f"{machine.name} in sync")

    def check_quiet(self) -> None:
        """Fail if an agent or a kernel has warned of something.

        Raises:
            AssertionError: with what it said.
        """
        complaints = []
        for machine in self.machines:
            said = machine.run("journalctl -b --no-pager -o cat -u meshnet-agent").stdout
            complaints += [
                f"{machine.name}: {line}"
                for line in said.splitlines()
                if re.search(r"\[(warning|error|critical)|Traceback", line)
                and not any(re.search(pattern, line) for pattern in self.allowed)
            ]
            told = machine.run("dmesg --level warn,err,crit,alert,emerg").stdout
            complaints += [
                f"{machine.name}: kernel: {line}"
                for line in told.splitlines()
                if not _NOT_OURS.search(line)
            ]
        assert not complaints, "\n".join(complaints)


def wait_active(machine: Machine) -> None:
    """Wait until a machine's agent is ready.

    Raises:
        TimeoutError: it is not; the message has the end of its journal.
    """

    def active() -> bool:
        done = machine.run("systemctl is-active meshnet-agent", check=False)
        return done.stdout.strip() == "active"

    try:
        wait_until(active, _READY_S, f"the agent of {machine.name} active")
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {machine.journal_tail()}") from error


def meshnet(machine: Machine, *arguments: object, status: int = 0) -> Any:  # noqa: ANN401
    """Run the client on a machine; returns its JSON document, or its error line."""
    command = shlex.join(["meshnet", *map(str, arguments), "--json"])
    done = machine.run(command, check=False)
    assert done.returncode == status, f"{command}: {done.returncode}: {done.stderr}{done.stdout}"
    return json.loads(done.stdout) if status == 0 else done.stderr.strip()


def attach(machine: Machine, network: str, *options: object) -> dict[str, Any]:
    """Attach a new process; returns the endpoint's document."""
    pid = machine.spawn("exec sleep infinity")
    document: dict[str, Any] = meshnet(machine, "attach", pid, "--net", network, *options)
    return document


def inside(machine: Machine, endpoint: dict[str, Any], command: str, **options: Any) -> str:  # noqa: ANN401
    """Run a command in an endpoint's namespace; returns what it printed."""
    entered = f"nsenter --net=/proc/{endpoint['pid']}/ns/net {command}"
    return machine.run(entered, **options).stdout


def address_of(endpoint: dict[str, Any], version: int = 4) -> str:
    """An endpoint's address, without its prefix length."""
    texts = (endpoint["address"], endpoint.get("address6", ""))
    (found,) = (t.split("/")[0] for t in texts if t and (":" in t) == (version == 6))
    return str(found)
