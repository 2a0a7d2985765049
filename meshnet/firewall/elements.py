"""Elements: what the named sets and maps of our tables hold.

An element is a key in a set, or in a map a key with its value, as the kernel has them: fields in
network byte order, each padded to the four bytes of a register (``include/net/netfilter/
nf_tables.h``).  So plans, dumps and messages have the same bytes; they become text only for
``nft -f`` and for messages to people.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from meshnet.model import Protocol
from meshnet.ports import Binding
from meshnet.state import ElementKey, endpoint_link_name, format_ip, format_mac
from meshnet.wire.mac import link_local_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from meshnet.model import Endpoint, IpAddress, PublishedPort
    from meshnet.state import PackedIp


TABLE = "meshnet"
"""Name of our tables, one of family ``inet`` and one of family ``bridge``."""


class Field(NamedTuple):
    """A part of a key or value.

    Attributes:
        type: name of its data type in nft, or the expression that nft compares with it.
        size_bytes: without the padding.
        format: its text for nft.
    """

    type: str
    size_bytes: int
    format: Callable[[bytes], str]


def _number(raw: bytes) -> str:
    return str(int.from_bytes(raw, "big"))


_IFNAME = Field("ifname", 16, lambda raw: f'"{raw.rstrip(bytes(1)).decode(errors="replace")}"')
_ETHER = Field("ether_addr", 6, format_mac)
_PROTOCOL = Field("inet_proto", 1, _number)
_PORT = Field("inet_service", 2, _number)
_IP = {4: Field("ipv4_addr", 4, format_ip), 6: Field("ipv6_addr", 16, format_ip)}
_TARGET = Field("@th,64,128", 16, lambda raw: f"0x{raw.hex()}")
"""Target address of a neighbour solicitation or advertisement (RFC 4861 §4.3, §4.4): after type,
code, checksum and flags.  As raw bits, because nft before 1.0.8 has no name for it."""

_EXPRESSIONS = {"ifname": "iifname", "ether_addr": "ether saddr"}
"""Of a set with one field that is not of a type, nft wants every field as an expression."""


class NamedSet(NamedTuple):
    """A named set, or with a value a map, of one of our tables.

    Attributes:
        family: of its table.
        wired: whether its elements come and go with endpoints' links, without waiting for a pass
            (`meshnet.kernel.Wiring`).
    """

    family: str
    key: tuple[Field, ...]
    value: tuple[Field, ...] = ()
    wired: bool = False

    def declare(self, name: str) -> str:
        """The set without elements, for a table's text."""
        if _TARGET in self.key:
            kind = "typeof " + " . ".join(_EXPRESSIONS.get(f.type, f.type) for f in self.key)
        else:
            kind = "type " + " . ".join(f.type for f in self.key)
        if not self.value:
            return f"\tset {name} {{\n\t\t{kind}\n\t}}\n"
        return f"\tmap {name} {{\n\t\t{kind} : {' . '.join(f.type for f in self.value)}\n\t}}\n"


MEMBERS = {4: "members4", 6: "members6"}
"""Underlay addresses of the other hosts: tunnel packets are accepted only from these."""
SOURCES = {4: "sources4", 6: "sources6"}
"""What an endpoint may send from: link, MAC, address."""
TARGETS = "targets6"
"""What an endpoint may claim to be, in neighbour discovery: link, MAC, address."""
PUBLISHED = {4: "published4", 6: "published6"}
"""From a port of the host, at all its addresses, to a port of an endpoint."""
PUBLISHED_AT = {4: "published_at4", 6: "published_at6"}
"""The same at one address of the host."""
NO_DEFAULT = {4: "no_default4", 6: "no_default6"}
"""Endpoints with published ports whose default route leads elsewhere, so that their answers to
strangers would not come back by this host."""

SETS: dict[str, NamedSet] = {
    **{MEMBERS[v]: NamedSet("inet", (_IP[v],)) for v in (4, 6)},
    **{NO_DEFAULT[v]: NamedSet("inet", (_IP[v],)) for v in (4, 6)},
    **{PUBLISHED[v]: NamedSet("inet", (_PROTOCOL, _PORT), (_IP[v], _PORT)) for v in (4, 6)},
    **{
        PUBLISHED_AT[v]: NamedSet("inet", (_IP[v], _PROTOCOL, _PORT), (_IP[v], _PORT))
        for v in (4, 6)
    },
    **{SOURCES[v]: NamedSet("bridge", (_IFNAME, _ETHER, _IP[v]), wired=True) for v in (4, 6)},
    TARGETS: NamedSet("bridge", (_IFNAME, _ETHER, _TARGET), wired=True),
}
"""All sets, by name; no two tables have one of the same name."""

_PROTOCOL_NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17}
_PROTOCOLS = {number: protocol for protocol, number in _PROTOCOL_NUMBERS.items()}


def member(underlay_ip: IpAddress) -> ElementKey:
    """A host whose tunnel packets are accepted."""
    return ElementKey(MEMBERS[underlay_ip.version], underlay_ip.packed)


