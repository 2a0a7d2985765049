"""Faults of the kernel's state: somebody removes, changes or duplicates our objects.

The agent hears of it and repairs it, long before its next resync.  What the object carries is
cut until then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import TYPE_CHECKING

from tests.netns.faults.fault import Injected, cuts_nothing
from tests.netns.mesh import meshnet

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

    from tests.netns.faults.mesh import FaultMesh, Member

_SECONDS = 5.0
"""In which all is whole again; `docs/architecture.md` promises it by event."""


@dataclass(frozen=True, slots=True)
class _Damage:
    """One command, and what it cuts: ``peer`` (one peer's subnet of one network), ``overlay`` (the
    network between this host and all others), ``network`` (all of it on this host), ``member`` (one
    endpoint) or ``nothing``.  `opens`: it takes away what keeps networks apart."""

    command: str
    cuts: str
    opens: bool = False


_REMOVED = (
    _Damage("ip route del {subnet}", "peer"),
    _Damage("ip neigh del {vtep} dev {vxlan}", "peer"),
    _Damage("bridge fdb del {mac} dev {vxlan} dst {underlay} self", "peer"),
    _Damage("ip nexthop del id {nexthop}", "peer"),
    _Damage("ip nexthop flush proto 109", "host"),
    _Damage("ip link del {vxlan}", "overlay"),
    _Damage("ip link del {bridge}", "network"),
    _Damage("ip addr del {gateway} dev {bridge}", "network"),
    _Damage("ip link del {link}", "member"),
    _Damage("ip link set {link} nomaster", "member"),
    _Damage("nft delete table inet meshnet", "nothing", opens=True),
    _Damage("nft delete table bridge meshnet", "nothing"),
    _Damage("nft flush ruleset", "nothing", opens=True),
)
_CHANGED = (
    _Damage("ip route replace blackhole {subnet} proto 109", "peer"),
    _Damage("ip neigh replace {vtep} lladdr 02:00:00:00:00:09 dev {vxlan} nud permanent", "peer"),
    _Damage("bridge fdb replace {mac} dev {vxlan} dst 10.255.99.99 self", "peer"),
    _Damage("ip link set {vxlan} down", "overlay"),
    _Damage("ip link set {vxlan} address 02:00:00:00:00:01", "overlay"),
    _Damage("ip link set {bridge} mtu 1300", "network"),
    _Damage("ip link set {link} down", "member"),
    _Damage("ip link set {bridge} down", "network"),
    _Damage("sysctl -qw net.ipv4.conf.{bridge}.forwarding=0", "network"),
    # Where bridges pass their packets to nftables (bridge-nf-call-iptables) within the host, too.
    _Damage("nft insert rule inet meshnet forward counter drop", "everything"),
    _Damage("nft flush chain inet meshnet forward", "nothing", opens=True),
)
_DUPLICATED = (
    _Damage("ip route add {subnet} via {away} onlink dev eth0 proto 109 metric 50", "nothing"),
    _Damage("ip route add blackhole 10.42.77.0/24 proto 109", "nothing"),
    _Damage("bridge fdb append {mac} dev {vxlan} dst 10.255.99.99 self", "peer"),
    _Damage("ip addr add 10.42.250.1/24 dev {bridge}", "nothing"),
    _Damage("ip nexthop add id 1828716999 via {away} dev eth0 onlink proto 109", "nothing"),
    _Damage(
        "ip neigh add 10.42.251.0 lladdr 02:00:00:00:00:02 dev {vxlan} nud permanent", "nothing"
    ),
    _Damage("bridge fdb append 02:00:00:00:00:03 dev {vxlan} dst {underlay} self", "nothing"),
)


@dataclass(frozen=True, slots=True)
class _Cuts:
    """What a damage cuts, of its host, network, peer and member."""

    kind: str
    host: str
    network: str
    peer: str
    member: int

    def __call__(self, source: Member, target: Member) -> bool:
        ends = {source.host, target.host}
        here = self.host in ends
        of_network = self.network in (source.network, target.network)
        remote = source.host != target.host
        return {
            "nothing": False,
            # Both ways: an answer comes back by what is damaged.
            "peer": of_network and ends == {self.host, self.peer},
            "overlay": of_network and here and remote,
            "network": of_network and here,
            "host": here and remote,
            "everything": here,
            "member": self.member in (source.container.pid, target.container.pid),
        }[self.kind]


@dataclass(frozen=True, slots=True)
class _Opens:
    """The way through a host from one network to another."""

    host: str

    def __call__(self, source: Member, target: Member) -> bool:
        return self.host in (source.host, target.host)


@dataclass(frozen=True, slots=True)
class KernelDamage:
    """One of some commands on one host."""

    name: str
    damages: tuple[_Damage, ...]

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Run one."""
        return self.inject_this(rng.choice(self.damages), mesh, rng)

    def inject_this(self, damage: _Damage, mesh: FaultMesh, rng: Random) -> Injected:
        """Run this one."""
        member = rng.choice(mesh.members)
        host = mesh.lab.host(member.host)
        peer = rng.choice([other.name for other in mesh.lab.hosts if other.name != host.name])
        words = _words(mesh, member, peer)
        command = damage.command.format(**words)
        host.run(command.split())
        cuts = _Cuts(damage.cuts, host.name, member.network, peer, member.container.pid)
        return Injected(
            f"on {host.name}: {command}",
            lambda: None,
            cuts=cuts,
            whole_within_s=_SECONDS,
            opens=_Opens(host.name) if damage.opens else cuts_nothing,
        )


def _words(mesh: FaultMesh, member: Member, peer: str) -> Mapping[str, object]:
    """What the commands name: objects of one network on one host, and of a peer there."""
    host = mesh.lab.host(member.host)
    hosts = {document["id"]: document for document in meshnet(host, "hosts")}
    networks = {document["name"]: document for document in meshnet(host, "network", "ls")}
    subnet = hosts[peer]["subnets"][member.network]
    vtep = subnet.partition("/")[0]
    vni = networks[member.network]["vni"]
    route = host.run(["ip", "route", "show", subnet]).stdout
    found = re.search(r"nhid (\d+)", route)
    prefix = ip_interface(member.document["address"]).network.prefixlen
    return {
        "subnet": subnet,
        "vtep": vtep,
        "mac": "02:6d:" + ":".join(f"{int(octet):02x}" for octet in vtep.split(".")),
        "underlay": hosts[peer]["underlay_ip"],
        "away": mesh.lab.underlay.gateway_ip,
        "vxlan": f"mnv{vni}",
        "bridge": f"mnb{vni}",
        "nexthop": found[1] if found else 0,
        "gateway": f"{member.document['gateway']}/{prefix}",
        "link": f"mne{member.document['id']}",
    }


REMOVED = KernelDamage("kernel object removed", _REMOVED)
CHANGED = KernelDamage("kernel object changed", _CHANGED)
DUPLICATED = KernelDamage("kernel object duplicated", _DUPLICATED)
