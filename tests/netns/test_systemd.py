"""The units under a running systemd: it starts and restarts the agent, and loses no packet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.containers import make_rootfs
from tests.netns.mesh import address_of, attach, create_network, lossless, ping, wait_in_sync
from tests.netns.systemd_unit.settings import CONTAINERS, UNIT, read_settings
from tests.netns.systemd_unit.systemd import Systemd

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.host import LabContainer
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
AGENT = "meshnet-agent.service"


class Machine:
    """A host whose agent is a service of a systemd, and a container of another host.

    Attributes:
        there: attached to network ``prod`` on a host with an agent of the lab's.
    """

    def __init__(self, make_lab: MakeLab, settings: str = "", *drop_ins: Path) -> None:
        self.lab = make_lab(1)
        (h1,) = self.lab.hosts
        create_network(self.lab, "prod", "--subnet", "10.42.0.0/16")
        self.there: LabContainer = h1.spawn_container()
        self.there_address = address_of(attach(self.there, h1, "prod"))
        files = {
            f"systemd/system/{AGENT}": UNIT.read_text(),
            "meshnet/agent.env": "MESHNET_CONFIG=/etc/meshnet/agent.toml\n",
            "meshnet/agent.toml": settings
            + f'etcd = ["{self.lab.etcd_url}"]\nunderlay-dev = "eth0"\n',
        }
        files |= {f"systemd/system/{AGENT}.d/{file.name}": file.read_text() for file in drop_ins}
        self.systemd = Systemd(self.lab.add_host("h2", agent=False), files)

    def meshnet(self, *argv: object) -> Any:  # noqa: ANN401
        """The JSON of a client among systemd's processes."""
        return json.loads(self.systemd.run("meshnet", *map(str, argv), "--json").stdout)

    def systemctl(self, *argv: str) -> None:
        self.systemd.run("systemctl", *argv)

    @property
    def main_pid(self) -> int:
        """The agent's process as systemd counts; 0: there is none."""
        return int(self.systemd.show(AGENT, "MainPID"))

    def attach(self, network: str) -> str:
        """Start a service in a network namespace of its own, and attach it."""
        unit = f"service-in-{network}"
        properties = ("--property=Type=exec", "--property=PrivateNetwork=yes")
        self.systemd.run("systemd-run", "--quiet", "--unit", unit, *properties, "sleep", "999")
        pid = self.systemd.show(unit, "MainPID")
        return address_of(self.meshnet("attach", pid, "--net", network))

    def find(self, pattern: str) -> list[str]:
        """Processes whose command line matches."""
        return self.systemd.run("pgrep", "-f", pattern, check=False).stdout.split()


def test_the_unit(make_lab: MakeLab) -> None:
    machine = Machine(make_lab)
    with machine.systemd as systemd:
        machine.systemctl("start", AGENT)  # returns when the agent has said that it is ready
        assert systemd.show(AGENT, "ActiveState") == "active"
        here = machine.attach("prod")
        assert ping(machine.there, here)
        check_confined(machine)
        check_vtep(machine)
        with lossless(machine.there, here):
            killed = machine.main_pid
            systemd.run("kill", "-9", str(killed))
            wait_until(lambda: machine.main_pid not in (0, killed), 20, "it is started again")
            wait_until(
                lambda: systemd.show(AGENT, "ActiveState") == "active", 20, "it is ready again"
            )
            assert machine.meshnet("status")["store"]["connected"]
            machine.systemctl("restart", AGENT)
            machine.systemctl("stop", AGENT)
            assert systemd.run("test", "-S", "/run/meshnet/agent.sock", check=False).returncode
            machine.systemctl("start", AGENT)
        ours = [e for e in machine.meshnet("endpoint", "ls") if e["host"] == "h2"]
        assert here in map(address_of, ours)


def check_confined(machine: Machine) -> None:
    """The kernel has what the unit says."""
    text = machine.systemd.run("cat", f"/proc/{machine.main_pid}/status").stdout
    fields = (line.partition(":") for line in text.splitlines())
    status = {name: value.strip() for name, _, value in fields}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert int(status["CapEff"], 16).bit_count() == len(read_settings(UNIT).capabilities or ())


def check_vtep(machine: Machine) -> None:
    """DevicePolicy=closed leaves it the TUN device, and KillMode=process the VTEP its life."""
    machine.meshnet("network", "create", "tun", "--mode", "udp", "--subnet", "10.43.0.0/16")
    here = machine.attach("tun")
    h1 = machine.lab.hosts[0]
    wait_in_sync(h1, peers=1)
    there = h1.spawn_container()
    attach(there, h1, "tun")
    assert ping(there, here)
    before = machine.find("meshnet.vtep")
    assert before
    with lossless(there, here):
        machine.systemctl("restart", AGENT)
    assert machine.find("meshnet.vtep") == before


@pytest.mark.parametrize("driver", ["cgroupfs", "systemd"])
def test_containers_under_it(make_lab: MakeLab, driver: str) -> None:
    machine = Machine(make_lab, f'cgroup-driver = "{driver}"\n', CONTAINERS)
    with machine.systemd as systemd:
        machine.systemctl("start", AGENT)
        root = "/var/lib/meshnet/tree"
        seen_from_here = Path(f"/proc/{systemd.pid}/root{root}")
        seen_from_here.mkdir()
        make_rootfs(seen_from_here)
        run = ["meshnet", "run", "--net", "prod", "--rootfs", root]
        argv = [*run, "--rm", "ping", "-c2", machine.there_address]
        assert " 0% packet loss" in systemd.run(*argv).stdout
        systemd.run(*run, "--detach", "--name", "web", "--pids-limit", "50", "sleep", "999")
        (container,) = machine.meshnet("ps")
        scope = f"meshnet-{container['id']}.scope"
        groups = systemd.run("cat", f"/proc/{container['pid']}/cgroup").stdout
        assert (scope in groups) is (driver == "systemd")
        assert systemd.show(scope, "ActiveState") == (
            "active" if driver == "systemd" else "inactive"
        )
        (endpoint,) = [e for e in machine.meshnet("endpoint", "ls") if e["host"] == "h2"]
        with lossless(machine.there, address_of(endpoint)):
            machine.systemctl("restart", AGENT)
        assert [c["state"] for c in machine.meshnet("ps")] == ["running"]
        machine.systemctl("stop", AGENT)
        assert ping(machine.there, address_of(endpoint))
        machine.systemctl("start", AGENT)
        systemd.run("meshnet", "rm", "--force", "web")
        assert systemd.show(scope, "ActiveState") == "inactive"
