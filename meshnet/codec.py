"""JSON of the store's values: versioned, validated on read, one document a key.

Values in etcd are hostile input (design decision D14): whatever is there, `decode_…` either
returns a value of `meshnet.model` that is safe to act on or raises `BadValueError` saying why.
Fields that a newer version added are ignored; another ``v`` is refused.

Pure: imports no socket, file, clock or trio.  Layout of the keys: `meshnet.store.registry`.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from meshnet.errors import MeshnetError, UsageError
from meshnet.ipam import check_host_prefix
from meshnet.model import (
    AddressHolder,
    AddressRange,
    Claim,
    Datapath,
    Endpoint,
    EndpointId,
    Host,
    HostId,
    Mode,
    Network,
    NetworkName,
    Protocol,
    PublishedPort,
    Reservation,
    Vni,
)
from meshnet.wire.mtu import MINIMUM_MTU_BYTES

if TYPE_CHECKING:
    from meshnet.model import IpAddress, IpNetwork

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
NAME_PATTERN = re.compile(_NAME)
IFNAME_PATTERN = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9_.-]{1,15}")
MAX_VALUE_BYTES = 64 * 1024
MAX_VNI = (1 << 24) - 1
MAX_MTU_BYTES = 65_535
_BROADCAST = IPv4Address("255.255.255.255")
MAX_PID = 1 << 22
"""PID_MAX_LIMIT of linux/threads.h."""
MAX_REASON = 300
"""Characters of what is said of a bad value: it is shown, logged and kept."""
_LEAST_ADDRESSES = 4
"""Of a network that is not cut into host subnets: its own, the gateway's, one, the broadcast."""


class BadValueError(MeshnetError):
    """A value of the store is malformed, of another version, or contradicts its key.

    The message is one line of at most `MAX_REASON` printable characters, whatever it quotes.
    """

    exit_status = 2

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason, MAX_REASON))


