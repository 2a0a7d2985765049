"""Other firewalls that start on a host beside the agent: opened, healed, closed again; or named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from meshnet.lab.poll import wait_until
from tests.bench.docker import open_docker
from tests.netns.mesh import BRIEFLY, address_of, attach, create_network, meshnet, ping, run_client
from tests.netns.talk import is_closed, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from meshnet.lab.host import LabContainer, LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
TABLES = ("iptables", "ip6tables")


def ufw(program: str) -> tuple[str, ...]:
    """What ufw makes of the table filter, where no rules are but the default ones (ufw-init)."""
    prefix = "ufw6" if program == "ip6tables" else "ufw"
    chains = [(hook, side) for hook in ("forward", "input") for side in ("before", "user")]
    return (
        *(f"-N {prefix}-{side}-{hook}" for hook, side in chains),
        *(f"-A {prefix}-before-{hook} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
          for hook in ("forward", "input")),
        # What etcd and neighbour discovery of the lab take, as an operator would have allowed it.
        f"-A {prefix}-before-input -i lo -j ACCEPT",
        f"-A {prefix}-before-input -p {'ipv6-icmp' if prefix == 'ufw6' else 'icmp'} -j ACCEPT",
        *(f"-A {prefix}-before-{hook} -j {prefix}-user-{hook}" for hook in ("forward", "input")),
        f"-A FORWARD -j {prefix}-before-forward",
        f"-A INPUT -j {prefix}-before-input",
        "-P FORWARD DROP",
        "-P INPUT DROP",
    )  # fmt: skip


class Mesh:
    """Two hosts with an endpoint each; other firewalls start on the first."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.host, self.peer = lab.hosts
        create_network(lab, "prod", "--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48")
        self.outside = lab.add_host("outside", agent=False)
        self.here: LabContainer = self.host.spawn_container()
        self.there: LabContainer = self.peer.spawn_container()
        attach(self.here, self.host, "prod", "--publish", "8080:80")
        self.remote: Any = attach(self.there, self.peer, "prod")

    def passes(self, *options: str) -> bool:
        """Whether packets go between hosts, by both IP versions, and out."""
        targets = (address_of(self.remote), address_of(self.remote, 6), self.lab.outside_ip)
        return all(ping(self.here, target, *options) for target in targets)

    def is_published(self) -> bool:
        """Whether a machine outside reaches the published port."""
        return not is_closed(self.outside, str(self.host.underlay_ip), 8080)

    def remove_network(self) -> None:
        """End the endpoints, and remove the network once etcd knows of that."""
        for container in (self.here, self.there):
            container.end()
        remove = ("network", "rm", "prod")
        wait_until(lambda: run_client(self.host, *remove).returncode == 0, 10, "it is removed")

    def notes(self) -> list[str]:
        found: list[str] = meshnet(self.host, "status")["notes"]
        return [note for note in found if "etcd" not in note]


def ours(host: LabHost) -> list[str]:
    """Our rules in the tables of iptables."""
    listings = [host.run([program, "-S"]).stdout for program in TABLES]
    return [line for text in listings for line in text.splitlines() if "meshnet" in line]


@pytest.fixture
def mesh(make_lab: MakeLab) -> Iterator[Mesh]:
    made = Mesh(make_lab(2))
    with serving((made.here, "web")):
        assert made.passes()
        assert made.is_published()
        yield made


def check_off_and_removal(mesh: Mesh, rules: list[str]) -> None:
    """Another agent finds our rules; one that is told so takes them back, and so does the end of
    the last network."""
    host = mesh.host
    host.stop_agent()
    assert ours(host) == rules
    host.start_agent()
    assert mesh.passes()
    host.stop_agent()
    host.start_agent(["--open-firewalls", "off"])
    wait_until(lambda: not ours(host), 10, "our rules are gone")
    wait_until(mesh.notes, 10, "what drops our packets is named")
    assert "chain ip filter FORWARD drops what this host forwards" in mesh.notes()[0]
    assert not mesh.passes(*BRIEFLY)
    host.stop_agent()
    host.start_agent()
    wait_until(lambda: ours(host) == rules, 10, "our rules are back")
    mesh.remove_network()
    wait_until(lambda: not ours(host), 10, "our rules are gone")
    assert mesh.notes() == []


def test_docker(mesh: Mesh, tmp_path: Path) -> None:
    host = mesh.host
    with open_docker(host, tmp_path / "docker"):
        wait_until(lambda: len(ours(host)) == 2, 10, "our rules")
        assert "-P FORWARD DROP" in host.run(["iptables", "-S"]).stdout
        rules = ours(host)
        wait_until(mesh.passes, 10, "packets between hosts")
        wait_until(mesh.is_published, 5, "the published port")
        assert mesh.notes() == []
        # Rules of the operator are heard before ours, and RETURN after them.
        host.run(["iptables", "-w", "-F", "DOCKER-USER"])
        for rule in ("-i eth9 -j DROP", "-j RETURN"):
            host.run(["iptables", "-w", "-A", "DOCKER-USER", *rule.split()])
        wait_until(lambda: ours(host) == rules, 10, "our rules are back")
        chain = host.run(["iptables", "-S", "DOCKER-USER"]).stdout.splitlines()
        assert [line.split()[-1] for line in chain[1:]] == ["DROP", "ACCEPT", "ACCEPT", "RETURN"]
    with open_docker(host, tmp_path / "again"):
        wait_until(mesh.passes, 10, "packets between hosts")
        assert ours(host) == rules
        check_off_and_removal(mesh, rules)


def test_ufw(mesh: Mesh) -> None:
    host = mesh.host
    for program in TABLES:
        for command in ufw(program):
            host.run([program, "-w", *command.split()])
    wait_until(mesh.passes, 10, "packets between hosts")
    wait_until(mesh.is_published, 5, "the published port")
    assert mesh.notes() == []
    rules = ours(host)
    assert len(rules) == 6
    # It reads its rules again.
    for program, prefix in (("iptables", "ufw"), ("ip6tables", "ufw6")):
        for hook in ("forward", "input"):
            host.run([program, "-w", "-F", f"{prefix}-user-{hook}"])
    wait_until(lambda: ours(host) == rules, 10, "our rules are back")
    wait_until(mesh.passes, 10, "packets between hosts")
    check_off_and_removal(mesh, rules)


def test_a_policy_without_a_place_for_us_is_named(mesh: Mesh) -> None:
    host = mesh.host
    chain = "inet mine forward"
    host.run(["nft", "table inet mine { chain forward { type filter hook forward priority 0; "
              "policy drop; }; }"])  # fmt: skip
    wait_until(mesh.notes, 10, "the chain is named")
    (note,) = mesh.notes()
    assert f"chain {chain} drops what this host forwards" in note
    assert not mesh.passes(*BRIEFLY)
    # What it says to do helps.
    for side in ("iifname", "oifname"):
        host.run(["nft", f'add rule {chain} {side} "mnb*" accept'])
    wait_until(lambda: not mesh.notes(), 10, "the note is gone")
    assert mesh.passes()
    # So does the table's end.
    host.run(["nft", f"flush chain {chain}"])
    wait_until(mesh.notes, 10, "the chain is named")
    host.run(["nft", "delete table inet mine"])
    wait_until(lambda: not mesh.notes(), 10, "the note is gone")
