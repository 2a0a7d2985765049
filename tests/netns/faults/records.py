"""Whether what is written down agrees with the book: in etcd, on disks, and in agents' answers."""

from __future__ import annotations

import json
from collections import Counter
from ipaddress import ip_address
from itertools import combinations
from typing import TYPE_CHECKING

from tests.netns.faults.kernel_tables import differences
from tests.netns.faults.wanted import Net, addresses_of, mac_of

if TYPE_CHECKING:
    from meshnet.lab.host import LabHost
    from tests.netns.faults.mesh import Member
    from tests.netns.faults.observation import Agent, Disk, Document, Observation, StoreKey
    from tests.netns.faults.wanted import Subnet

_FILES = {"lock", "instance", "mesh.json", "snapshot.json", "firewall.json", "members.json"}
"""What a state directory may hold beside endpoints."""


def check_store(
    store: dict[str, StoreKey],
    nets: dict[str, Net],
    hosts: list[LabHost],
    members: list[Member],
) -> list[str]:
    """Every key has its owner, every owner its keys; subnets are whole and apart."""
    wanted = ["mesh-id", "serial/networks", *(f"mesh/networks/{name}" for name in nets)]
    for host in hosts:
        wanted += [f"mesh/hosts/{host.name}", f"mesh/alive/{host.name}"]
    for member in members:
        wanted.append(f"endpoints/{member.network}/{member.host}/{member.document['id']}")
    # Which subnets there are is looked at below.
    found = [key for key in store if not key.startswith("mesh/subnets/")]
    sentences = differences("etcd", "key", wanted, found)
    for key, value in store.items():
        if bool(value.lease) != key.startswith("mesh/alive/"):
            sentences.append(f"etcd: {key} hangs on lease {value.lease:x}")
    for host in hosts:
        known = store.get(f"mesh/hosts/{host.name}")
        if known is not None and known.document.get("underlay_ip") != str(host.underlay_ip):
            sentences.append(f"etcd: host {host.name} is not at {host.underlay_ip}: {known.value}")
    for net in nets.values():
        sentences += _check_subnets(net, hosts)
    vnis = Counter((net.vni, net.port) for net in nets.values())
    sentences += [f"etcd: VNI {vni} is of {n} networks" for (vni, _), n in vnis.items() if n > 1]
    for one, other in combinations(nets.values(), 2):
        sentences += [
            f"etcd: network {one.name} {a} overlaps {other.name} {b}"
            for a in one.cidrs
            for b in other.cidrs
            if a.version == b.version and a.overlaps(b)
        ]
    for member in members:
        sentences += _check_record(store, nets, member)
    return sentences


def _check_subnets(net: Net, hosts: list[LabHost]) -> list[str]:
    """Each host owns one subnet of each CIDR, within it, of the right size and nobody else's."""
    sentences = []
    names = {host.name for host in hosts}
    owned = [(host, subnet) for host, subnets in net.owned.items() for subnet in subnets]
    for host, subnet in owned:
        if host not in names:
            sentences.append(
                f"etcd: subnet {subnet} of {net.name} is of host {host}, which is gone"
            )
        inside = [c for c in net.cidrs if c.version == subnet.version and subnet.subnet_of(c)]  # type: ignore[arg-type]
        if not inside or subnet.prefixlen != net.prefixes[subnet.version]:
            sentences.append(f"etcd: subnet {subnet} of {host} is no part of network {net.name}")
    for (host, subnet), (other, second) in combinations(owned, 2):
        if subnet.version == second.version and subnet.overlaps(second):
            sentences.append(
                f"etcd: subnet {subnet} of {host} overlaps {second} of {other} in {net.name}"
            )
    for host in sorted(names):
        for cidr in net.cidrs:
            count = sum(s.version == cidr.version for s in net.owned.get(host, ()))
            if count != 1:
                sentences.append(f"etcd: host {host} has {count} subnets of {net.name} {cidr}")
    return sentences


def _check_record(store: dict[str, StoreKey], nets: dict[str, Net], member: Member) -> list[str]:
    """An endpoint's record says what `attach` said, and its addresses are its host's to give."""
    sentences = []
    document = member.document
    name = f"endpoint {document['address']} of {member.network} on {member.host}"
    value = store.get(f"endpoints/{member.network}/{member.host}/{document['id']}")
    if value is not None:
        sentences += _check_saved(f"etcd: {name}", value.document, document)
    net = nets.get(member.network)
    if net is None:
        return [*sentences, f"etcd: network {member.network} of {name} is gone"]
    owned: tuple[Subnet, ...] = net.owned.get(member.host, ())
    for address in map(ip_address, addresses_of(document)):
        home = [s for s in owned if s.version == address.version and address in s]
        if not home or address in (home[0][0], home[0][1]):
            sentences.append(f"etcd: {name}: {address} is not of its host's subnet")
    if document["mac"] != mac_of("endpoint", addresses_of(document)[0]):
        sentences.append(f"{name}: its MAC {document['mac']} is not that of its address")
    return sentences


