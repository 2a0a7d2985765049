"""Published ports: reading them as people write them, and telling which exclude each other.

The text is Docker's: ``[[IP:][HOST]:]CONTAINER[/tcp|udp]``, where a port may be a range.  An IPv6
address is in brackets.  What `PublishedPort` prints reads back as the same value.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, NamedTuple

from meshnet.errors import UsageError
from meshnet.model import Protocol, PublishedPort
from meshnet.text import parse_address

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sized

    from meshnet.model import Endpoint, IpAddress

ANY_PORT = 0
"""As `host_port`: any free port, chosen before publishing."""
MAX_PUBLISHED = 256
"""For each endpoint: keeps its record well below the largest that the store's reader accepts."""

_SPEC = re.compile(
    r"(?:(?:(?P<ip>\[[^\]]*\]|[^][:/]*):)?(?P<host>[0-9-]*):)?(?P<port>[0-9-]+)"
    r"(?:/(?P<protocol>[A-Za-z0-9]+))?"
)
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_ANY: dict[int, IpAddress] = {4: IPv4Address(0), 6: IPv6Address(0)}


class Binding(NamedTuple):
    """What a published port takes of its host in one IP version.

    Attributes:
        address: the unspecified address stands for all of its IP version.
    """

    protocol: Protocol
    address: IpAddress
    port: int

    def overlaps(self, other: Binding) -> bool:
        """Whether one packet may be for both."""
        return (
            (self.protocol, self.port) == (other.protocol, other.port)
            and self.address.version == other.address.version
            and (
                self.address == other.address
                or self.address.is_unspecified
                or other.address.is_unspecified
            )
        )


def bindings_of(endpoint: Endpoint, port: PublishedPort) -> list[Binding]:
    """What a published port takes, in each IP version that the endpoint has, or in that it names.

    Raises:
        UsageError: the endpoint has no address of the IP version that the port names.
    """
    versions = [a.version for a in endpoint.addresses]
    if port.host_ip is None:
        return [Binding(port.protocol, _ANY[v], port.host_port) for v in versions]
    if port.host_ip.version not in versions:
        raise UsageError(
            f"port {port} is at an IPv{port.host_ip.version} address, but network "
            f"{endpoint.network} has no IPv{port.host_ip.version}: give another address, or none"
        )
    return [Binding(port.protocol, port.host_ip, port.host_port)]


def parse_published(text: str) -> tuple[PublishedPort, ...]:
    """The ports that a text such as ``8080:80``, ``[fd00::7]:5353:53/udp`` or ``80-89`` stands for.

    Raises:
        UsageError: it does not stand for any.
    """
    found = _SPEC.fullmatch(text)
    if found is None:
        raise _bad(text, "it does not have the right form")
    protocol = _protocol(text, found["protocol"])
    ports = _ports(text, found["port"], least=1)
    count = len(ports)
    check_count(ports)
    hosts = _ports(text, found["host"], least=0) if found["host"] else [ANY_PORT] * count
    if hosts == [ANY_PORT]:
        hosts *= count
    if len(hosts) != count:
        raise _bad(text, f"{len(hosts)} ports of the host do not match {count} of the endpoint")
    address = None if found["ip"] is None else _host_address(text, found["ip"])
    return tuple(PublishedPort(protocol, h, p, address) for h, p in zip(hosts, ports, strict=True))


def parse_all_published(texts: Iterable[str]) -> tuple[PublishedPort, ...]:
    """The ports that several texts stand for (`parse_published`), in order, without repetitions.

    Raises:
        UsageError: one of them does not stand for any.
    """
    ports: dict[PublishedPort, None] = {}
    for text in texts:
        ports |= dict.fromkeys(parse_published(text))
        check_count(ports)
    return tuple(ports)


def check_count(ports: Sized) -> None:
    """Refuse more ports than an endpoint may have.

    Raises:
        UsageError: there are more than `MAX_PUBLISHED`.
    """
    if len(ports) > MAX_PUBLISHED:
        raise UsageError(
            f"{len(ports)} published ports are more than an endpoint may have: publish at most "
            f"{MAX_PUBLISHED}"
        )


def select_published(published: Collection[PublishedPort], text: str) -> list[PublishedPort]:
    """Those of some published ports that a text names, in full or by the host's port alone.

    Raises:
        UsageError: it does not name a port that could be published.
    """
    named = parse_published(text)
    if any(port.host_port or port.host_ip for port in named):
        return [p for p in published if p in named]
    # A lone number parses as the endpoint's port, but whoever unpublishes means the host's.
    keys = {(port.protocol, port.port) for port in named}
    return [p for p in published if (p.protocol, p.host_port) in keys]


def _protocol(text: str, name: str | None) -> Protocol:
    try:
        return Protocol((name or Protocol.TCP).lower())
    except ValueError:
        raise _bad(text, f"{name} ports cannot be published") from None


def _ports(text: str, words: str, *, least: int) -> list[int]:
    found = _RANGE.fullmatch(words)
    if found is None:
        raise _bad(text, f"{words!r} is neither a port nor a range of ports")
    first, last = int(found[1]), int(found[2] or found[1])
    # 0 alone means any free port; a range that begins with it means nothing.
    if not (least <= first <= last <= 65535) or (first == ANY_PORT and last):
        raise _bad(text, f"{words} is not within 1 to 65535")
    return list(range(first, last + 1))


def _host_address(text: str, words: str) -> IpAddress:
    bracketed = words.startswith("[")
    try:
        address = parse_address(words.strip("[]"))
    except ValueError as error:
        raise _bad(text, str(error)) from error
    if bracketed != (address.version == 6):
        raise _bad(text, "brackets are for IPv6 addresses")
    if address.is_unspecified:
        raise _bad(text, f"{address} means all addresses: leave it out")
    if address.version == 6 and address.is_loopback:
        raise _bad(text, "Linux does not translate packets to ::1: publish at 127.0.0.1")
    mapped = isinstance(address, IPv6Address) and address.ipv4_mapped is not None
    # Link-local: the text has no scope, and an address that several links may have needs one.
    if address.is_multicast or mapped or (address.version == 6 and address.is_link_local):
        raise _bad(text, f"{address} cannot be published at")
    return address


def _bad(text: str, reason: str) -> UsageError:
    return UsageError(
        f"published port {text!r} is not usable ({reason}): give [[IP:]HOST:]CONTAINER[/tcp|udp], "
        "such as 8080:80, 127.0.0.1:8080:80 or [fd00::7]:5353:53/udp"
    )
