"""What must be in the kernels of a mesh: computed from what etcd and the tests' book say.

The rules are those of docs/architecture.md, written a second time.  Nothing of the product is
imported but names of types.  An object is a line of text, as a person would say it to another, so
that a table is a bag of lines and a difference reads as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2s
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from meshnet.lab.host import LabHost
    from tests.netns.faults.mesh import Member
    from tests.netns.faults.observation import Document, StoreKey

Subnet = IPv4Network | IPv6Network

_OVERHEAD_BYTES = {4: 50, 6: 70}
"""Of VXLAN, by the underlay's IP version."""
_ROLES = {"vtep": 0x6D, "gateway": 0x67, "endpoint": 0x65}


@dataclass(frozen=True, slots=True)
class Net:
    """A network of mode ``vxlan``, and who owns which part of it.

    Attributes:
        owned: subnets by host, IPv4 first.
    """

    name: str
    cidrs: tuple[Subnet, ...]
    vni: int
    port: int
    prefixes: dict[int, int]
    mtu: int | None
    owned: dict[str, tuple[Subnet, ...]] = field(default_factory=dict)

    @property
    def bridge(self) -> str:
        """Name of its bridge."""
        return f"mnb{self.vni}"

    @property
    def vtep(self) -> str:
        """Name of its VXLAN device."""
        return f"mnv{self.vni}"


@dataclass(slots=True)
class Wanted:
    """The objects of one host: for each kind, lines of text.

    Attributes:
        loose: addresses that may be there or not.
    """

    links: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    routes: list[str] = field(default_factory=list)
    nexthops: list[str] = field(default_factory=list)
    neighbours: list[str] = field(default_factory=list)
    fdb: list[str] = field(default_factory=list)
    elements: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)


def mac_of(role: str, of: Subnet | str) -> str:
    """The MAC that is computed from a subnet, or from an endpoint's address."""
    if isinstance(of, str):
        address = ip_address(of)
        if address.version == 6:
            first, *rest = blake2s(address.packed, digest_size=5).digest()
            return bytes((first & 0xFC | 2, ord("E"), *rest)).hex(":")
        bits = int(address)
    else:
        bits = int(of.network_address)
        if of.version == 6:
            bits >>= 128 - of.prefixlen
    return bytes((0x02, _ROLES[role], *(bits & 0xFFFF_FFFF).to_bytes(4, "big"))).hex(":")


def link_local(mac: str) -> str:
    """The IPv6 address that is made of a MAC (RFC 4291, appendix A)."""
    raw = bytes.fromhex(mac.replace(":", ""))
    interface_id = bytes((raw[0] ^ 2, *raw[1:3], 0xFF, 0xFE, *raw[3:]))
    return str(IPv6Address(b"\xfe\x80" + bytes(6) + interface_id))


def addresses_of(document: Document) -> list[str]:
    """Of an endpoint's document, without prefix lengths, IPv4 first."""
    return [str(ip_interface(document[k]).ip) for k in ("address", "address6") if k in document]


def read_nets(store: dict[str, StoreKey]) -> tuple[dict[str, Net], list[str]]:
    """The networks of etcd with their reservations, and what is wrong with those."""
    nets: dict[str, Net] = {}
    problems = []
    for key, value in store.items():
        if key.startswith("mesh/networks/"):
            document, name = value.document, key.removeprefix("mesh/networks/")
            if (
                document.get("mode") != "vxlan"
                or document["fallback"]
                or document["direct_routing"]
            ):
                raise ValueError(f"network {name}: plain vxlan is all that is compared")
            nets[name] = Net(
                name,
                tuple(ip_network(cidr) for cidr in document["subnets"]),
                document["vni"],
                document["port"],
                {4: document["host_prefix"], 6: document["host_prefix6"]},
                document["mtu"],
            )
    for key, value in store.items():
        if not key.startswith("mesh/subnets/"):
            continue
        _, _, name, text = key.split("/")
        subnet, host = ip_network(text.replace("-", "/")), value.document.get("host", "")
        if name not in nets:
            problems.append(f"etcd: subnet {subnet} of {host} is of network {name}, which is gone")
        else:
            net = nets[name]
            owned = (*net.owned.get(host, ()), subnet)
            net.owned[host] = tuple(sorted(owned, key=lambda s: (s.version, int(s[0]))))
    return nets, problems


