"""Endpoints, and the holders of addresses from pools."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from meshnet.codec.document import (
    AddressField,
    BadValueError,
    IfnameField,
    MacField,
    MtuField,
    NameField,
    NumberField,
    OwnerField,
    PathField,
    PidField,
    PortField,
    address_field,
    decode,
)
from meshnet.model import (
    AddressHolder,
    Endpoint,
    EndpointId,
    HostId,
    NetworkName,
    Protocol,
    PublishedPort,
)
from meshnet.sandbox import HoldSandbox, NetnsId, ProcessSandbox
from meshnet.text import NAME
from meshnet.wire.mac import parse_mac

if TYPE_CHECKING:
    from meshnet.model import IpAddress
    from meshnet.sandbox import Sandbox


class _PublishedV1(msgspec.Struct, frozen=True):
    protocol: Protocol
    host_port: PortField
    port: PortField
    host_ip: AddressField | None = None


class _Endpoint(msgspec.Struct, frozen=True, kw_only=True, tag_field="v"):
    id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{12}\Z")]
    network: NameField
    host: NameField
    name: NameField
    ifname: IfnameField
    addresses: Annotated[list[AddressField], msgspec.Meta(min_length=1, max_length=2)]
    gateways: Annotated[list[AddressField], msgspec.Meta(max_length=2)]
    mac: MacField
    mtu: MtuField
    default_route: bool  # leads through it now, for any IP version
    default_versions: list[int] | None = None
    wants_default: bool | None = None
    netns_inode: NumberField
    netns_device: NumberField = 0
    published: list[_PublishedV1] = []
    parent: IfnameField | None = None


class _EndpointV1(_Endpoint, frozen=True, kw_only=True, tag=1):
    """In the sandbox of a process: all that versions before holds know."""

    pid: PidField
    pid_start_ticks: NumberField


class _EndpointV2(_Endpoint, frozen=True, kw_only=True, tag=2):
    """In a hold."""

    owner: OwnerField
    netns_path: PathField
    boot_id: Annotated[str, msgspec.Meta(max_length=64)]


class _AddressHolderV1(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="v", tag=1):
    host: Annotated[str, msgspec.Meta(pattern=rf"^({NAME})?\Z")]
    endpoint: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{12})?\Z")] = ""
    held_by: MacField | None = None


# Made once: making one costs more than using it a hundred times.
_endpoint = msgspec.json.Decoder(_EndpointV1 | _EndpointV2)
_address_holder = msgspec.json.Decoder(_AddressHolderV1)


def encode_endpoint(endpoint: Endpoint) -> bytes:
    """The value of an endpoint's key, and the content of its file on disk."""
    sandbox = endpoint.sandbox
    common: dict[str, Any] = {
        "id": endpoint.id,
        "network": endpoint.network,
        "host": endpoint.host,
        "name": endpoint.name,
        "ifname": endpoint.ifname,
        "addresses": [str(a) for a in endpoint.addresses],
        "gateways": [str(g) for g in endpoint.gateways],
        "mac": endpoint.mac.hex(":"),
        "mtu": endpoint.mtu_bytes,
        "default_route": bool(endpoint.default_versions),
        "default_versions": endpoint.default_versions,
        "wants_default": endpoint.default_route,
        "netns_inode": sandbox.netns.inode,
        "netns_device": sandbox.netns.device,
        "published": [
            _PublishedV1(
                p.protocol,
                p.host_port,
                p.port,
                str(p.host_ip) if p.host_ip is not None else None,
            )
            for p in endpoint.published
        ],
        "parent": endpoint.parent,
    }
    value: _EndpointV1 | _EndpointV2
    if isinstance(sandbox, ProcessSandbox):
        value = _EndpointV1(pid=sandbox.pid, pid_start_ticks=sandbox.pid_start_ticks, **common)
    else:
        value = _EndpointV2(
            owner=sandbox.owner, netns_path=sandbox.path, boot_id=sandbox.boot_id, **common
        )
    return msgspec.json.encode(value)


def decode_endpoint(raw: bytes) -> Endpoint:
    """Read an endpoint.

    Raises:
        BadValueError: malformed.
    """
    value = decode(_endpoint, raw)
    try:
        if any("%" in text for text in (*value.addresses, *value.gateways)):
            raise BadValueError("an endpoint's address or gateway has a scope: it must not")
        addresses = tuple(ip_interface(a) for a in value.addresses)
        gateways = tuple(ip_address(g) for g in value.gateways)
    except ValueError as error:
        raise BadValueError(str(error)) from error
    versions = [a.version for a in addresses]
    if versions != sorted(set(versions)):
        raise BadValueError("an endpoint may have one address of each IP version, IPv4 first")
    led = [g.version for g in gateways]
    if led != sorted(set(led) & set(versions)):
        raise BadValueError(
            "an endpoint may have one gateway for each of its addresses, IPv4 first"
        )
    defaults, wants = value.default_versions, value.wants_default
    if defaults is None or wants is None:  # an earlier version's, which judged them together
        defaults, wants = (led if value.default_route else []), value.default_route
    if defaults != sorted(set(defaults) & set(led)):
        raise BadValueError("a default route leads through a gateway of its IP version, IPv4 first")
    return Endpoint(
        id=EndpointId(value.id),
        network=NetworkName(value.network),
        host=HostId(value.host),
        name=value.name,
        sandbox=_sandbox_of(value),
        ifname=value.ifname,
        addresses=addresses,
        gateways=gateways,
        mac=parse_mac(value.mac),
        mtu_bytes=value.mtu,
        default_route=wants,
        default_versions=tuple(defaults),
        published=tuple(
            PublishedPort(
                p.protocol,
                p.host_port,
                p.port,
                address_field(p.host_ip) if p.host_ip is not None else None,
            )
            for p in value.published
        ),
        parent=value.parent,
    )


def _sandbox_of(value: _EndpointV1 | _EndpointV2) -> Sandbox:
    netns = NetnsId(value.netns_device, value.netns_inode)
    if isinstance(value, _EndpointV1):
        return ProcessSandbox(pid=value.pid, pid_start_ticks=value.pid_start_ticks, netns=netns)
    return HoldSandbox(path=value.netns_path, netns=netns, owner=value.owner, boot_id=value.boot_id)


def encode_address_holder(holder: AddressHolder) -> bytes:
    """The value of a pool address's key; network and address are in the key."""
    held_by = holder.held_by.hex(":") if holder.held_by else None
    return msgspec.json.encode(_AddressHolderV1(holder.host, holder.endpoint, held_by))


def address_from_key(part: str) -> IpAddress:
    """The address that the last part of a key names.

    Raises:
        BadValueError: not the canonical form of an address.
    """
    address = address_field(part)
    if str(address) != part:
        raise BadValueError(f"{part} is not the canonical form of address {address}")
    return address


def decode_address_holder(raw: bytes) -> AddressHolder:
    """Read the holder of an address from a pool.

    Raises:
        BadValueError: malformed, or it names both a host and a machine outside the mesh, or
            neither.
    """
    value = decode(_address_holder, raw)
    if bool(value.host) == (value.held_by is not None) or (value.endpoint and not value.host):
        raise BadValueError("an address must be held by a host or by a machine outside the mesh")
    held_by = parse_mac(value.held_by) if value.held_by is not None else b""
    return AddressHolder(HostId(value.host), value.endpoint, held_by)
