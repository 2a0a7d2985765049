"""An ordinary day of a mesh: endpoints, networks and hosts come and go."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from tests.netns.faults.invariants import wait_whole
from tests.netns.mesh import create_network, meshnet

if TYPE_CHECKING:
    from random import Random

    from meshnet.lab.host import LabHost
    from tests.netns.faults.mesh import Member
    from tests.netns.faults.stage import Stage

_NETWORK = "green"
_MODES = ("vxlan", "udp")
_WHOLE_S = 20.0


def change_endpoints(stage: Stage, rng: Random) -> str:
    """One endpoint goes, another comes."""
    gone = rng.choice(stage.mesh.members)
    _take_away(stage, gone, rng)
    host = rng.choice(stage.lab.hosts).name
    come = stage.mesh.add(host, gone.network)
    _settle(stage)
    return (
        f"{gone.host}/{gone.network} {gone.document['address']} became {come.document['address']}"
    )


def change_networks(stage: Stage, rng: Random) -> str:
    """A network comes, with endpoints on all hosts, and goes again."""
    mode = rng.choice(_MODES)
    create_network(stage.lab, _NETWORK, "--subnet", "10.44.0.0/16", "--mode", mode)
    members = [stage.mesh.add(host.name, _NETWORK) for host in stage.lab.hosts]
    if mode == "vxlan":
        _settle(stage)
    else:
        stage.settle()  # what such a network is in the kernels is not compared
    for member in members:
        _take_away(stage, member, rng)
    host = rng.choice(stage.lab.hosts)
    command = ["meshnet", "network", "rm", _NETWORK]
    # It is refused until etcd has it that no host has endpoints of it.
    wait_until(
        lambda: host.run(command, check=False).returncode == 0, _WHOLE_S, f"{_NETWORK} is removed"
    )
    _settle(stage)
    return f"network {_NETWORK} of mode {mode} came and went"


def change_hosts(stage: Stage, rng: Random) -> str:
    """A host joins, with an endpoint of each network, and leaves for good."""
    lab = stage.lab
    networks = sorted({member.network for member in stage.mesh.members})
    host = lab.add_host(f"h{len(lab.hosts) + 1}")
    # It is ready when it knows the networks; whether the others know it is for `_settle`.
    members = [stage.mesh.add(host.name, network) for network in networks]
    _settle(stage)
    for member in members:
        _take_away(stage, member, rng)
    host.stop_agent()
    lab.remove_host(host.name)
    peer = rng.choice(lab.hosts)
    wait_until(partial(_is_dead, peer, host.name), _WHOLE_S, f"{host.name} is seen dead")
    meshnet(peer, "host", "rm", host.name)
    _settle(stage)
    return f"{host.name} joined and left"


KINDS = {
    "endpoints": change_endpoints,
    "networks": change_networks,
    "hosts": change_hosts,
}


def _is_dead(peer: LabHost, name: str) -> bool:
    return any(each["id"] == name and not each["alive"] for each in meshnet(peer, "hosts"))


def _take_away(stage: Stage, member: Member, rng: Random) -> None:
    """End an endpoint in one of the two ways."""
    stage.traffic.leave(member)
    if rng.randrange(2):
        stage.mesh.detach(member)
    else:
        stage.mesh.remove(member)


def _settle(stage: Stage) -> None:
    stage.traffic.follow()
    wait_whole(stage.mesh, _WHOLE_S)
    stage.settle()
