"""Further tunnels between the two hosts made by hand: what one is, and how it is put in place.

A tunnel gives each host a device that leads to the other.  Bridge, containers and underlay are
those of the hand-made VXLAN, so that only the tunnel differs::

    container ─ br0 ─ host h1 ─ [device ─ tunnel ─ eth0] ─ underlay ─ … the same on h2

To add one: a class with what `Tunnel` asks for, and its place in `tests.bench.datapath.TUNNELS`.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from subprocess import DEVNULL, TimeoutExpired
from typing import TYPE_CHECKING, Protocol

from meshnet.lab.commands import CommandFailedError
from meshnet.lab.poll import wait_until
from meshnet.lab.process import is_listening
from tests.bench.native import NotAvailableError
from tests.bench.ways import Way

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from meshnet.lab.commands import Namespace
    from tests.bench.handmade import Handmade

MTU_BYTES = 1450
"""What the hand-made VXLAN carries.  Tunnels that could carry more do not do so here."""
_READY_S = 10.0
_PROBE_PORT = 5202


@dataclass(frozen=True, slots=True)
class End:
    """One of a tunnel's two hosts.

    Attributes:
        number: 1 or 2.
        host: its namespace.
        device: name for its end of the tunnel; nothing else on the machine has it.
        underlay_ip: its address on the underlay.
        subnet: whose containers are behind it.
        directory: for its files.
        container: the namespace of its container.
        container_link: the container's link to that subnet, which no other tunnel's packets take.
    """

    number: int
    host: Namespace
    device: str
    underlay_ip: IPv4Address
    subnet: IPv4Network
    directory: Path
    container: Namespace
    container_link: str

    @property
    def gateway(self) -> IPv4Address:
        """The bridge's address in the subnet."""
        return self.subnet[1]


class Tunnel(Protocol):
    """A kind of tunnel.

    Attributes:
        name: of the path in the results.
        mtu_bytes: the largest inner packet, at most `MTU_BYTES`.
    """

    name: str
    mtu_bytes: int

    def start(self, ends: tuple[End, End]) -> Sequence[int]:
        """Start it on both hosts; returns the ids of the processes that move packets.

        On return, or within some seconds, each host has a link of the end's `device` name; it need
        not be up.  What was started with the host's `Namespace.popen` is ended with it.

        Raises:
            NotAvailableError: this machine lacks what it needs.
        """
        ...

    def route(self, end: End, peer: End) -> Sequence[str]:
        """The ip(8) arguments, once its device is up, that lead from a host to the peer's subnet.

        Each is one command; `plain_route` is enough for a device without link-layer addresses.
        """
        ...


def plain_route(end: End, peer: End) -> list[str]:
    """The command for a route into a device that has one far end, or knows its peers' subnets."""
    return [f"route add {peer.subnet} dev {end.device} src {end.gateway}"]


def connect(handmade: Handmade, tunnel: Tunnel, octet: int, directory: Path) -> Carried:
    """Put a tunnel between the hosts, and see that it carries.

    Args:
        octet: the second one of its subnets' addresses, that no other tunnel has.
        directory: an empty one for its files.

    Raises:
        NotAvailableError: see `Tunnel.start`; or its device does not come, or nothing gets through,
            or no TCP does.
    """
    handmade.add_subnets(octet, tunnel.mtu_bytes)
    ends = (_end(handmade, 1, octet, directory), _end(handmade, 2, octet, directory))
    pids = tuple(tunnel.start(ends))
    for end, peer in (ends, ends[::-1]):
        _until(functools.partial(_has, end), f"{tunnel.name}: no device {end.device}")
        commands = [f"link set {end.device} mtu {tunnel.mtu_bytes} up", *tunnel.route(end, peer)]
        for command in commands:
            end.host.run(["ip", *command.split()])
    there, back = (
        Way(handmade.container(i), handmade.container(peer), f"10.{octet}.{peer}.2")
        for i, peer in ((1, 2), (2, 1))
    )
    _until(functools.partial(_answers, there), f"{tunnel.name}: nothing gets through")
    for way in (there, back):
        if not _carries_tcp(way):
            raise NotAvailableError(f"{tunnel.name}: TCP to {way.address} stands still")
    return Carried(there, back, pids)


@dataclass(frozen=True, slots=True)
class Carried:
    """A path in both directions, and the processes that move its packets."""

    there: Way
    back: Way
    pids: tuple[int, ...] = ()


def _end(handmade: Handmade, i: int, octet: int, directory: Path) -> End:
    return End(
        number=i,
        host=handmade.host(i),
        device=f"mn{os.getpid()}t{octet}{i}",
        underlay_ip=IPv4Address(handmade.host_ip(i)),
        subnet=IPv4Network(f"10.{octet}.{i}.0/24"),
        directory=directory,
        container=handmade.container(i),
        container_link=handmade.link_name(octet),
    )


def _until(condition: Callable[[], bool], what: str) -> None:
    try:
        wait_until(condition, _READY_S, what)
    except TimeoutError as exc:
        raise NotAvailableError(f"{what} after {_READY_S:g} s") from exc


def _has(end: End) -> bool:
    try:
        end.host.run(["ip", "link", "show", "dev", end.device])
    except CommandFailedError:
        return False
    return True


def _answers(way: Way) -> bool:
    argv = ["ping", "-n", "-q", "-c", "1", "-W", "1", way.address]
    return way.client.run(argv, check=False).returncode == 0


def _carries_tcp(way: Way) -> bool:
    """Whether some megabytes arrive: a tunnel that drops all but small packets answers pings."""
    # Each path has its own server: one that a broken path left waiting would be busy for the next.
    server = way.server.popen(["iperf3", "-s", "-1", "-p", str(_PROBE_PORT)], stdout=DEVNULL)
    try:
        wait_until(lambda: is_listening(server.pid, _PROBE_PORT), _READY_S, "iperf3")
        argv = ["iperf3", "-c", way.address, "-p", str(_PROBE_PORT), "-n", "2M"]
        return way.client.run(argv, check=False, timeout=_READY_S).returncode == 0
    except TimeoutExpired:
        return False
    finally:
        server.kill()
        server.wait()
