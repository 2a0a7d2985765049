"""Networks, hosts, snapshots and endpoints to test with."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING, Any

from meshnet.backends import Addressing, HostLink, NexthopIds, Underlay, UnderlayPath
from meshnet.backends.table import addressing_of
from meshnet.ipam import choose_subnet
from meshnet.model import (
    Claim,
    Endpoint,
    EndpointId,
    Host,
    HostId,
    MeshSnapshot,
    Network,
    NetworkName,
    Reservations,
    Vni,
)
from meshnet.modes import Mode
from meshnet.plan import LocalView, MeshPlan, plan_mesh
from meshnet.sandbox import NetnsId, ProcessSandbox
from meshnet.wire.mac import endpoint_mac

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from meshnet.model import IpAddress, IpNetwork

IPV4, IPV6 = "10.42.0.0/16", "fd00:42::/48"
ME = HostId("h1")


def make_network(
    name: str = "prod",
    subnets: Sequence[str] = (IPV4,),
    vni: int = 4097,
    **settings: Any,  # noqa: ANN401
) -> Network:
    return Network(
        name=NetworkName(name),
        mode=settings.pop("mode", Mode.VXLAN),
        subnets=tuple(ip_network(s) for s in subnets),
        vni=Vni(vni),
        **settings,
    )


def underlay_ip(number: int, version: int = 4) -> IpAddress:
    """The underlay address of host ``h<number>``."""
    return ip_address(f"10.9.0.{number}" if version == 4 else f"fd09::{number:x}")


def make_snapshot(
    networks: Sequence[Network],
    hosts: int,
    *,
    underlay_version: int = 4,
    dead: Collection[str] = (),
) -> MeshSnapshot:
    """Hosts ``h1`` and on, each with the next free subnet of every network."""
    ids = [HostId(f"h{i}") for i in range(1, hosts + 1)]
    reservations: dict[NetworkName, dict[IpNetwork, HostId]] = {}
    for network in networks:
        taken = reservations.setdefault(network.name, {})
        for host in ids:
            for cidr in network.subnets if addressing_of(network) is Addressing.SUBNETS else ():
                taken[choose_subnet(network, cidr.version, taken)] = host
    addresses = {host: underlay_ip(i, underlay_version) for i, host in enumerate(ids, 1)}
    return MeshSnapshot(
        revision=1,
        networks={n.name: n for n in networks},
        hosts={h: Host(id=h, underlay_ip=ip) for h, ip in addresses.items()},
        alive={
            h: Claim(instance=h, underlay_ip=ip) for h, ip in addresses.items() if h not in dead
        },
        reservations={name: Reservations(owners) for name, owners in reservations.items()},
    )


def make_underlay(
    version: int = 4, peers: int = 0, *, dev: str = "eth0", mtu_bytes: int = 1500
) -> Underlay:
    """The underlay of host ``h1``, with all peers on-link."""
    return Underlay(
        ip=underlay_ip(1, version),
        dev=dev,
        mtu_bytes=mtu_bytes,
        links={dev: HostLink(mtu_bytes, frozenset({underlay_ip(1, version)}))},
        paths={
            underlay_ip(i, version): UnderlayPath(dev, True, mtu_bytes) for i in range(2, peers + 2)
        },
        forwarding_links=(dev,),
    )


def plan_for(
    snapshot: MeshSnapshot,
    underlay: Underlay,
    ids: NexthopIds | None = None,
    *,
    host: HostId = ME,
    endpoints: Sequence[Endpoint] = (),
    addresses: Mapping[NetworkName, tuple[IpAddress, ...]] | None = None,
    expired: Collection[HostId] = (),
    fallen: Collection[tuple[NetworkName, HostId]] = (),
    takeovers: Mapping[NetworkName, str] | None = None,
) -> MeshPlan:
    """The plan of one host, which holds what the snapshot says."""
    local = LocalView(
        host=host,
        subnets={
            name: snapshot.subnets_of(host, name)
            if addressing_of(network) is Addressing.SUBNETS
            else network.subnets
            for name, network in snapshot.networks.items()
        },
        endpoints=endpoints,
        addresses=addresses or {},
        expired=frozenset(expired),
        fallen=frozenset(fallen),
        takeovers=takeovers or {},
    )
    return plan_mesh(snapshot, local, underlay, ids or NexthopIds())


def make_endpoint(
    addresses: Sequence[str] = ("10.42.0.2/24",),
    *,
    identity: str = "0123456789ab",
    ifname: str = "eth0",
    mtu_bytes: int = 1450,
    default_route: bool = True,
) -> Endpoint:
    interfaces = tuple(ip_interface(a) for a in addresses)
    return Endpoint(
        id=EndpointId(identity),
        network=NetworkName("prod"),
        host=ME,
        name=f"e-{identity[:4]}",
        sandbox=ProcessSandbox(pid=1, pid_start_ticks=1, netns=NetnsId(1, 1)),
        ifname=ifname,
        addresses=interfaces,
        gateways=tuple(i.network.network_address + 1 for i in interfaces),
        mac=endpoint_mac(interfaces[0].ip),
        mtu_bytes=mtu_bytes,
        default_route=default_route,
        default_versions=tuple(i.version for i in interfaces) if default_route else (),
    )
