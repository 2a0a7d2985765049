"""The mesh that faults happen to: a lab, its networks and its endpoints.

A `Member` is one endpoint: what the mesh was asked for (host, network) and what it answered.  The
tests' own book of endpoints is here: what etcd, agents and kernels say is compared with it, and no
fault can touch it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.netns.mesh import attach, create_network, meshnet

if TYPE_CHECKING:
    from random import Random

    from meshnet.lab.host import LabContainer, LabHost
    from meshnet.lab.topology import Lab
    from tests.netns.mesh import Document

TTL_S = 2
"""Of the agents' leases: short, so that outliving one takes little time."""
AGENT_ARGS = ("--lease-ttl", str(TTL_S))
NETWORKS = {
    "red": ("--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48"),
    "blue": ("--subnet", "10.43.0.0/16"),
}
"""Networks of a fault mesh; no packet may get from one to the other."""


@dataclass(frozen=True, slots=True)
class Member:
    """One endpoint.

    Attributes:
        document: what ``attach`` printed.
    """

    host: str
    network: str
    container: LabContainer
    document: Document


@dataclass(slots=True)
class FaultMesh:
    """A running lab and what was put on it.

    Attributes:
        spared: the host whose agent no fault ends, so that one life lasts as long as the lab.
    """

    lab: Lab
    members: list[Member] = field(default_factory=list)
    spared: str | None = None

    def host_to_end(self, rng: Random) -> LabHost:
        """One whose agent, or all of it, a fault may end."""
        return rng.choice([host for host in self.lab.hosts if host.name != self.spared])

    def add(self, host: str, network: str) -> Member:
        """Attach a new container."""
        place = self.lab.host(host)
        container = place.spawn_container()
        member = Member(host, network, container, attach(container, place, network))
        self.members.append(member)
        return member

    def remove(self, member: Member) -> None:
        """End a container; its address is free again once its agent has seen that."""
        member.container.end()
        self.members.remove(member)

    def detach(self, member: Member) -> None:
        """Take a container's endpoint away, and end the container."""
        meshnet(self.lab.host(member.host), "detach", member.container.pid, "--net", member.network)
        self.remove(member)


def make_mesh(lab: Lab) -> FaultMesh:
    """Create the networks, and put an endpoint of each on every host of a lab."""
    mesh = FaultMesh(lab)
    for name, options in NETWORKS.items():
        create_network(lab, name, *options)
    for host in lab.hosts:
        for name in NETWORKS:
            mesh.add(host.name, name)
    return mesh
