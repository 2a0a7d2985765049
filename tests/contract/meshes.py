"""Meshes to bring a host under test in step with."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from meshnet.backends import NexthopIds
from meshnet.diff import diff
from meshnet.modes import Mode
from tests.contract.hosts import UNDERLAY_DEV
from tests.values import (
    IPV4,
    IPV6,
    make_endpoint,
    make_network,
    make_snapshot,
    plan_for,
    underlay_ip,
)

if TYPE_CHECKING:
    from meshnet.model import Network
    from meshnet.state import KernelState
    from meshnet.tables import Failure
    from tests.contract.hosts import HostUnderTest

DUAL = make_network(subnets=(IPV4, IPV6))
PHYSICAL = make_network(
    "phys", ("10.9.0.0/16", "fd09::/64"), 9, mode=Mode.MACVLAN, parent=UNDERLAY_DEV,
    host_access=True,
)  # fmt: skip
OWN = (ip_address("10.9.8.1"), ip_address("fd09::8:1"))
"""The host's own addresses of that network's pool."""
ENDPOINT = replace(
    make_endpoint(("10.9.8.2/16", "fd09::8:2/64")), network=PHYSICAL.name, parent=UNDERLAY_DEV
)
MESHES = {
    "IPv4": ([make_network()], 4),
    "dual-stack": ([DUAL], 4),
    "IPv6-only": ([make_network(subnets=(IPV6,))], 4),
    "IPv6 underlay": ([DUAL], 6),
    "direct routing": ([make_network(direct_routing=True)], 4),
    "macvlan": ([PHYSICAL], 4),
    "macvlan beside VXLAN": ([DUAL, PHYSICAL], 4),
    "two networks": ([make_network(), make_network("test", ("10.43.0.0/16",), 7, port=4790)], 4),
}


def desired_for(
    host: HostUnderTest,
    networks: list[Network],
    *,
    hosts: int = 4,
    underlay_version: int = 4,
) -> KernelState:
    """What the host should hold as one of `hosts`."""
    snapshot = make_snapshot(networks, hosts, underlay_version=underlay_version)
    peers = [h.underlay_ip for h in snapshot.hosts.values() if h.id != "h1"]
    underlay = host.kernel.observe(underlay_ip(1, underlay_version), None)
    underlay = replace(underlay, paths=host.kernel.find_paths(peers))
    actual = host.kernel.dump()
    ids = NexthopIds()
    ids.adopt(actual.nexthops, actual.foreign_nexthop_ids)
    own = {PHYSICAL.name: OWN} if PHYSICAL in networks else {}
    endpoints = [ENDPOINT] if own else []
    plan = plan_for(snapshot, underlay, ids, endpoints=endpoints, addresses=own)
    assert all(not outcome.errors for outcome in plan.networks.values())
    return plan.state


def converge(host: HostUnderTest, desired: KernelState) -> tuple[int, list[Failure]]:
    """Apply until there is nothing to do; returns the passes that took, and their failures."""
    failures: list[Failure] = []
    for passes in range(4):
        ops = diff(desired, host.kernel.dump())
        if not ops:
            return passes, failures
        failures += host.kernel.apply(ops)
    pytest.fail(f"still to do: {[str(op) for op in ops]}, {[str(f) for f in failures]}")
