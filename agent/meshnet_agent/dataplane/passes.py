"""Passes: they bring the kernel to the state that mesh and host ask for, in the kernel's thread.

A pass over everything is: observe the underlay → find the path to each peer → dump the kernel →
plan → diff → apply.  It is the safety net, and with nothing to do it writes nothing.  In between, a
change of some hosts costs a pass over these hosts only.  What they added to the desired state
before is planned again from what was remembered, what they add now is planned from their new
values, and the difference is written.  Planner and diff are the same; only the dump is left out.

Where such a change may matter to other hosts, a pass over some hosts gives up, and one over
everything follows (docs/design/incremental-passes.md).  No I/O but through the `Kernel` that is
handed in.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from meshnet.backends import NexthopIds
from meshnet.backends.occupied import is_within, spans_of
from meshnet.diff import diff, missing_endpoint_links
from meshnet.firewall.elements import SETS
from meshnet.model import MeshSnapshot, Reservations
from meshnet.plan import LocalView, NetworkOutcome, plan_hosts, plan_mesh
from meshnet.state import NETWORK_LINK
from meshnet.tables import Failure, Table
from meshnet_agent.dataplane.pass_values import PassResult, Progress, Stages

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from typing import Any

    from meshnet.backends import Underlay, UnderlayPath
    from meshnet.backends.occupied import Span
    from meshnet.kernel import Kernel
    from meshnet.model import Host, HostId, IpAddress, NetworkName
    from meshnet.plan import HostsPlan
    from meshnet.state import KernelState
    from meshnet.tables import Op
    from meshnet_agent.dataplane.pass_values import PartInput, PassInput


@dataclass(slots=True)
class _Applied:
    """What the state that the kernel was last brought to was planned from.

    Attributes:
        at: how many hosts have each underlay address (packed, network byte order).
        spans: the addresses of networks; a host whose underlay address is there concerns all hosts.
    """

    snapshot: MeshSnapshot
    hosts: dict[HostId, Host]
    at: Counter[bytes]
    reservations: dict[NetworkName, Reservations]
    local: LocalView
    underlay: Underlay
    paths: dict[IpAddress, UnderlayPath]
    networks: dict[NetworkName, NetworkOutcome]
    failures: dict[tuple[Table, Any], Failure]
    spans: frozenset[Span]

    def plan(self, ids: NexthopIds, hosts: Collection[HostId]) -> HostsPlan:
        """What some hosts add to the desired state, planned from what is remembered."""
        return plan_hosts(self.snapshot, self.local, self.underlay, ids, self.networks, hosts)

    def touched(self, given: PartInput) -> set[HostId]:
        """The hosts that changed, and those that lose a subnet to one of them."""
        touched = {*given.hosts, *(given.expired ^ self.local.expired)}
        touched |= {host for _, host in given.fallen ^ self.local.fallen}
        for view in given.hosts.values():
            for name, subnets in view.subnets.items():
                owners = self.reservations.get(name, Reservations())
                touched |= {owners[s] for s in subnets if s in owners}
        return touched

    def take(self, given: PartInput, paths: Mapping[IpAddress, UnderlayPath]) -> None:
        """Remember the hosts that changed as they are now."""
        for host, view in given.hosts.items():
            before = self.hosts.pop(host, None)
            if before is not None:
                self.at[before.underlay_ip.packed] -= 1
            if view.host is not None:
                self.hosts[host] = view.host
                self.at[view.host.underlay_ip.packed] += 1
            for name in {*self.reservations, *view.subnets}:
                held = self.reservations.setdefault(name, Reservations())
                held.assign(host, view.subnets.get(name, ()))
        self.paths.update(paths)
        self.local = replace(self.local, expired=given.expired, fallen=given.fallen)

    def moves_inside(self, given: PartInput) -> bool:
        """Whether a host comes with an underlay address in a network's CIDR, or goes from there."""
        for name, view in given.hosts.items():
            before = self.hosts.get(name)
            if view.host == before:
                continue
            for host in (before, view.host):
                if host is not None and is_within(host.underlay_ip, self.spans):
                    return True
        return False

    def shares(self, addresses: Collection[bytes], touched: Collection[HostId]) -> bool:
        """Whether one of `addresses` belongs to a host that did not change, or to two hosts."""
        known = (self.hosts[host] for host in touched if host in self.hosts)
        changed = Counter(host.underlay_ip.packed for host in known)
        return any(self.at[a] > min(1, changed[a]) for a in addresses)