def printable(text: str, most: int) -> str:
    """Text that a terminal, a log and a JSON document can take: cut, and escaped where need be."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most]
    )
    return shown if len(shown) <= most and len(text) <= most else f"{shown[: most - 1]}…"


_Name = Annotated[str, msgspec.Meta(pattern=rf"^{_NAME}\Z")]
_VniField = Annotated[int, msgspec.Meta(ge=1, le=MAX_VNI)]
_PortField = Annotated[int, msgspec.Meta(ge=1, le=65535)]
_AddressField = Annotated[str, msgspec.Meta(max_length=64)]
_PrefixField = Annotated[int, msgspec.Meta(ge=0, le=128)]
_PidField = Annotated[int, msgspec.Meta(ge=1, le=MAX_PID)]
_NumberField = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_MtuField = Annotated[int, msgspec.Meta(ge=MINIMUM_MTU_BYTES[4], le=MAX_MTU_BYTES)]
_IfnameField = Annotated[str, msgspec.Meta(pattern=rf"^{IFNAME_PATTERN.pattern}\Z")]
_MacField = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2}:){5}[0-9a-f]{2}\Z")]


class _NetworkV1(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag=1):
    name: _Name
    mode: Mode
    subnets: Annotated[list[_AddressField], msgspec.Meta(max_length=2)]
    vni: _VniField
    port: _PortField
    host_prefix: _PrefixField
    host_prefix6: _PrefixField
    mtu: _MtuField | None = None
    direct_routing: bool = False
    fallback: bool = False
    parent: _IfnameField | None = None
    ranges: Annotated[list[tuple[_AddressField, _AddressField]], msgspec.Meta(max_length=2)] = []
    gateways: Annotated[list[_AddressField], msgspec.Meta(max_length=2)] = []
    internal: bool = False
    host_access: bool = False


class _HostV1(msgspec.Struct, frozen=True, tag_field="v", tag=1):
    id: _Name
    underlay_ip: _AddressField
    datapath: Datapath = Datapath.KERNEL


class _ReservationV1(msgspec.Struct, frozen=True, tag_field="v", tag=1):
    host: _Name


class _ClaimV1(msgspec.Struct, frozen=True, tag_field="v", tag=1):
    instance: Annotated[str, msgspec.Meta(max_length=64)]
    underlay_ip: _AddressField


class _PublishedV1(msgspec.Struct, frozen=True):
    protocol: Protocol
    host_port: _PortField
    port: _PortField
    host_ip: _AddressField | None = None


class _EndpointV1(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag=1):
    id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{12}\Z")]
    network: _Name
    host: _Name
    name: _Name
    pid: _PidField
    ifname: _IfnameField
    addresses: Annotated[list[_AddressField], msgspec.Meta(min_length=1, max_length=2)]
    gateways: Annotated[list[_AddressField], msgspec.Meta(max_length=2)]
    mac: _MacField
    mtu: _MtuField
    default_route: bool
    netns_inode: _NumberField
    pid_start_ticks: _NumberField
    published: list[_PublishedV1] = []
    parent: _IfnameField | None = None


class _AddressHolderV1(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="v", tag=1):
    host: Annotated[str, msgspec.Meta(pattern=rf"^({_NAME})?\Z")]
    endpoint: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{12})?\Z")] = ""
    held_by: _MacField | None = None


_T = TypeVar("_T")


class _Format:
    """Decoders are made once: making one costs more than using it a hundred times."""

    network = msgspec.json.Decoder(_NetworkV1)
    host = msgspec.json.Decoder(_HostV1)
    reservation = msgspec.json.Decoder(_ReservationV1)
    claim = msgspec.json.Decoder(_ClaimV1)
    endpoint = msgspec.json.Decoder(_EndpointV1)
    address_holder = msgspec.json.Decoder(_AddressHolderV1)


def _decode(decoder: msgspec.json.Decoder[_T], raw: bytes) -> _T:
    if len(raw) > MAX_VALUE_BYTES:
        raise BadValueError(f"{len(raw)} bytes, more than {MAX_VALUE_BYTES}")
    try:
        return decoder.decode(raw)
    except (ValueError, RecursionError) as error:  # DecodeError, UnicodeDecodeError
        raise BadValueError(str(error)) from error


class _Versioned(msgspec.Struct, frozen=True):
    v: int


def is_newer(raw: bytes) -> bool:
    """Whether a document is of a version that this program does not know yet."""
    try:
        return msgspec.json.decode(raw, type=_Versioned).v > 1
    except (ValueError, RecursionError):
        return False


# --- networks -----------------------------------------------------------------------------------


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
    value = _decode(_Format.network, raw)
    network = Network(
        name=NetworkName(value.name),
        mode=value.mode,
        subnets=tuple(_network(s) for s in value.subnets),
        vni=Vni(value.vni),
        port=value.port,
        host_prefix=value.host_prefix,
        host_prefix6=value.host_prefix6,
        mtu_bytes=value.mtu,
        direct_routing=value.direct_routing,
        fallback=value.fallback,
        parent=value.parent,
        ranges=tuple(AddressRange(_address(first), _address(last)) for first, last in value.ranges),
        gateways=tuple(_address(g) for g in value.gateways),
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
        raise UsageError(
            f"mode {mode} needs --parent, the hosts' link on the physical network, such as eth0"
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
        ordered = int(addresses.first) <= int(addresses.last)
        if cidr is None or not (ordered and addresses.first in cidr and addresses.last in cidr):
            raise UsageError(
                f"range {addresses} is not within {', '.join(map(str, network.subnets))}: give the "
                "first and the last address for endpoints, such as 192.0.2.100-192.0.2.199"
            )


def check_name(kind: str, name: str) -> None:
    """Refuse a name that could not be a key, a file name and a word on a command line.

    Raises:
        UsageError: the name has other characters than letters, digits, ``_``, ``.`` and ``-``,
            does not start with a letter or digit, or is longer than 63.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise UsageError(
            f"{kind} name {name[:80]!r} is not usable: take 1 to 63 letters, digits, '_', '.' or "
            "'-', starting with a letter or digit"
        )


