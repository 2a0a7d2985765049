"""What must hold in a mesh that is whole: the book, etcd, agents, kernels and endpoints agree.

`check` compares them all and says what is wrong, in sentences; it changes nothing and is cheap
enough to be called again and again.  The book, `FaultMesh.members`, is right by definition, and no
fault can touch it: what the mesh has beyond it is left over, what it lacks is lost.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from tests.netns.faults.kernels import check_endpoint, check_kernel, check_rules, check_twice
from tests.netns.faults.observation import observe
from tests.netns.faults.reach import probe
from tests.netns.faults.records import (
    check_agent,
    check_claims,
    check_disk,
    check_networks,
    check_store,
)
from tests.netns.faults.wanted import addresses_of, read_nets

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.lab.host import LabHost
    from tests.netns.faults.mesh import FaultMesh, Member
    from tests.netns.faults.observation import Observation, StoreKey

_SHOWN = 20
"""Of the sentences of an error."""


def check(mesh: FaultMesh) -> list[str]:
    """Every invariant that does not hold, as a sentence; none if the mesh is whole."""
    return [*judge(mesh, observe(mesh)), *probe(mesh.members)]


def judge(mesh: FaultMesh, seen: Observation) -> list[str]:
    """Those that can be told from what was seen, without sending a packet."""
    hosts, members = mesh.lab.hosts, mesh.members
    sentences = [*seen.unreadable, *_check_book(members), *check_twice(seen)]
    for host in hosts:
        sentences += check_disk(seen, host, members)
        if host.name in seen.agents:
            sentences += check_agent(seen.agents[host.name], host, hosts, members)
    if seen.store is not None:
        sentences += _judge_by_store(seen, seen.store, hosts, members)
    return sentences


def _judge_by_store(
    seen: Observation, store: dict[str, StoreKey], hosts: list[LabHost], members: list[Member]
) -> list[str]:
    """What can be told once it is known who owns which subnet."""
    try:
        nets, sentences = read_nets(store)
    except (ValueError, KeyError) as error:
        return [f"etcd: its networks cannot be understood: {error}"]
    sentences += check_store(store, nets, hosts, members)
    sentences += check_claims(store, seen.disks, hosts)
    for host in hosts:
        if host.name in seen.kernels:
            kernel = seen.kernels[host.name]
            sentences += check_kernel(kernel, host, hosts, list(nets.values()), members)
        if host.name in seen.agents:
            sentences += check_networks(seen.agents[host.name], host, hosts, nets, members)
    for member in members:
        sentences += check_endpoint(seen, member, nets)
    return sentences + check_rules(seen.kernels, hosts, list(nets.values()))


def wait_whole(mesh: FaultMesh, deadline_s: float) -> float:
    """Wait until every invariant holds; returns how many seconds that took.

    Raises:
        AssertionError: some do not when the time is up; the message has the sentences.
    """
    start = time.monotonic()
    broken: list[str] = []

    def whole() -> bool:
        broken[:] = check(mesh)
        return not broken

    try:
        wait_until(whole, deadline_s, "the mesh is whole")
    except TimeoutError as error:
        more = f"\n… and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        shown = "\n".join(broken[:_SHOWN])
        raise AssertionError(f"not whole after {deadline_s:g} s:\n{shown}{more}") from error
    return time.monotonic() - start


def _check_book(members: Iterable[Member]) -> list[str]:
    """Look for addresses and ids that two endpoints have, in everything that was ever answered."""
    given = Counter(
        (member.network, address) for member in members for address in addresses_of(member.document)
    )
    given.update(("id", member.document["id"]) for member in members)
    return [f"{what} {value} was given {n} times" for (what, value), n in given.items() if n > 1]
