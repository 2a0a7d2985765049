"""Faults of the underlay: they cut only what crosses the place where they happen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from tests.netns.faults.fault import CutsHosts, Injected
from tests.netns.faults.mesh import TTL_S
from tests.netns.mesh import meshnet

if TYPE_CHECKING:
    from random import Random

    from meshnet.lab.commands import Namespace
    from meshnet.lab.host import LabHost
    from tests.netns.faults.mesh import FaultMesh, Member

_TABLE = "table bridge fault"


def _filter(switch: Namespace, *rules: str) -> None:
    """Have the switch drop what rules match."""
    body = "".join(f"{rule} drop; " for rule in rules)
    switch.run(
        ["nft", f"{_TABLE} {{ chain c {{ type filter hook forward priority 0; {body} }}; }}"]
    )


def _delete(switch: Namespace, table: str = _TABLE) -> None:
    switch.run(["nft", f"delete {table}"])


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The cable of a host is pulled, or its link set down."""

    name: str = "underlay link down"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Pull one."""
        host = rng.choice(mesh.lab.hosts)
        if rng.randrange(2):
            place: Namespace = mesh.lab.switch
            what, link, after = f"cable of {host.name} pulled", host.name, []
        else:
            place, what, link = host, f"eth0 of {host.name} down", "eth0"
            # The kernel drops the routes through a link that is set down, and forgets them.
            after = [host.run(["ip", "route", "show", "default"]).stdout.split()]
        place.run(["ip", "link", "set", link, "down"])

        def heal() -> None:
            place.run(["ip", "link", "set", link, "up"])
            for route in after:
                host.run(["ip", "route", "replace", *route])

        return Injected(what, heal, rng.uniform(0.5, 3) * TTL_S, CutsHosts(frozenset({host.name})))


@dataclass(frozen=True, slots=True)
class _CutsOneWay:
    """What one host sends to others, or what it is sent."""

    host: str
    sends: bool

    def __call__(self, source: Member, target: Member) -> bool:
        return source.host != target.host and self.host == (
            source.host if self.sends else target.host
        )


@dataclass(frozen=True, slots=True)
class OneWayLoss:
    """Some of what a host sends, or of what it is sent, is lost; the other way all arrives."""

    name: str = "one-way loss"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Drop a share at the switch."""
        host = rng.choice(mesh.lab.hosts)
        percent = rng.randrange(5, 60)
        sends = bool(rng.randrange(2))
        port = f'{"iifname" if sends else "oifname"} "{host.name}"'
        # Without answers to ARP nothing could be sent the other way.
        _filter(mesh.lab.switch, f"{port} ether type != arp numgen random mod 100 < {percent}")
        return Injected(
            f"{percent}% of what {host.name} {'sends' if sends else 'is sent'} lost",
            partial(_delete, mesh.lab.switch),
            rng.uniform(0.5, 3) * TTL_S,
            _CutsOneWay(host.name, sends),
        )


@dataclass(frozen=True, slots=True)
class _CutsApart:
    """Whatever goes from one side to the other."""

    side: frozenset[str]

    def __call__(self, source: Member, target: Member) -> bool:
        return (source.host in self.side) != (target.host in self.side)


@dataclass(frozen=True, slots=True)
class Partition:
    """Two parts of the mesh do not hear each other; one of them has etcd."""

    name: str = "partition"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Part the switch."""
        names = [host.name for host in mesh.lab.hosts]
        away = rng.sample(names, rng.randrange(1, len(names)))
        ports = ", ".join(f'"{name}"' for name in away)
        inside = f"{{ {ports} }}"
        lasts_s = rng.uniform(1, 4) * TTL_S
        _filter(
            mesh.lab.switch,
            f"iifname {inside} oifname != {inside}",
            f"iifname != {inside} oifname {inside}",
        )
        return Injected(
            f"{', '.join(sorted(away))} apart from the rest and etcd",
            partial(_delete, mesh.lab.switch),
            lasts_s,
            _CutsApart(frozenset(away)),
            whole_within_s=20,
            # TCP may make good for less than a lease and a half.
            says="store lost|lease not renewed|lease ran out" if lasts_s > 1.5 * TTL_S else "",
        )


@dataclass(frozen=True, slots=True)
class AddressChanged:
    """The underlay address of a host becomes another, and later the first one again."""

    name: str = "underlay address changed"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Change one, under an agent that was told the link and not the address."""
        lab = mesh.lab
        host = mesh.host_to_end(rng)
        host.stop_agent()
        host.start_agent(by_link=True)
        old, new = str(host.underlay_ip), str(lab.underlay.host_ip(7000 + rng.randrange(1000)))
        host.run(["sysctl", "-qw", "net.ipv4.conf.eth0.promote_secondaries=1"])
        self._change(mesh, host, old, new)
        return Injected(
            f"{host.name} moved from {old} to {new}",
            partial(self._change, mesh, host, new, old),
            rng.uniform(0, TTL_S),
            CutsHosts(frozenset({host.name})),
            says="underlay",
        )

    def _change(self, mesh: FaultMesh, host: LabHost, old: str, new: str) -> None:
        prefix = mesh.lab.underlay.network.prefixlen
        host.run(["ip", "address", "add", f"{new}/{prefix}", "dev", "eth0"])
        host.run(["ip", "address", "del", f"{old}/{prefix}", "dev", "eth0"])
        gateway = str(mesh.lab.underlay.gateway_ip)
        host.run(["ip", "route", "replace", "default", "via", gateway])
        peer = next(other for other in mesh.lab.hosts if other.name != host.name)

        def known() -> bool:
            hosts = {document["id"]: document for document in meshnet(peer, "hosts")}
            return bool(hosts[host.name]["underlay_ip"] == new)

        wait_until(known, 15, f"{host.name} is known at {new}")


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Every other packet to a host comes two or more times."""

    name: str = "packets duplicated"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Duplicate at the switch."""
        port = rng.choice(mesh.lab.hosts).name
        table = "table netdev fault"
        hook = f'type filter hook egress device "{port}" priority 0;'
        rule = f'numgen random mod 2 0 dup to "{port}";'
        mesh.lab.switch.run(["nft", f"{table} {{ chain {port} {{ {hook} {rule} }}; }}"])
        return Injected(
            f"packets to {port} duplicated",
            partial(_delete, mesh.lab.switch, table),
            rng.uniform(0.5, 2) * TTL_S,
        )