class Passes:
    """Runs passes; all calls come from the kernel's thread.

    Attributes:
        progress: of the pass that is running; may be read from any thread.
    """

    def __init__(self) -> None:
        self.progress = Progress()
        self._ids = NexthopIds()
        self._applied: _Applied | None = None

    def run_all(self, kernel: Kernel, given: PassInput) -> PassResult:
        """Compare everything with the kernel, and correct what differs.

        Raises:
            MeshnetError: this host has no underlay address any more, or ``nft`` is missing.
            OSError: the kernel did not answer.
        """
        with _no_collection():
            return self._run_all(kernel, given)

    def _run_all(self, kernel: Kernel, given: PassInput) -> PassResult:
        started = time.perf_counter()
        # If this pass fails halfway, nobody knows what the kernel holds.
        self._applied = None
        stages = Stages()
        snapshot, local = given.snapshot, given.local
        with stages.timed("observe"):
            peers = {h.underlay_ip for h in snapshot.hosts.values() if h.id != local.host}
            underlay = kernel.observe(given.underlay_ip, given.underlay_dev)
            underlay = replace(underlay, paths=kernel.find_paths(peers))
        with stages.timed("dump"):
            actual = kernel.dump()
        with stages.timed("plan"):
            self._ids.adopt(actual.nexthops, actual.foreign_nexthop_ids)
            plan = plan_mesh(snapshot, local, underlay, self._ids)
        with stages.timed("diff"):
            find_ops = _diff_over_holes if snapshot.holes else diff
            ops = find_ops(plan.state, actual)
        failures = self._apply(kernel, ops, stages)
        refused = {f.op.key for f in failures if f.op.table is Table.LINK}
        # Over holes the kernel keeps objects that no plan has: a pass over some hosts must not
        # build on that.
        if not snapshot.holes:
            self._applied = _remember(snapshot, local, underlay, plan.networks, failures)
        return PassResult(
            networks=plan.networks,
            failures=tuple(failures),
            missing=frozenset(missing_endpoint_links(plan.state, actual)),
            underlay=underlay,
            writes=len(ops),
            again=any(op.table is Table.LINK and op.key not in refused for op in ops),
            seconds=time.perf_counter() - started,
            stages=stages,
        )

    def run_part(self, kernel: Kernel, given: PartInput) -> PassResult | None:
        """Update the kernel for some hosts; None: a pass over everything is needed instead.

        Raises:
            OSError: the kernel did not answer.
        """
        started = time.perf_counter()
        # Put back only at the end: whatever goes wrong, a pass over everything comes next.
        applied, self._applied = self._applied, None
        if applied is None or applied.moves_inside(given):
            return None
        stages = Stages()
        touched = applied.touched(given)
        with stages.timed("observe"):
            paths = kernel.find_paths({v.host.underlay_ip for v in given.hosts.values() if v.host})
        with stages.timed("plan"):
            before = applied.plan(self._ids, touched)
            applied.take(given, paths)
            after = applied.plan(self._ids, touched)
        if _is_narrower(applied, given):
            return None
        with stages.timed("diff"):
            ops = diff(after.state, before.state)
        if _concerns_others(applied, touched, before.state, after.state, ops):
            return None
        failures = self._apply(kernel, ops, stages)
        applied.failures |= {(f.op.table, f.op.key): f for f in failures}
        for name, outcome in applied.networks.items():
            if outcome.plan is not None:
                applied.networks[name] = _with_hosts(outcome, name, touched, before, after)
        self._applied = applied
        return PassResult(
            scope="part",
            networks=dict(applied.networks),
            failures=tuple(applied.failures.values()),
            underlay=applied.underlay,
            writes=len(ops),
            seconds=time.perf_counter() - started,
            stages=stages,
        )

    def _apply(self, kernel: Kernel, ops: Sequence[Op], stages: Stages) -> list[Failure]:
        if not ops:
            return []
        self.progress.begin(len(ops))
        try:
            with stages.timed("apply"):
                return kernel.apply(ops, self.progress.advance)
        finally:
            self.progress.begin(0)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable the cycle collector: a pass makes 100,000 tuples and not one cycle.

    Walking over them took a fifth of a pass over 30,000 hosts, and it stopped all threads.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _diff_over_holes(desired: KernelState, actual: KernelState) -> list[Op]:
    """The difference where the snapshot has holes: nothing is deleted because it is not in it.

    (Design decision D5.)  Firewall elements that may belong to a hole are added to the desired
    state, because the firewall may be loaded again, which would drop them.  This does not include
    elements of this host's endpoints, which are all known, nor a catch-all element (empty key),
    which is never ours.
    """
    kept = {k: v for k, v in actual.elements.items() if k.key and not SETS[k.set_name].wired}
    desired = replace(desired, elements=kept | desired.elements)
    return [
        op
        for op in diff(desired, actual)
        if op.value is not None or op.table is Table.ELEMENT or op.key in desired.links
    ]


