"""Networks: their JSON, and which of them can work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from meshnet.codec.document import (
    MAX_MTU_BYTES,
    MAX_VNI,
    AddressField,
    BadValueError,
    IfnameField,
    MtuField,
    NameField,
    PortField,
    PrefixField,
    VniField,
    address_field,
    decode,
    network_field,
)
from meshnet.errors import UsageError
from meshnet.ipam import check_host_prefix
from meshnet.model import AddressRange, Mode, Network, NetworkName, Vni
from meshnet.text import IFNAME_PATTERN, check_name
from meshnet.wire.mtu import MINIMUM_MTU_BYTES

if TYPE_CHECKING:
    from meshnet.model import IpNetwork

_LEAST_ADDRESSES = 4
"""Of a network that is not cut into host subnets: its own, the gateway's, one, the broadcast."""


class _NetworkV1(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag=1):
    name: NameField
    mode: Mode
    subnets: Annotated[list[AddressField], msgspec.Meta(max_length=2)]
    vni: VniField
    port: PortField
    host_prefix: PrefixField
    host_prefix6: PrefixField
    mtu: MtuField | None = None
    direct_routing: bool = False
    fallback: bool = False
    parent: IfnameField | None = None
    ranges: Annotated[list[tuple[AddressField, AddressField]], msgspec.Meta(max_length=2)] = []
    gateways: Annotated[list[AddressField], msgspec.Meta(max_length=2)] = []
    internal: bool = False
    host_access: bool = False


# Made once: making one costs more than using it a hundred times.
_decoder = msgspec.json.Decoder(_NetworkV1)


def encode_network(network: Network) -> bytes:
    """The value of a network's key."""
    return msgspec.json.encode(
        _NetworkV1(
            name=network.name,
            mode=network.mode,
            subnets=[str(s) for s in network.subnets],
            vni=network.vni,
            port=network.port,
            host_prefix=network.host_prefix,
            host_prefix6=network.host_prefix6,
            mtu=network.mtu_bytes,
            direct_routing=network.direct_routing,
            fallback=network.fallback,
            parent=network.parent,
            ranges=[(str(r.first), str(r.last)) for r in network.ranges],
            gateways=[str(g) for g in network.gateways],
            internal=network.internal,
            host_access=network.host_access,
        )
    )


def decode_network(raw: bytes) -> Network:
    """Read a network.

    Raises:
        BadValueError: malformed JSON, a field out of range, or CIDRs that make no network.
    """
    value = decode(_decoder, raw)
    network = Network(
        name=NetworkName(value.name),
        mode=value.mode,
        subnets=tuple(network_field(s) for s in value.subnets),
        vni=Vni(value.vni),
        port=value.port,
        host_prefix=value.host_prefix,
        host_prefix6=value.host_prefix6,
        mtu_bytes=value.mtu,
        direct_routing=value.direct_routing,
        fallback=value.fallback,
        parent=value.parent,
        ranges=tuple(
            AddressRange(address_field(first), address_field(last)) for first, last in value.ranges
        ),
        gateways=tuple(address_field(g) for g in value.gateways),
        internal=value.internal,
        host_access=value.host_access,
    )
    try:
        check_network(network)
    except UsageError as error:
        raise BadValueError(str(error)) from error
    return network


def check_network(network: Network) -> None:
    """Refuse a network that cannot work, whoever made it.

    Raises:
        UsageError: bad name, VNI, port or MTU, no or too many CIDRs, CIDRs that host subnets do
            not fit into, or a setting that the mode does not have or misses.
    """
    check_name("network", network.name)
    if not 1 <= network.vni <= MAX_VNI:
        raise UsageError(f"VNI {network.vni} is out of range: choose 1 to {MAX_VNI}")
    if not 1 <= network.port <= 65535:
        raise UsageError(f"port {network.port} is out of range: choose 1 to 65535")
    versions = [s.version for s in network.subnets]
    if not versions or versions != sorted(set(versions)):
        raise UsageError(
            f"network {network.name} has {len(versions)} subnets of IP versions {versions}: "
            "give one IPv4 CIDR, one IPv6 CIDR, or one of each"
        )
    for cidr in network.subnets:
        if cidr.is_multicast or cidr.is_loopback or cidr.is_link_local or cidr.prefixlen == 0:
            raise UsageError(
                f"{cidr} cannot be routed: choose a private CIDR, such as 10.42.0.0/16"
            )
        if network.mode.is_overlay:
            check_host_prefix(cidr, network.host_prefix_of(cidr.version))
        elif cidr.num_addresses < _LEAST_ADDRESSES:
            raise UsageError(f"{cidr} has no room for endpoints: choose a shorter prefix")
    if network.mtu_bytes is not None:
        least = MINIMUM_MTU_BYTES[versions[-1]]
        if not least <= network.mtu_bytes <= MAX_MTU_BYTES:
            raise UsageError(
                f"MTU {network.mtu_bytes} is out of range for IPv{versions[-1]}: "
                f"choose {least} to {MAX_MTU_BYTES}"
            )
    _check_mode_settings(network)
    if network.fallback and network.port == network.fallback_port:
        raise UsageError(
            f"port {network.port} is that of the fallback of VNI {network.vni}: choose another"
        )


def _check_mode_settings(network: Network) -> None:
    """Refuse what a network's mode does not have, and what it cannot do without."""
    mode = network.mode
    if network.fallback and mode is not Mode.VXLAN:
        raise UsageError(f"mode {mode} has no fallback: it is for mode vxlan")
    if network.direct_routing and not mode.is_overlay:
        raise UsageError(f"mode {mode} has no direct routing: it is for modes vxlan and udp")
    if network.host_access and mode is not Mode.MACVLAN:
        raise UsageError(f"mode {mode} needs no --host-access: it is for mode macvlan")
    if not mode.is_underlay:
        for setting, given in (
            ("--parent", network.parent),
            ("--range", network.ranges),
            ("--gateway", network.gateways),
        ):
            if given:
                raise UsageError(
                    f"mode {mode} has no {setting}: it is for modes macvlan and underlay-bridge"
                )
        return
    if network.parent is None or not IFNAME_PATTERN.fullmatch(network.parent):
        reason = f"{network.parent!r} is no name of a link" if network.parent else "none is given"
        raise UsageError(
            f"mode {mode} needs --parent, the hosts' link on the physical network, such as eth0: "
            f"{reason}"
        )
    for kind, versions in (
        ("--range", [r.version for r in network.ranges]),
        ("--gateway", [g.version for g in network.gateways]),
    ):
        if len(versions) > len(set(versions)):
            raise UsageError(f"network {network.name} has two of {kind} for one IP version")
    cidrs: dict[int, IpNetwork] = {c.version: c for c in network.subnets}
    for gateway in network.gateways:
        if gateway.version not in cidrs or gateway not in cidrs[gateway.version]:
            raise UsageError(
                f"gateway {gateway} is not within {', '.join(map(str, network.subnets))}: give the "
                "router of the physical network"
            )
    for addresses in network.ranges:
        cidr = cidrs.get(addresses.version)
        within = cidr is not None and addresses.first in cidr and addresses.last in cidr
        if not within or int(addresses.first) > int(addresses.last):
            what = f"is not within {', '.join(map(str, network.subnets))}"
            raise UsageError(
                f"range {addresses} {'ends before it begins' if within else what}: give the first "
                "and the last address for endpoints, such as 192.0.2.100-192.0.2.199"
            )
