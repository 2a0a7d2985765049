"""Programming the kernel for thousands of remote hosts, against ip(8) and bridge(8) in batches.

Each time in a fresh namespace that already has the devices.  Ours is a whole pass of the agent:
look at the underlay, dump, plan, diff, and write a nexthop object, a route, a neighbour, an FDB
entry and an element of the firewall a host.  The peer: `tests.bench.classic`.  A whole agent, with
etcd: `tests.bench.scale`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import tempfile
import time
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from meshnet.kernel.elements import WiredElements
from meshnet.kernel.netlink import NetlinkKernel
from meshnet.kernel.netns import inside
from meshnet.lab.netns import netns_path
from meshnet.model import Host, HostId, MeshSnapshot, Network, NetworkName, Reservations, Vni
from meshnet.modes import Mode
from meshnet.plan import LocalView
from meshnet_agent.dataplane.pass_values import PassInput
from meshnet_agent.dataplane.passes import Passes
from tests.bench.classic import OWN_IP, host_namespace, program_by_hand, remotes
from tests.bench.common import at_most, median_of, median_ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from meshnet.model import IpNetwork
    from meshnet.tables import Failure, Op
    from meshnet_agent.dataplane.pass_values import PassResult
    from tests.bench.common import Measure, Run

ROUNDS = 3
MANY, MOST, FEW = 10_000, 30_000, 1_000
_OVERLAY = IPv4Network("10.0.0.0/8")
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
        peer.append(program_by_hand(MANY))
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
    with host_namespace() as name, tempfile.TemporaryDirectory() as directory:
        fd = os.open(netns_path(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            with (
                inside(fd),
                contextlib.closing(
                    _TimedKernel(Path(directory) / "nft", WiredElements())
                ) as kernel,
            ):
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
    _check(result, writes=5 * count)
    writes, cpu_s = kernel.writes, _cpu_s()
    _check(passes.run_all(kernel, given), writes=0)
    return Programmed(seconds, write_s, _cpu_s() - cpu_s, kernel.writes - writes)


def _check(result: PassResult, writes: int) -> None:
    if result.failures or result.writes != writes:
        raise RuntimeError(f"{result.writes} writes, not {writes}; {result.failures[:3]}")


def _pass_input(count: int) -> PassInput:
    others = remotes(count)
    hosts = [
        Host(id=HostId(f"host{i}"), underlay_ip=remote.underlay_ip)
        for i, remote in enumerate(others, start=1)
    ]
    network = Network(name=_NAME, mode=Mode.VXLAN, subnets=(_OVERLAY,), vni=Vni(42))
    owners: dict[IpNetwork, HostId] = {_OWN_SUBNET: _SELF}
    owners |= {remote.subnet: host.id for remote, host in zip(others, hosts, strict=True)}
    return PassInput(
        snapshot=MeshSnapshot(
            networks={_NAME: network},
            hosts={host.id: host for host in hosts},
            reservations={_NAME: Reservations(owners)},
        ),
        local=LocalView(host=_SELF, subnets={_NAME: (_OWN_SUBNET,)}),
        underlay_ip=OWN_IP,
    )


def _cpu_s() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