def check_key_name(name: str) -> None:
    """Refuse a name in a key of the store.

    Raises:
        BadValueError: nobody could have created what is named so.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise BadValueError(f"the key names {name[:80]!r}, which is no name")


# --- hosts --------------------------------------------------------------------------------------


def encode_host(host: Host) -> bytes:
    """The value of a host's key."""
    return msgspec.json.encode(_HostV1(host.id, str(host.underlay_ip), host.datapath))


def decode_host(raw: bytes) -> Host:
    """Read a host.

    Raises:
        BadValueError: malformed, or its underlay address cannot be a tunnel's end.
    """
    value = _decode(_Format.host, raw)
    return Host(
        id=HostId(value.id), underlay_ip=_unicast(value.underlay_ip), datapath=value.datapath
    )


def encode_claim(claim: Claim) -> bytes:
    """The value of the key under a host's lease."""
    return msgspec.json.encode(_ClaimV1(claim.instance, str(claim.underlay_ip)))


def decode_claim(raw: bytes) -> Claim:
    """Read a claim.

    Raises:
        BadValueError: malformed.
    """
    value = _decode(_Format.claim, raw)
    return Claim(instance=value.instance, underlay_ip=_unicast(value.underlay_ip))


# --- reservations -------------------------------------------------------------------------------


def encode_reservation(reservation: Reservation) -> bytes:
    """The value of a subnet's key; network and subnet are in the key."""
    return msgspec.json.encode(_ReservationV1(reservation.host))


def decode_reservation(network: NetworkName, subnet_key: str, raw: bytes) -> Reservation:
    """Read a reservation; `subnet_key` is the last part of its key (see `subnet_to_key`).

    Raises:
        BadValueError: malformed value, or a key that is no subnet.
    """
    value = _decode(_Format.reservation, raw)
    check_key_name(network)
    return Reservation(network=network, subnet=subnet_from_key(subnet_key), host=HostId(value.host))


def subnet_to_key(subnet: IpNetwork) -> str:
    """``10.42.3.0-24``: a subnet as a part of a key."""
    return f"{subnet.network_address}-{subnet.prefixlen}"


def subnet_from_key(part: str) -> IpNetwork:
    """The reverse of `subnet_to_key`.

    Raises:
        BadValueError: not the canonical form of a subnet.
    """
    subnet = _network(part.replace("-", "/", 1))
    if subnet_to_key(subnet) != part:
        raise BadValueError(f"{part} is not a subnet's canonical form ({subnet_to_key(subnet)})")
    return subnet


# --- endpoints ----------------------------------------------------------------------------------


def encode_endpoint(endpoint: Endpoint) -> bytes:
    """The value of an endpoint's key, and the content of its file on disk."""
    return msgspec.json.encode(
        _EndpointV1(
            id=endpoint.id,
            network=endpoint.network,
            host=endpoint.host,
            name=endpoint.name,
            pid=endpoint.pid,
            ifname=endpoint.ifname,
            addresses=[str(a) for a in endpoint.addresses],
            gateways=[str(g) for g in endpoint.gateways],
            mac=endpoint.mac.hex(":"),
            mtu=endpoint.mtu_bytes,
            default_route=endpoint.default_route,
            netns_inode=endpoint.netns_inode,
            pid_start_ticks=endpoint.pid_start_ticks,
            published=[
                _PublishedV1(
                    p.protocol,
                    p.host_port,
                    p.port,
                    str(p.host_ip) if p.host_ip is not None else None,
                )
                for p in endpoint.published
            ],
            parent=endpoint.parent,
        )
    )