def _check_saved(where: str, saved: Document, document: Document) -> list[str]:
    """A record, of etcd or of a disk, against what `attach` answered."""
    addresses = [document[key] for key in ("address", "address6") if key in document]
    gateways = [document[key] for key in ("gateway", "gateway6") if key in document]
    wanted = {
        **{key: document[key] for key in ("id", "network", "host", "name", "pid", "ifname")},
        **{
            key: document[key]
            for key in ("mac", "mtu", "default_route", "default_versions", "published")
        },
        "addresses": addresses,
        "gateways": gateways,
    }
    return [
        f"{where}: record has {key} {saved.get(key)!r}, not {value!r}"
        for key, value in wanted.items()
        if saved.get(key) != value
    ]


def check_claims(
    store: dict[str, StoreKey], disks: dict[str, Disk], hosts: list[LabHost]
) -> list[str]:
    """The agent that lives as a host is the one whose state directory that is."""
    sentences = []
    for host in hosts:
        claim, disk = store.get(f"mesh/alive/{host.name}"), disks.get(host.name)
        if claim is not None and disk is not None:
            found = claim.document.get("instance"), claim.document.get("underlay_ip")
            if found != (disk.instance, str(host.underlay_ip)):
                sentences.append(f"etcd: {host.name} is claimed by {found}, not {disk.instance}")
        if disk is not None and "mesh-id" in store and disk.mesh_id != store["mesh-id"].value:
            sentences.append(f"disk of {host.name}: mesh {disk.mesh_id} is not etcd's")
    return sentences


def check_disk(seen: Observation, host: LabHost, members: list[Member]) -> list[str]:
    """One file for each endpoint, saying what `attach` said, and nothing set aside."""
    disk = seen.disks.get(host.name)
    if disk is None:
        return []
    where = f"disk of {host.name}"
    own = {f"{m.document['id']}.json": m.document for m in members if m.host == host.name}
    sentences = differences(where, "file", own, disk.endpoints)
    sentences += [f"{where}: {name} is there" for name in disk.others if name not in _FILES]
    for name, document in own.items():
        if name in disk.endpoints:
            try:
                saved = json.loads(disk.endpoints[name])
            except ValueError as error:
                sentences.append(f"{where}: {name} is no JSON: {error}")
            else:
                sentences += _check_saved(f"{where}: {name}", saved, document)
    return sentences


def check_agent(
    agent: Agent, host: LabHost, hosts: list[LabHost], members: list[Member]
) -> list[str]:
    """It is connected and content, knows all hosts, and lists the endpoints of the book."""
    where, status = f"agent of {host.name}", agent.status
    sentences = []
    own = {"id": host.name, "underlay_ip": str(host.underlay_ip)}
    if not own.items() <= status["host"].items():
        sentences.append(f"{where}: is {status['host']}, not {own}")
    if not status["store"]["connected"] or status["store"]["error"] is not None:
        sentences.append(f"{where}: store {status['store']}")
    sentences += [
        f"{where}: {what}: {status[what]}"
        for what in ("bad_values", "errors", "set_aside")
        if status[what]
    ]
    alive = [f"{row['id']} {row['underlay_ip']} alive" for row in agent.hosts if row["alive"]]
    dead = [f"{row['id']} {row['underlay_ip']} dead" for row in agent.hosts if not row["alive"]]
    wanted = [f"{other.name} {other.underlay_ip} alive" for other in hosts]
    sentences += differences(where, "host", wanted, alive + dead)
    if agent.warning is not None:
        sentences.append(f"{where}: endpoints: {agent.warning}")
    book = [_format_endpoint(member.document) for member in members]
    listed = [_format_endpoint(row) for row in agent.endpoints]
    return sentences + differences(where, "endpoint", book, listed)


def _format_endpoint(document: Document) -> str:
    """All that `attach` and `endpoint ls` both say."""
    return " ".join(f"{k}={v}" for k, v in sorted(document.items()) if k != "agent_ms")


def check_networks(
    agent: Agent, host: LabHost, hosts: list[LabHost], nets: dict[str, Net], members: list[Member]
) -> list[str]:
    """It has every network, in sync, with all peers, and says of hosts what etcd does."""
    where = f"agent of {host.name}"
    rows = agent.status["networks"]
    sentences = differences(where, "network", nets, [row["name"] for row in rows])
    for row in rows:
        here = [m for m in members if (m.network, m.host) == (row["name"], host.name)]
        wanted = {
            "in_sync": True,
            "pending": 0,
            "errors": [],
            "fallen": [],
            "peers": len(hosts) - 1,
            "endpoints": len(here),
        }
        sentences += [
            f"{where}: network {row['name']}: {key} is {row[key]}, not {value}"
            for key, value in wanted.items()
            if row[key] != value
        ]
    for row in agent.hosts:
        for key, version in (("subnets", 4), ("subnets6", 6)):
            owned = {
                net.name: [str(s) for s in net.owned.get(row["id"], ()) if s.version == version]
                for net in nets.values()
                if version == 4 or {c.version for c in net.cidrs} == {4, 6}
            }
            first = {name: subnets[0] for name, subnets in owned.items() if subnets}
            if row[key] != first:
                sentences.append(f"{where}: {key} of {row['id']} are {row[key]}, not {first}")
    return sentences