def want_host(
    host: LabHost,
    hosts: Sequence[LabHost],
    nets: Sequence[Net],
    members: Sequence[Member],
    mtu: int,
) -> Wanted:
    """What a host's kernel must hold.

    Args:
        mtu: of the host's link on the underlay, in bytes.
    """
    wanted = Wanted()
    for net in nets:
        own = net.owned.get(host.name, ())
        if own:
            # The kernel makes a bridge's link-local address when a port is up, and keeps it.
            used = any((m.host, m.network) == (host.name, net.name) for m in members)
            local = wanted.addresses if used else wanted.loose
            _want_network(wanted, host, net, own, mtu, local)
            for peer in hosts:
                if peer.name != host.name:
                    _want_peer(wanted, net, own, peer)
    for peer in hosts:
        if peer.name != host.name:
            wanted.elements.append(f"inet members{peer.underlay_ip.version}: {peer.underlay_ip}")
    bridges = {net.name: net.bridge for net in nets}
    for member in members:
        if member.host == host.name:
            _want_member(wanted, member, bridges.get(member.network, "?"))
    return wanted


def _want_network(
    wanted: Wanted,
    host: LabHost,
    net: Net,
    own: tuple[Subnet, ...],
    mtu: int,
    link_locals: list[str],
) -> None:
    underlay = host.underlay_ip
    size = net.mtu if net.mtu is not None else mtu - _OVERHEAD_BYTES[underlay.version]
    gateway = mac_of("gateway", own[0])
    wanted.links += [
        f"bridge {net.bridge} mac {gateway} mtu {size} up",
        f"vxlan {net.vtep} mac {mac_of('vtep', own[0])} mtu {size} up vni {net.vni} "
        f"port {net.port} local {underlay} nolearning",
    ]
    for subnet in own:
        wanted.addresses.append(f"{subnet[1]}/{subnet.prefixlen} on {net.bridge}")
        if subnet.version == 6:
            link_locals.append(f"{link_local(gateway)}/64 on {net.bridge}")
    versions = {subnet.version for subnet in own}
    wanted.routes += [
        f"unreachable {cidr}" for cidr in net.cidrs if cidr.version in versions and cidr not in own
    ]


def _want_peer(wanted: Wanted, net: Net, own: tuple[Subnet, ...], peer: LabHost) -> None:
    subnets = net.owned.get(peer.name, ())
    if not subnets:
        return
    mac = mac_of("vtep", subnets[0])
    sources = {subnet.version: subnet[1] for subnet in own}
    wanted.fdb.append(f"{mac} on {net.vtep} at {peer.underlay_ip}")
    for subnet in subnets:
        if subnet.version in sources:
            gateway = subnet[0] if subnet.version == 4 else link_local(mac)
            via = f"via {gateway} on {net.vtep}"
            wanted.neighbours.append(f"{gateway} on {net.vtep} at {mac}")
            wanted.nexthops.append(via)
            wanted.routes.append(f"unicast {subnet} {via} from {sources[subnet.version]}")


def _want_member(wanted: Wanted, member: Member, bridge: str) -> None:
    document = member.document
    link, mac = f"mne{document['id']}", document["mac"]
    wanted.links.append(f"veth {link} of {bridge} mtu {document['mtu']} up hairpin")
    for address in (*addresses_of(document), link_local(mac)):
        version = ip_address(address).version
        wanted.elements.append(f"bridge sources{version}: {link} {mac} {address}")
        if version == 6:
            wanted.elements.append(f"bridge targets6: {link} {mac} {address}")
    wanted.elements += _published(document)


def _published(document: Document) -> Iterator[str]:
    """Where its published ports lead, for those at all of the host's addresses."""
    for text in document["published"]:
        ports, protocol = text.split("/")
        host_port, port = ports.split(":")
        for address in addresses_of(document):
            version = ip_address(address).version
            yield f"inet published{version}: {protocol} {host_port} {address} {port}"


def want_endpoint(document: Document, net: Net) -> Wanted:
    """What an endpoint's namespace must hold, beside ``lo`` and what the kernel adds by itself."""
    ifname, mac = document["ifname"], document["mac"]
    wanted = Wanted(links=[f"veth {ifname} mac {mac} mtu {document['mtu']} up"])
    wanted.addresses.append(f"{link_local(mac)}/64 on {ifname}")
    for key, gateway in (("address", "gateway"), ("address6", "gateway6")):
        if key not in document:
            continue
        interface = ip_interface(document[key])
        wanted.addresses.append(f"{interface} on {ifname}")
        leads = ["default"]
        if interface.version not in document["default_versions"]:
            leads = [str(cidr) for cidr in net.cidrs if cidr.version == interface.version]
        wanted.routes += [f"unicast {lead} via {document[gateway]} on {ifname}" for lead in leads]
    return wanted