def decode_endpoint(raw: bytes) -> Endpoint:
    """Read an endpoint.

    Raises:
        BadValueError: malformed.
    """
    value = _decode(_Format.endpoint, raw)
    try:
        if any("%" in text for text in (*value.addresses, *value.gateways)):
            raise BadValueError("an endpoint's addresses have no scope")
        addresses = tuple(ip_interface(a) for a in value.addresses)
        gateways = tuple(ip_address(g) for g in value.gateways)
    except ValueError as error:
        raise BadValueError(str(error)) from error
    versions = [a.version for a in addresses]
    if versions != sorted(set(versions)):
        raise BadValueError("an endpoint has at most one address of an IP version, IPv4 first")
    led = [g.version for g in gateways]
    if led != sorted(set(led) & set(versions)):
        raise BadValueError("an endpoint has at most one gateway for each of its addresses")
    return Endpoint(
        id=EndpointId(value.id),
        network=NetworkName(value.network),
        host=HostId(value.host),
        name=value.name,
        pid=value.pid,
        ifname=value.ifname,
        addresses=addresses,
        gateways=gateways,
        mac=bytes.fromhex(value.mac.replace(":", "")),
        mtu_bytes=value.mtu,
        default_route=value.default_route,
        netns_inode=value.netns_inode,
        pid_start_ticks=value.pid_start_ticks,
        published=tuple(
            PublishedPort(
                p.protocol,
                p.host_port,
                p.port,
                _address(p.host_ip) if p.host_ip is not None else None,
            )
            for p in value.published
        ),
        parent=value.parent,
    )


# --- addresses of pools -------------------------------------------------------------------------


def encode_address_holder(holder: AddressHolder) -> bytes:
    """The value of a pool address's key; network and address are in the key."""
    held_by = holder.held_by.hex(":") if holder.held_by else None
    return msgspec.json.encode(_AddressHolderV1(holder.host, holder.endpoint, held_by))


def address_from_key(part: str) -> IpAddress:
    """The address that the last part of a key names.

    Raises:
        BadValueError: not the canonical form of an address.
    """
    address = _address(part)
    if str(address) != part:
        raise BadValueError(f"{part} is not an address's canonical form ({address})")
    return address


def decode_address_holder(raw: bytes) -> AddressHolder:
    """Read who has an address of a pool.

    Raises:
        BadValueError: malformed, or it has both a host and a machine outside the mesh, or neither.
    """
    value = _decode(_Format.address_holder, raw)
    if bool(value.host) == (value.held_by is not None) or (value.endpoint and not value.host):
        raise BadValueError("an address is held by a host or by a machine outside the mesh")
    held_by = bytes.fromhex(value.held_by.replace(":", "")) if value.held_by is not None else b""
    return AddressHolder(HostId(value.host), value.endpoint, held_by)


# --- addresses ----------------------------------------------------------------------------------


def parse_network(text: str) -> IpNetwork:
    """A CIDR in text form.

    Raises:
        ValueError: not a CIDR, host bits set, or an IPv6 scope (``%eth0``) in it: the library
            takes any text for a scope.
    """
    if "%" in text:
        raise ValueError(f"{text!r} has a scope, which a network cannot have")
    return ip_network(text)


def parse_address(text: str) -> IpAddress:
    """An address in text form.

    Raises:
        ValueError: not an address, or an IPv6 scope in it.
    """
    if "%" in text:
        raise ValueError(f"{text!r} has a scope, which is of no use here")
    return ip_address(text)


def _network(text: str) -> IpNetwork:
    try:
        return parse_network(text)
    except ValueError as error:
        raise BadValueError(str(error)) from error


def _address(text: str) -> IpAddress:
    try:
        return parse_address(text)
    except ValueError as error:
        raise BadValueError(str(error)) from error


def _unicast(text: str) -> IpAddress:
    try:
        address = ip_address(text)
    except ValueError as error:
        raise BadValueError(str(error)) from error
    scoped = isinstance(address, IPv6Address) and address.scope_id is not None
    mapped = isinstance(address, IPv6Address) and address.ipv4_mapped is not None
    if (
        address.is_multicast
        or address.is_loopback
        or address.is_unspecified
        or address == _BROADCAST
        or scoped
        or mapped
    ):
        raise BadValueError(f"{text} cannot be the address of a host on the underlay")
    return address
