"""Networks: their JSON, and the check whether one can work."""

from __future__ import annotations

from typing import Annotated

import msgspec

from meshnet.backends.table import backend_of, check_mode
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
from meshnet.model import AddressRange, Network, NetworkName, Vni
from meshnet.modes import Mode  # noqa: TC001  msgspec reads it
from meshnet.text import check_name
from meshnet.wire.mtu import MINIMUM_MTU_BYTES


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
        backend_of(network).check_cidr(cidr, network.host_prefix_of(cidr.version))
    if network.mtu_bytes is not None:
        least = MINIMUM_MTU_BYTES[versions[-1]]
        if not least <= network.mtu_bytes <= MAX_MTU_BYTES:
            raise UsageError(
                f"MTU {network.mtu_bytes} is out of range for IPv{versions[-1]}: "
                f"choose {least} to {MAX_MTU_BYTES}"
            )
    check_mode(network)
