"""Whether a kernel holds exactly what the hosts of a simulated mesh ask for.

Looks with ip(8) and bridge(8), not with the agent's own code; compares object by object: nothing
is missing, nothing is there twice, and nothing is there that nobody asked for.  Which ids nexthop
objects have is the agent's choice, so routes are compared through them.
"""

from __future__ import annotations

import json
from collections import Counter
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench.simulated import OVERLAY, OVERLAY6, TUNNEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from meshnet.lab.commands import Namespace
    from tests.bench.simulated import SimulatedHost, SimulatedMesh

_PROTOCOL = 109
_FIRST_ID, _LAST_ID = 0x6D00_0000, 0x6DFF_FFFF
_TIMEOUT_S = 120.0

Row = tuple[str, ...]
"""What identifies an object, and its content."""


class _Tables(NamedTuple):
    """Objects, each as often as it is there."""

    routes: Counter[Row]
    nexthops: Counter[Row]
    neighbours: Counter[Row]
    fdb: Counter[Row]


def differences(
    namespace: Namespace, mesh: SimulatedMesh, others: Sequence[SimulatedHost] = ()
) -> list[str]:
    """How the kernel of an agent differs from what its mesh asks for, in words; empty: it does not.

    Args:
        namespace: the agent's.
        others: further, real hosts that are not in `mesh`.
    """
    found, complaints = _read(namespace)
    wanted = _expect(mesh, (*mesh.hosts.values(), *others))
    for kind in _Tables._fields:
        complaints += _compare(kind, getattr(wanted, kind), getattr(found, kind))
    return complaints


def count_objects(namespace: Namespace) -> int:
    """How many routes, nexthop objects, neighbours and FDB entries of an agent there are."""
    return sum(table.total() for table in _read(namespace)[0])


def _expect(mesh: SimulatedMesh, hosts: Iterable[SimulatedHost]) -> _Tables:
    tables = _Tables(Counter(), Counter(), Counter(), Counter())
    for host in hosts:
        for subnet, packed, mac_bytes in mesh.addressing(host):
            gateway, mac = str(ip_address(packed)), mac_bytes.hex(":")
            tables.routes[str(subnet), "via", gateway] += 1
            tables.nexthops[gateway, TUNNEL] += 1
            tables.neighbours[gateway, mac] += 1
            if subnet.version == 4:  # one for both IP versions
                tables.fdb[mac, str(host.underlay_ip)] += 1
    tables.routes[str(OVERLAY), "unreachable"] += 1
    if mesh.dual_stack:
        tables.routes[str(OVERLAY6), "unreachable"] += 1
    return tables


def _read(namespace: Namespace) -> tuple[_Tables, list[str]]:
    """What is there, and complaints about what cannot be compared."""
    complaints: list[str] = []
    tables = _Tables(Counter(), Counter(), Counter(), Counter())
    gateways: dict[int, str] = {}
    for nexthop in _list(namespace, "ip", "-j", "nexthop"):
        # Objects of others differ from ours in their id or their protocol.
        if not _FIRST_ID <= nexthop["id"] <= _LAST_ID or not _is_ours(nexthop):
            continue
        gateway = str(ip_address(nexthop["gateway"]))
        gateways[nexthop["id"]] = gateway
        tables.nexthops[gateway, nexthop["dev"]] += 1
        if "onlink" not in nexthop["flags"]:
            complaints.append(f"nexthop {nexthop['id']} is not onlink")
    for family in ("-4", "-6"):
        command = ("ip", family, "-j", "route", "show", "proto", str(_PROTOCOL))
        for route in _list(namespace, *command):
            prefix = str(ip_network(route["dst"]))
            if route.get("type") == "unreachable":
                tables.routes[prefix, "unreachable"] += 1
            elif "nhid" not in route:
                complaints.append(f"route {prefix} has no nexthop object")
            else:
                gateway = gateways.get(route["nhid"], f"unknown object {route['nhid']}")
                tables.routes[prefix, "via", gateway] += 1
        neighbours = ("ip", family, "-j", "neigh", "show", "dev", TUNNEL, "nud", "permanent")
        for neighbour in _list(namespace, *neighbours):
            tables.neighbours[str(ip_address(neighbour["dst"])), neighbour["lladdr"]] += 1
    for entry in _list(namespace, "bridge", "-j", "fdb", "show", "dev", TUNNEL):
        tables.fdb[entry["mac"], entry.get("dst", "nowhere")] += 1
    return tables, complaints


def _compare(kind: str, wanted: Counter[Row], found: Counter[Row]) -> list[str]:
    singular = kind.removesuffix("s")
    missing = [f"{singular} {' '.join(row)} is missing" for row in wanted - found]
    twice = [
        f"{singular} {' '.join(r)} is there {found[r]} times"
        for r in wanted & found
        if found[r] > wanted[r]
    ]
    extra = [f"{singular} {' '.join(row)} is nobody's" for row in found if row not in wanted]
    return missing + twice + extra


def _is_ours(document: dict[str, Any]) -> bool:
    return str(document.get("protocol")) == str(_PROTOCOL)


def _list(namespace: Namespace, *command: str) -> list[dict[str, Any]]:
    output = namespace.run(command, timeout=_TIMEOUT_S).stdout
    return json.loads(output) if output.strip() else []
