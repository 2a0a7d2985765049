"""Hypothesis strategies for the values of a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from meshnet.backends import Setting, Underlay, UnderlayPath
from meshnet.backends.table import BACKENDS
from meshnet.codec.document import MAX_MTU_BYTES, MAX_PID, MAX_VNI
from meshnet.ipam import choose_subnet
from meshnet.model import (
    AddressRange,
    Claim,
    Datapath,
    Endpoint,
    EndpointId,
    Host,
    HostId,
    MeshSnapshot,
    Network,
    NetworkName,
    Protocol,
    PublishedPort,
    Reservations,
    Vni,
)
from meshnet.modes import Mode
from meshnet.plan import LocalView
from meshnet.sandbox import HoldSandbox, NetnsId, ProcessSandbox
from meshnet.text import OWNER_PATTERN

if TYPE_CHECKING:
    from meshnet.model import IpAddress, IpNetwork

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"

names = st.from_regex(NAME, fullmatch=True)
macs = st.binary(min_size=6, max_size=6)
octets = st.integers(1, 250)


@st.composite
def cidrs(draw: st.DrawFn, version: int) -> IpNetwork:
    """A private CIDR."""
    if version == 4:
        length = draw(st.integers(9, 24))
        address = (10 << 24) | (draw(st.integers(0, (1 << 24) - 1)))
        return IPv4Network((address >> (32 - length) << (32 - length), length))
    length = draw(st.integers(16, 56))
    address = (0xFD << 120) | draw(st.integers(0, (1 << 120) - 1))
    return IPv6Network((address >> (128 - length) << (128 - length), length))


@st.composite
def networks(draw: st.DrawFn, *, mode: Mode | None = None) -> Network:
    """A network that `check_network` accepts."""
    versions = draw(st.sampled_from([(4,), (6,), (4, 6)]))
    subnets = tuple(draw(cidrs(version)) for version in versions)
    prefixes = {4: 24, 6: 64}
    for cidr in subnets:
        longest = min(cidr.max_prefixlen - 2, cidr.prefixlen + 32)
        prefixes[cidr.version] = draw(st.integers(cidr.prefixlen, longest))
    chosen = mode or draw(st.sampled_from(Mode))
    settings = BACKENDS[chosen].settings
    physical: list[IpNetwork] = list(subnets) if Setting.PARENT in settings else []
    return Network(
        name=NetworkName(draw(names)),
        mode=chosen,
        subnets=subnets,
        vni=Vni(draw(st.integers(1, MAX_VNI))),
        port=draw(st.integers(1, 19999) | st.integers(30000, 65535)),
        host_prefix=prefixes[4],
        host_prefix6=prefixes[6],
        mtu_bytes=draw(st.none() | st.integers(1280, MAX_MTU_BYTES)),
        direct_routing=Setting.DIRECT_ROUTING in settings and draw(st.booleans()),
        fallback=Setting.FALLBACK in settings and draw(st.booleans()),
        parent="eth0" if physical else None,
        ranges=tuple(AddressRange(s[1], s[2]) for s in physical if draw(st.booleans())),
        gateways=tuple(s[1] for s in physical if draw(st.booleans())),
        internal=draw(st.booleans()),
        host_access=Setting.HOST_ACCESS in settings and draw(st.booleans()),
    )


@st.composite
def underlay_ips(draw: st.DrawFn, version: int | None = None) -> IpAddress:
    """An address that a host may have on the underlay, apart from all `cidrs`."""
    if (version or draw(st.sampled_from([4, 6]))) == 4:
        return ip_address(f"192.168.{draw(octets)}.{draw(octets)}")
    return ip_address(f"2001:db8::{draw(octets):x}:{draw(octets):x}")


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    return Host(
        id=HostId(draw(names)),
        underlay_ip=draw(underlay_ips()),
        datapath=draw(st.sampled_from(Datapath)),
    )


@st.composite
def published_ports(draw: st.DrawFn) -> PublishedPort:
    numbers = st.integers(1, 65535)
    address = draw(st.none() | underlay_ips())
    return PublishedPort(draw(st.sampled_from(Protocol)), draw(numbers), draw(numbers), address)


_numbers = st.integers(0, (1 << 63) - 1)
_namespaces = st.builds(NetnsId, _numbers, _numbers)
_sandboxes = st.builds(
    ProcessSandbox,
    pid=st.integers(1, MAX_PID),
    pid_start_ticks=_numbers,
    netns=_namespaces,
) | st.builds(
    HoldSandbox,
    path=st.from_regex(r"/[^\x00-\x1f\x7f]{0,40}", fullmatch=True),
    netns=_namespaces,
    owner=st.from_regex(OWNER_PATTERN, fullmatch=True),
    boot_id=st.from_regex(r"[0-9a-f-]{0,36}", fullmatch=True),
)


@st.composite
def endpoints(draw: st.DrawFn) -> Endpoint:
    versions = draw(st.sampled_from([(4,), (6,), (4, 6)]))
    texts = {4: f"10.1.2.{draw(octets)}/24", 6: f"fd00::{draw(octets):x}/64"}
    addresses = tuple(ip_interface(texts[v]) for v in versions)
    return Endpoint(
        id=EndpointId(draw(st.from_regex(r"[0-9a-f]{12}", fullmatch=True))),
        network=NetworkName(draw(names)),
        host=HostId(draw(names)),
        name=draw(names),
        sandbox=draw(_sandboxes),
        ifname=draw(st.from_regex(r"[A-Za-z0-9_.-]{1,15}", fullmatch=True)),
        addresses=addresses,
        gateways=tuple(a.network.network_address + 1 for a in addresses),
        mac=draw(macs),
        mtu_bytes=draw(st.integers(576, MAX_MTU_BYTES)),
        default_route=draw(st.booleans()),
        default_versions=tuple(v for v in versions if draw(st.booleans())),
        parent=draw(st.none() | st.just("eth0")),
        published=tuple(draw(st.lists(published_ports(), max_size=3))),
    )


@dataclass(frozen=True)
class Scene:
    """All that `plan_mesh` looks at, as host ``h0`` sees it."""

    snapshot: MeshSnapshot
    local: LocalView
    underlay: Underlay


POOL = (
    Network(
        name=NetworkName("v4"), mode=Mode.VXLAN, subnets=(IPv4Network("10.42.0.0/16"),),
        vni=Vni(4097),
    ),
    Network(
        name=NetworkName("dual"), mode=Mode.VXLAN, vni=Vni(4098),
        subnets=(IPv4Network("10.43.0.0/16"), IPv6Network("fd43::/48")),
    ),
    Network(
        name=NetworkName("v6"), mode=Mode.VXLAN, subnets=(IPv6Network("fd44::/48"),),
        vni=Vni(4099), port=4790,
    ),
    Network(
        name=NetworkName("direct"), mode=Mode.VXLAN, subnets=(IPv4Network("10.45.0.0/16"),),
        vni=Vni(4100), direct_routing=True,
    ),
    Network(
        name=NetworkName("v4"), mode=Mode.VXLAN, subnets=(IPv4Network("10.42.0.0/16"),),
        vni=Vni(4097), port=4791, direct_routing=True,
    ),
    Network(
        name=NetworkName("back"), mode=Mode.VXLAN, vni=Vni(4101), fallback=True,
        subnets=(IPv4Network("10.46.0.0/16"), IPv6Network("fd46::/48")),
    ),
)  # fmt: skip
"""Few, so that two scenes have much in common; one of them is the first one changed."""


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """A mesh of up to six hosts, some dead, some expired, some with a subnet less than others."""
    chosen = draw(st.lists(st.sampled_from(POOL), max_size=3, unique_by=lambda n: n.name))
    ids = [HostId(f"h{i}") for i in range(draw(st.integers(1, 6)))]
    version = draw(st.sampled_from([4, 4, 6]))
    found = {
        host: Host(
            id=host,
            underlay_ip=ip_address(f"192.0.2.{i + 1}" if version == 4 else f"fd09::{i + 1}"),
        )
        for i, host in enumerate(ids)
    }
    reservations: dict[NetworkName, dict[IpNetwork, HostId]] = {}
    for network in chosen:
        taken = reservations.setdefault(network.name, {})
        for host in draw(st.permutations(ids)):
            for cidr in network.subnets:
                if draw(st.integers(0, 9)):
                    taken[choose_subnet(network, cidr.version, taken)] = host
    snapshot = MeshSnapshot(
        revision=1,
        networks={n.name: n for n in chosen},
        hosts={h: v for h, v in found.items() if h == "h0" or draw(st.integers(0, 9))},
        alive={h: Claim(instance=h, underlay_ip=v.underlay_ip) for h, v in found.items()},
        reservations={name: Reservations(owners) for name, owners in reservations.items()},
    )
    paths = {
        host.underlay_ip: UnderlayPath(
            "eth0", draw(st.booleans()), draw(st.sampled_from([1500, 1400]))
        )
        for host in found.values()
    }
    return Scene(
        snapshot,
        LocalView(
            host=HostId("h0"),
            subnets={n: snapshot.subnets_of(HostId("h0"), n) for n in snapshot.networks},
            expired=frozenset(draw(st.sets(st.sampled_from(ids), max_size=2))),
            fallen=frozenset(
                (NetworkName("back"), h) for h in draw(st.sets(st.sampled_from(ids), max_size=2))
            ),
        ),
        Underlay(
            ip=found[HostId("h0")].underlay_ip,
            dev="eth0",
            mtu_bytes=1500,
            paths=paths,
            forwarding_links=("eth0",),
            ra_links=draw(st.sampled_from([(), ("eth0",)])),
            nexthop_objects=draw(st.booleans()),
        ),
    )
