"""Programming the kernel for thousands of remote hosts, against ip(8) and bridge(8) in batches.

Each time in a fresh namespace that already has the devices.  Ours is a whole pass of the agent:
look at the underlay, dump, plan, diff, and write a nexthop object, a route, a neighbour and an FDB
entry a host.  The peer is what everybody else does: a route that names its own gateway, a
neighbour and an FDB entry, in three batches that are made beforehand.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import subprocess
import tempfile
import time
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from meshnet.kernel.netlink import NetlinkKernel
from meshnet.kernel.netns import inside
from meshnet.lab.netns import netns_path
from meshnet.model import Host, HostId, MeshSnapshot, Mode, Network, NetworkName, Reservations, Vni
from meshnet.plan import LocalView
from meshnet.state import format_mac
from meshnet.wire.mac import vtep_mac
from meshnet_agent.passes import Passes, PassInput
from tests.bench.common import at_most, median_of, median_ratio, scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from meshnet.diff import Failure, Op
    from meshnet.model import IpNetwork
    from meshnet_agent.passes import PassResult
    from tests.bench.common import Measure, Run

ROUNDS = 3
MANY, MOST, FEW = 10_000, 30_000, 1_000
_OVERLAY = IPv4Network("10.0.0.0/8")
_UNDERLAY = IPv4Network("172.16.0.0/12")
_OWN_IP = _UNDERLAY[1]
_NAME = NetworkName("prod")
_SELF = HostId("self")
_OWN_SUBNET = IPv4Network("10.255.255.0/24")


class Programmed(NamedTuple):
    """Times of programming so many hosts, and of a pass with nothing left to do.

    Attributes:
        seconds: the whole pass.
        write_s: the part of it in which operations are encoded, sent and acknowledged.
    """

    seconds: float
    write_s: float
    resync_cpu_s: float
    resync_writes: int


class _TimedKernel(NetlinkKernel):
    """Remembers how long the last write took."""

    write_s = 0.0

    def apply(
        self, ops: Sequence[Op], on_written: Callable[[int], None] | None = None
    ) -> list[Failure]:
        started = time.perf_counter()
        failures = super().apply(ops, on_written)
        self.write_s = time.perf_counter() - started
        return failures


def run(run: Run) -> list[Measure]:
    """See the module."""
    ours: list[Programmed] = []
    most: list[float] = []
    few: list[float] = []
    peer: list[float] = []
    rounds = run.rounds or ROUNDS
    gc.set_threshold(50_000, 20, 50)  # as the agent does
    for number in range(1, rounds + 1):
        few.append(_program(FEW).seconds)
        ours.append(_program(MANY))
        peer.append(_program_by_hand(MANY))
        most.append(_program(MOST).seconds)
        run.say(
            f"round {number} of {rounds}: {MANY:,} hosts in {ours[-1].seconds:.2f} s, by hand "
            f"{peer[-1]:.2f} s; {MOST:,} in {most[-1]:.2f} s; {FEW:,} in {few[-1]:.3f} s"
        )
    seconds, write_s = [p.seconds for p in ours], [p.write_s for p in ours]
    return [
        median_of(f"{MANY:,} hosts", seconds, "s"),
        median_of(f"{MANY:,} hosts by ip and bridge -batch", peer, "s"),
        median_ratio(f"{MANY:,} hosts, whole pass / by hand", seconds, peer, at_most(0.25)),
        median_ratio(f"{MANY:,} hosts, writing alone / by hand", write_s, peer),
        median_of(f"{MOST:,} hosts", most, "s", at_most(1.5)),
        median_ratio(
            f"time a host, {MOST:,} / {FEW:,}",
            [s / MOST for s in most],
            [s / FEW for s in few],
            at_most(1.5),
        ),
        median_of(f"resync of {MANY:,}, CPU", [p.resync_cpu_s for p in ours], "s", at_most(0.5)),
        median_of(f"resync of {MANY:,}, writes", [p.resync_writes for p in ours], "", at_most(0)),
    ]


def _program(count: int) -> Programmed:
    """A pass from nothing, and one that finds everything in place."""
    with _host_namespace() as name, tempfile.TemporaryDirectory() as directory:
        fd = os.open(netns_path(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            with inside(fd), contextlib.closing(_TimedKernel(Path(directory) / "nft")) as kernel:
                return _passes(kernel, count)
        finally:
            os.close(fd)


def _passes(kernel: _TimedKernel, count: int) -> Programmed:
    passes = Passes()
    for _ in range(2):  # devices, addresses, firewall; the second settles what the first set off
        passes.run_all(kernel, _pass_input(0))
    given = _pass_input(count)
    started = time.perf_counter()
    result = passes.run_all(kernel, given)
    seconds, write_s = time.perf_counter() - started, kernel.write_s
    _check(result, writes=4 * count)
    writes, cpu_s = kernel.writes, _cpu_s()
    _check(passes.run_all(kernel, given), writes=0)
    return Programmed(seconds, write_s, _cpu_s() - cpu_s, kernel.writes - writes)


def _check(result: PassResult, writes: int) -> None:
    if result.failures or result.writes != writes:
        raise RuntimeError(f"{result.writes} writes, not {writes}; {result.failures[:3]}")


def _pass_input(count: int) -> PassInput:
    hosts = [Host(id=HostId(f"host{i}"), underlay_ip=_underlay_ip(i)) for i in range(1, count + 1)]
    network = Network(name=_NAME, mode=Mode.VXLAN, subnets=(_OVERLAY,), vni=Vni(42))
    owners: dict[IpNetwork, HostId] = {_OWN_SUBNET: _SELF}
    owners |= {_subnet(i): host.id for i, host in enumerate(hosts, start=1)}
    return PassInput(
        snapshot=MeshSnapshot(
            networks={_NAME: network},
            hosts={host.id: host for host in hosts},
            reservations={_NAME: Reservations(owners)},
        ),
        local=LocalView(host=_SELF, subnets={_NAME: (_OWN_SUBNET,)}),
        underlay_ip=_OWN_IP,
    )


def _program_by_hand(count: int) -> float:
    """Three batches, one after the other, in seconds."""
    with _host_namespace() as name, tempfile.TemporaryDirectory() as directory:
        device = (
            f"link add mnv42 mtu 1450 type vxlan id 42 local {_OWN_IP} dstport 4789 nolearning\n"
            "link set mnv42 up\n"
        )
        routes, neighbours, entries = [], [], []
        for i in range(1, count + 1):
            subnet = _subnet(i)
            gateway, mac = subnet.network_address, format_mac(vtep_mac(subnet))
            neighbours.append(f"neighbour add {gateway} lladdr {mac} dev mnv42 nud permanent\n")
            entries.append(f"fdb add {mac} dev mnv42 dst {_underlay_ip(i)} self permanent\n")
            routes.append(f"route add {subnet} via {gateway} dev mnv42 onlink\n")
        _batch(name, "ip", Path(directory) / "device", [device])
        return sum(
            _batch(name, program, Path(directory) / "batch", lines)
            for program, lines in (("ip", neighbours), ("bridge", entries), ("ip", routes))
        )


def _batch(name: str, program: str, file: Path, lines: list[str]) -> float:
    file.write_text("".join(lines))
    argv = ["nsenter", f"--net={netns_path(name)}", "--", program, "-batch", str(file)]
    started = time.perf_counter()
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - started


@contextlib.contextmanager
def _host_namespace() -> Iterator[str]:
    """A namespace with an underlay link, and nothing else."""
    with scratch() as spaces:
        spaces.add("host")
        spaces.ip(
            "host",
            [
                "link add eth0 type veth peer name wire",
                f"address add {_OWN_IP}/{_UNDERLAY.prefixlen} dev eth0",
                "link set wire up",
                "link set eth0 up",
            ],
        )
        try:
            yield spaces.name_of("host")
        finally:
            # Now rather than in the background, under what is measured next.
            spaces.namespace("host").run(["ip", "link", "del", "mnv42"], timeout=120)


def _subnet(i: int) -> IPv4Network:
    return IPv4Network((int(_OVERLAY.network_address) + (i << 8), 24))


def _underlay_ip(i: int) -> IPv4Address:
    return _UNDERLAY[1 + i]


def _cpu_s() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
