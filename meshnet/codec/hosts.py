"""Hosts, the claims under their leases, and the subnets they reserve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from meshnet.codec.document import (
    AddressField,
    BadValueError,
    NameField,
    check_key_name,
    decode,
    network_field,
    underlay_address_field,
)
from meshnet.model import Claim, Datapath, Host, HostId, NetworkName, Reservation

if TYPE_CHECKING:
    from meshnet.model import IpNetwork


class _HostV1(msgspec.Struct, frozen=True, tag_field="v", tag=1):
    id: NameField
    underlay_ip: AddressField
    datapath: Datapath = Datapath.KERNEL


class _ReservationV1(msgspec.Struct, frozen=True, tag_field="v", tag=1):
    host: NameField


class _ClaimV1(msgspec.Struct, frozen=True, tag_field="v", tag=1):
    instance: Annotated[str, msgspec.Meta(max_length=64)]
    underlay_ip: AddressField


# Made once: making one costs more than using it a hundred times.
_host = msgspec.json.Decoder(_HostV1)
_reservation = msgspec.json.Decoder(_ReservationV1)
_claim = msgspec.json.Decoder(_ClaimV1)


def encode_host(host: Host) -> bytes:
    """The value of a host's key."""
    return msgspec.json.encode(_HostV1(host.id, str(host.underlay_ip), host.datapath))


def decode_host(raw: bytes) -> Host:
    """Read a host.

    Raises:
        BadValueError: malformed, or its underlay address cannot be a tunnel's end.
    """
    value = decode(_host, raw)
    return Host(
        id=HostId(value.id),
        underlay_ip=underlay_address_field(value.underlay_ip),
        datapath=value.datapath,
    )


def encode_claim(claim: Claim) -> bytes:
    """The value of the key under a host's lease."""
    return msgspec.json.encode(_ClaimV1(claim.instance, str(claim.underlay_ip)))


def decode_claim(raw: bytes) -> Claim:
    """Read a claim.

    Raises:
        BadValueError: malformed.
    """
    value = decode(_claim, raw)
    return Claim(instance=value.instance, underlay_ip=underlay_address_field(value.underlay_ip))


def encode_reservation(reservation: Reservation) -> bytes:
    """The value of a subnet's key; network and subnet are in the key."""
    return msgspec.json.encode(_ReservationV1(reservation.host))


def decode_reservation(network: NetworkName, subnet_key: str, raw: bytes) -> Reservation:
    """Read a reservation; `subnet_key` is the last part of its key (see `subnet_to_key`).

    Raises:
        BadValueError: malformed value, or a key that is not a subnet.
    """
    value = decode(_reservation, raw)
    check_key_name(network)
    return Reservation(network=network, subnet=subnet_from_key(subnet_key), host=HostId(value.host))


def subnet_to_key(subnet: IpNetwork) -> str:
    """A subnet as part of a key, such as ``10.42.3.0-24``: "/" separates the parts of a key."""
    return f"{subnet.network_address}-{subnet.prefixlen}"


def subnet_from_key(part: str) -> IpNetwork:
    """The reverse of `subnet_to_key`.

    Raises:
        BadValueError: not the canonical form of a subnet.
    """
    subnet = network_field(part.replace("-", "/", 1))
    if subnet_to_key(subnet) != part:
        raise BadValueError(f"{part} is not the canonical form of subnet {subnet_to_key(subnet)}")
    return subnet
