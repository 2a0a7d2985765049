"""What the store's values have in common: limits, types of fields, how a document is read."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from meshnet.errors import MeshnetError
from meshnet.text import (
    IFNAME_PATTERN,
    NAME,
    NAME_PATTERN,
    OWNER_PATTERN,
    parse_address,
    parse_network,
    printable,
)
from meshnet.wire.mtu import MINIMUM_MTU_BYTES

if TYPE_CHECKING:
    from meshnet.model import IpAddress, IpNetwork

MAX_VALUE_BYTES = 64 * 1024
MAX_VNI = (1 << 24) - 1
MAX_MTU_BYTES = 65_535
_BROADCAST = IPv4Address("255.255.255.255")
MAX_PID = 1 << 22
"""PID_MAX_LIMIT of linux/threads.h."""
MAX_REASON = 300
"""Most characters of a reason, since it quotes hostile input and is shown, logged and kept."""


class BadValueError(MeshnetError):
    """A value of the store is malformed, of another version, or contradicts its key.

    The message is one line of at most `MAX_REASON` printable characters, whatever it quotes.
    """

    exit_status = 2

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason, MAX_REASON))


NameField = Annotated[str, msgspec.Meta(pattern=rf"^{NAME}\Z")]
VniField = Annotated[int, msgspec.Meta(ge=1, le=MAX_VNI)]
PortField = Annotated[int, msgspec.Meta(ge=1, le=65535)]
AddressField = Annotated[str, msgspec.Meta(max_length=64)]
PrefixField = Annotated[int, msgspec.Meta(ge=0, le=128)]
PidField = Annotated[int, msgspec.Meta(ge=1, le=MAX_PID)]
NumberField = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
MtuField = Annotated[int, msgspec.Meta(ge=MINIMUM_MTU_BYTES[4], le=MAX_MTU_BYTES)]
IfnameField = Annotated[str, msgspec.Meta(pattern=rf"^{IFNAME_PATTERN.pattern}\Z")]
OwnerField = Annotated[str, msgspec.Meta(pattern=rf"^{OWNER_PATTERN.pattern}\Z")]
PathField = Annotated[str, msgspec.Meta(pattern=r"^/[^\x00-\x1f\x7f]*\Z", max_length=4096)]
MacField = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2}:){5}[0-9a-f]{2}\Z")]

_T = TypeVar("_T")


def decode(decoder: msgspec.json.Decoder[_T], raw: bytes) -> _T:
    """Read a value's JSON.

    Raises:
        BadValueError: too large, malformed, or a field is out of range.
    """
    if len(raw) > MAX_VALUE_BYTES:
        raise BadValueError(f"the value has {len(raw)} bytes, more than {MAX_VALUE_BYTES}")
    try:
        return decoder.decode(raw)
    except (ValueError, RecursionError) as error:  # DecodeError, UnicodeDecodeError
        raise BadValueError(str(error)) from error


def check_key_name(name: str) -> None:
    """Check a name that is part of a key of the store.

    Raises:
        BadValueError: no network or host can have this name.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise BadValueError(f"the key names {name[:80]!r}, which is not a name")


def network_field(text: str) -> IpNetwork:
    """The CIDR of a field.

    Raises:
        BadValueError: see `parse_network`.
    """
    try:
        return parse_network(text)
    except ValueError as error:
        raise BadValueError(str(error)) from error


def address_field(text: str) -> IpAddress:
    """The address of a field.

    Raises:
        BadValueError: see `parse_address`.
    """
    try:
        return parse_address(text)
    except ValueError as error:
        raise BadValueError(str(error)) from error


def underlay_address_field(text: str) -> IpAddress:
    """The address of a field that has to be the end of a tunnel.

    Raises:
        BadValueError: not an address, or one that no host can have.
    """
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