def _remember(
    snapshot: MeshSnapshot,
    local: LocalView,
    underlay: Underlay,
    networks: Mapping[NetworkName, NetworkOutcome],
    failures: Sequence[Failure],
) -> _Applied:
    """Copy everything that later passes over some hosts change; the snapshot shares the copies."""
    hosts = dict(snapshot.hosts)
    reservations = {name: held.copy() for name, held in snapshot.reservations.items()}
    paths = dict(underlay.paths)
    return _Applied(
        snapshot=MeshSnapshot(networks=snapshot.networks, hosts=hosts, reservations=reservations),
        hosts=hosts,
        at=Counter(host.underlay_ip.packed for host in hosts.values()),
        reservations=reservations,
        local=local,
        underlay=replace(underlay, paths=paths),
        paths=paths,
        networks=dict(networks),
        failures={(f.op.table, f.op.key): f for f in failures},
        spans=spans_of(snapshot.networks.values()),
    )


def _is_narrower(applied: _Applied, given: PartInput) -> bool:
    """Whether a network's MTU must shrink now; one that may grow can wait for the next resync."""
    for view in given.hosts.values():
        path = applied.paths.get(view.host.underlay_ip) if view.host is not None else None
        for name in view.subnets if path is not None else ():
            outcome = applied.networks.get(name)
            if outcome is not None and path is not None and path.mtu_bytes < outcome.path_mtu_bytes:
                return True
    return False


def _concerns_others(
    applied: _Applied,
    touched: Collection[HostId],
    before: KernelState,
    after: KernelState,
    ops: Sequence[Op],
) -> bool:
    """Whether a dump is needed to know what an operation would do.

    That is the case where

    - the last operation on the same object failed;
    - a nexthop on the underlay comes or goes, and another host at the same address uses it, too;
    - the firewall would forget an address that another host has, too;
    - a userspace VTEP's member has the address of another host: which one is the member depends on
      both.
    """
    if any((op.table, op.key) in applied.failures for op in ops):
        return True
    differ = set(before.nexthops.values()) ^ set(after.nexthops.values())
    addresses = {n.gateway for n in differ if not NETWORK_LINK.fullmatch(n.dev)}
    addresses |= {key.key for key in before.elements.keys() - after.elements.keys()}
    addresses |= {key.underlay_ip for key in (*before.members, *after.members)}
    return bool(addresses) and applied.shares(addresses, touched)


def _with_hosts(
    outcome: NetworkOutcome,
    name: NetworkName,
    touched: Collection[HostId],
    before: HostsPlan,
    after: HostsPlan,
) -> NetworkOutcome:
    """A network's outcome, updated for the hosts that changed."""
    others = {host: text for host, text in outcome.peer_errors.items() if host not in touched}
    return replace(
        outcome,
        peers=outcome.peers - before.peers[name] + after.peers[name],
        peer_errors={**others, **after.errors[name]},
    )
