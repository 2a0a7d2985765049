"""Whether every kernel and every endpoint's namespace holds what it must, and nothing else."""

from __future__ import annotations

from collections import Counter, defaultdict
from ipaddress import ip_interface
from typing import TYPE_CHECKING

from tests.netns.faults import kernel_tables as tables
from tests.netns.faults.kernel_tables import differences
from tests.netns.faults.wanted import addresses_of, want_endpoint, want_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.lab.host import LabHost
    from tests.netns.faults.mesh import Member
    from tests.netns.faults.observation import Kernel, Observation
    from tests.netns.faults.wanted import Net

_UPLINK = "eth0"


def check_kernel(
    kernel: Kernel,
    host: LabHost,
    hosts: list[LabHost],
    nets: Sequence[Net],
    members: list[Member],
) -> list[str]:
    """A host's links, addresses, routes, nexthops, neighbours, FDB and nft elements."""
    where = f"kernel of {host.name}"
    uplink = next((link for link in kernel.links if link["ifname"] == _UPLINK), None)
    if uplink is None:
        return [f"{where}: {_UPLINK} is gone"]
    if str(host.underlay_ip) not in [row["local"] for row in uplink["addr_info"]]:
        return [f"{where}: {_UPLINK} has not {host.underlay_ip}"]
    wanted = want_host(host, hosts, nets, members, uplink["mtu"])
    addresses = [a for a in tables.addresses(kernel) if a not in wanted.loose]
    sentences = [
        *differences(where, "link", wanted.links, tables.links(kernel)),
        *differences(where, "address", wanted.addresses, addresses),
        *differences(where, "nexthop", wanted.nexthops, tables.nexthops(kernel)),
        *differences(where, "route", wanted.routes, tables.routes(kernel)),
        *differences(where, "neighbour", wanted.neighbours, tables.neighbours(kernel)),
        *differences(where, "FDB entry", wanted.fdb, tables.fdb(kernel)),
        *differences(where, "table", ("bridge meshnet", "inet meshnet"), tables.tables(kernel)),
        *differences(where, "element", wanted.elements, tables.elements(kernel)),
    ]
    own = [m for m in members if m.host == host.name]
    macs = {a: m.document["mac"] for m in own for a in addresses_of(m.document)}
    for address, mac in tables.learned_neighbours(kernel):
        if macs.get(address, mac) != mac:
            sentences.append(f"{where}: {address} is believed at {mac}, not {macs[address]}")
    ports = {f"mne{m.document['id']}": m.document["mac"] for m in own}
    for port, mac in tables.learned_macs(kernel):
        if ports.get(port) != mac:
            sentences.append(f"{where}: {mac} is believed behind {port}, not {ports.get(port)}")
    return sentences


def check_rules(kernels: dict[str, Kernel], hosts: list[LabHost], nets: Sequence[Net]) -> list[str]:
    """Rules are the same everywhere but for a host's own addresses: what one host alone lacks or
    has beside the others was damaged."""
    found: dict[str, Counter[str]] = {}
    for host in hosts:
        if host.name in kernels:
            own = {str(host.underlay_ip): "UNDERLAY"}
            for net in nets:
                for subnet in net.owned.get(host.name, ()):
                    own[str(subnet)] = f"SUBNET{subnet.version} OF {net.name}"
            found[host.name] = Counter(tables.rules(kernels[host.name], own))
    holders: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, rules in found.items():
        for rule, count in rules.items():
            holders[rule, count].append(name)
    return [
        f"kernel of {' and '.join(names)}, not of all hosts, has {count} × {rule}"
        for (rule, count), names in holders.items()
        if len(names) < len(found)
    ]


def check_endpoint(seen: Observation, member: Member, nets: dict[str, Net]) -> list[str]:
    """An endpoint has its link, its addresses and its routes, and none besides."""
    document = member.document
    where = f"endpoint {document['address']} of {member.network} on {member.host}"
    kernel = seen.namespaces.get(member.container.pid)
    if kernel is None or member.network not in nets:
        return []  # that has been said
    wanted = want_endpoint(document, nets[member.network])
    return [
        *differences(where, "link", wanted.links, tables.endpoint_links(kernel)),
        *differences(where, "address", wanted.addresses, tables.endpoint_addresses(kernel)),
        *differences(where, "route", wanted.routes, tables.endpoint_routes(kernel)),
    ]


def check_twice(seen: Observation) -> list[str]:
    """No address is at two places, of hosts and endpoints alike."""
    places: dict[str, list[str]] = defaultdict(list)
    for where, kernel in [
        *((f"host {name}", kernel) for name, kernel in seen.kernels.items()),
        *((f"process {pid}", kernel) for pid, kernel in seen.namespaces.items()),
    ]:
        for link in kernel.links:
            for row in link["addr_info"]:
                if row["scope"] == "global":
                    address = str(ip_interface(row["local"]).ip)
                    places[address].append(f"{link['ifname']} of {where}")
    return [
        f"address {address} is at {' and '.join(found)}"
        for address, found in places.items()
        if len(found) > 1
    ]