def endpoint_elements(endpoint: Endpoint) -> dict[ElementKey, bytes]:
    """All elements of an endpoint whose host-side link is a port of a bridge."""
    return source_elements(endpoint) | published_elements(endpoint)


def source_elements(endpoint: Endpoint) -> dict[ElementKey, bytes]:
    """What an endpoint may send from: its addresses, and the link-local one made from its MAC.

    Empty for a macvlan, whose packets do not pass through the host's firewall.
    """
    if endpoint.parent is not None:
        return {}
    link = _name(endpoint_link_name(endpoint.id))
    link_local = ip_address(link_local_of(endpoint.mac))
    elements: dict[ElementKey, bytes] = {}
    for ip in (*(a.ip for a in endpoint.addresses), link_local):
        key = _pack(link, endpoint.mac, ip.packed)
        elements[ElementKey(SOURCES[ip.version], key)] = b""
        if ip.version == 6:
            elements[ElementKey(TARGETS, key)] = b""
    return elements


def published_elements(endpoint: Endpoint) -> dict[ElementKey, bytes]:
    """Where an endpoint's published ports lead, and whether it can answer strangers by itself."""
    elements: dict[ElementKey, bytes] = {}
    for address in endpoint.addresses:
        ip = address.ip
        leads = [
            (_published_key(published, ip.version), pack_target(ip.packed, published.port))
            for published in endpoint.published
            if published.host_ip is None or published.host_ip.version == ip.version
        ]
        elements.update(leads)
        if leads and ip.version not in endpoint.default_versions:
            elements[ElementKey(NO_DEFAULT[ip.version], ip.packed)] = b""
    return elements


def find_published(
    elements: Mapping[ElementKey, bytes], protocol: int, address: PackedIp, port: int
) -> bytes | None:
    """Where a packet to a port of this host leads: a value of `pack_target`; None: to the host.

    Args:
        protocol: its number (RFC 5237).
    """
    version = 4 if len(address) == 4 else 6
    where = (bytes((protocol,)), _port(port))
    at = elements.get(ElementKey(PUBLISHED_AT[version], _pack(address, *where)))
    return at or elements.get(ElementKey(PUBLISHED[version], _pack(*where)))


def pack_target(address: PackedIp, port: int) -> bytes:
    """Where a published port leads, as the maps have it."""
    return _pack(address, _port(port))


def binding_of(key: ElementKey) -> Binding | None:
    """What a published port's element takes of the host; None: it is an element of another kind."""
    for version, any_address in ((4, bytes(4)), (6, bytes(16))):
        if key.set_name in (PUBLISHED[version], PUBLISHED_AT[version]):
            # An address, if there is one, comes before protocol and port.
            address = key.key[:-8] or any_address
            return Binding(
                _PROTOCOLS[key.key[-8]],
                ip_address(address),
                int.from_bytes(key.key[-4:-2], "big"),
            )
    return None


def _published_key(published: PublishedPort, version: int) -> ElementKey:
    port = (bytes((_PROTOCOL_NUMBERS[published.protocol],)), _port(published.host_port))
    if published.host_ip is None:
        return ElementKey(PUBLISHED[version], _pack(*port))
    return ElementKey(PUBLISHED_AT[version], _pack(published.host_ip.packed, *port))


def format_element(key: ElementKey, value: bytes = b"") -> str:
    """An element as nft writes it: ``"mne…" . 02:65:0a:2a:00:02 . 10.42.0.2``."""
    named = SETS[key.set_name]
    if len(named.key) == 1 and not named.value and key.key:
        # The short way: there are thousands of members, and all are formatted at a load.
        return named.key[0].format(key.key[: named.key[0].size_bytes])
    text = " . ".join(_format(named.key, key.key)) if key.key else "*"
    return f"{text} : {' . '.join(_format(named.value, value))}" if value else text


def render_elements(elements: Mapping[ElementKey, bytes]) -> str:
    """Commands for nft that put elements into the sets of new tables."""
    by_set: dict[str, list[str]] = {}
    for key, value in elements.items():
        by_set.setdefault(key.set_name, []).append(format_element(key, value))
    return "".join(
        f"add element {SETS[name].family} {TABLE} {name} {{ {', '.join(texts)} }}\n"
        for name, texts in by_set.items()
    )


def key_size(fields: Sequence[Field]) -> int:
    """Length of a key or value in bytes, with its padding."""
    return sum(_padded(field.size_bytes) for field in fields)


def _format(fields: Sequence[Field], packed: bytes) -> Iterator[str]:
    start = 0
    for field in fields:
        yield field.format(packed[start : start + field.size_bytes])
        start += _padded(field.size_bytes)


def _padded(size_bytes: int) -> int:
    return (size_bytes + 3) & ~3


def _pack(*fields: bytes | PackedIp) -> bytes:
    return b"".join(field + bytes(-len(field) & 3) for field in fields)


def _name(link: str) -> bytes:
    return link.encode().ljust(16, b"\0")


def _port(number: int) -> bytes:
    return number.to_bytes(2, "big")
