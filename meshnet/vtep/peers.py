"""Who is a member, what it owns, and what stands before each packet to and from it.

A lookup is one dict access for each prefix length that occurs, longest first; the hosts of a
network all have one length a family, so it is one access with 10 peers and with 10,000.

Pure: imports no I/O.  Addresses are parsed by `socket`: `ipaddress` takes longer to import than all
else here.
"""

from __future__ import annotations

import contextlib
import re
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import TYPE_CHECKING, Any

from meshnet.errors import ConflictError, UsageError
from meshnet.wire import virtio, vxlan
from meshnet.wire.mac import parse_mac

if TYPE_CHECKING:
    from collections.abc import Iterable
    from socket import socket

_LENGTH = re.compile(r"[0-9]{1,3}")
_KEYS = frozenset({"underlay_ip", "port", "mac", "subnets", "offload"})
_MAX_SUBNETS = 64

Subnet = tuple[int, int, int]
"""IP version, network address, prefix length."""


class Own:
    """This VTEP.

    Attributes:
        vni: of the network it serves.
        mac: its own, which peers send to.
        port: what it listens at, and peers unless they say otherwise.
        version: IP version of the underlay.
    """

    __slots__ = ("mac", "port", "version", "vni")

    def __init__(self, vni: int, mac: bytes, port: int, version: int) -> None:
        self.vni, self.mac, self.port, self.version = vni, mac, port, version


class TunnelPeer:
    """A member, and what was counted of it.

    Attributes:
        address: for the socket.
        prefixes: the encapsulation to send with, by (IP version, transport protocol whose checksum
            is left to the peer, or 0).
        fronts: encapsulations that it sends with, by which IP version and whether the inner
            checksum is unfinished; only others have to be parsed.
        quick: encapsulations of IPv4 packets that are written on as they are, and the virtio header
            to write: those with an unfinished checksum, and those of other protocols than TCP
            and UDP, whose checksum nobody leaves unfinished.
        offload: whether it takes unfinished checksums (remote checksum offload).
        drops: of its packets, by reason.
        tx_socket, tx_fd: the sender's socket for it alone; None: it has none (yet).
    """

    __slots__ = ("address", "document", "drops", "fronts", "mac", "offload", "prefixes", "quick",
                 "rx_bytes", "rx_calls", "rx_packets", "subnets", "tx_bytes", "tx_calls",
                 "tx_fd", "tx_packets", "tx_socket", "underlay_ip")  # fmt: skip

    def __init__(self, document: dict[str, Any], own: Own) -> None:
        """Check a peer's document.

        Raises:
            UsageError: it is malformed; the message names the value.
        """
        unknown = set(document) - _KEYS
        if unknown:
            raise UsageError(f"peer: unknown key {min(unknown)!r:.80}")
        version, _, self.underlay_ip = parse_ip(document.get("underlay_ip"))
        name = f"peer {self.underlay_ip}"
        if version != own.version:
            raise UsageError(f"{name}: the underlay of this host is IPv{own.version}")
        port = document.get("port", own.port)
        if not _is_int(port) or not 1 <= port <= 65535:
            raise UsageError(f"{name}: port {port!r:.80} is not 1 to 65535")
        self.mac = parse_unicast_mac(document.get("mac"), name)
        subnets = document.get("subnets")
        if not isinstance(subnets, list) or not 1 <= len(subnets) <= _MAX_SUBNETS:
            raise UsageError(f"{name}: subnets {subnets!r:.80} is not a list of 1 to 64 CIDRs")
        self.subnets = [parse_subnet(s, name) for s in subnets]
        self.offload = document.get("offload", False)
        if not isinstance(self.offload, bool):
            raise UsageError(f"{name}: offload {self.offload!r:.80} is not true or false")
        self.document = {
            "underlay_ip": self.underlay_ip,
            "port": port,
            "mac": self.mac.hex(":"),
            "subnets": subnets,
            "offload": self.offload,
        }
        self.address = (self.underlay_ip, port)
        self.prefixes = _fronts(own.vni, self.mac, own.mac)
        if not self.offload:
            self.prefixes = {key: self.prefixes[key[0], 0] for key in self.prefixes}
        # The other way round, for what it sends, whatever we send.
        received = _fronts(own.vni, own.mac, self.mac)
        self.quick = {
            received[4, 0]: virtio.PLAIN,
            received[4, 6]: virtio.pack(virtio.NEEDS_CSUM, 0, 40, 0, 20, 16),
            received[4, 17]: virtio.pack(virtio.NEEDS_CSUM, 0, 28, 0, 20, 6),
        }
        self.fronts = {front: (key[0], key[1] != 0) for key, front in received.items()}
        self.tx_socket: socket | None = None
        self.tx_fd = -1
        self.rx_packets = self.rx_bytes = self.rx_calls = 0
        self.tx_packets = self.tx_bytes = self.tx_calls = 0
        self.drops: dict[str, int] = {}

    def drop(self, reason: str, count: int = 1) -> None:
        """Count packets that were dropped."""
        self.drops[reason] = self.drops.get(reason, 0) + count

    def keep_counting(self, before: TunnelPeer) -> None:
        """Go on with the counters of what this replaces."""
        self.rx_packets, self.rx_bytes = before.rx_packets, before.rx_bytes
        self.tx_packets, self.tx_bytes = before.tx_packets, before.tx_bytes
        self.rx_calls, self.tx_calls, self.drops = before.rx_calls, before.tx_calls, before.drops

    def counters(self) -> dict[str, Any]:
        """What was counted, for JSON."""
        return {
            "underlay_ip": self.underlay_ip,
            "rx_packets": self.rx_packets,
            "rx_bytes": self.rx_bytes,
            "rx_calls": self.rx_calls,
            "tx_packets": self.tx_packets,
            "tx_bytes": self.tx_bytes,
            "tx_calls": self.tx_calls,
            "drops": self.drops,
        }


class PeerTable:
    """All members.  Changes are whole: one that is refused has changed nothing."""

    def __init__(self, own: Own) -> None:
        self.own = own
        self.by_underlay: dict[str, TunnelPeer] = {}
        # By IP version: masks, longest first, each with its networks.
        self._routes: dict[int, list[tuple[int, dict[int, TunnelPeer]]]] = {4: [], 6: []}

    def find(self, version: int, address: int) -> TunnelPeer | None:
        """The member that owns an address."""
        for mask, networks in self._routes[version]:
            peer = networks.get(address & mask)
            if peer is not None:
                return peer
        return None

    def replace(self, documents: Iterable[dict[str, Any]]) -> None:
        """Make these the members.

        Raises:
            UsageError: a document is malformed.
            ConflictError: two members have one underlay address or subnet.
        """
        peers: dict[str, TunnelPeer] = {}
        for document in documents:
            peer = self._parse(document)
            if peer.underlay_ip in peers:
                raise ConflictError(f"peer {peer.underlay_ip} is given twice")
            peers[peer.underlay_ip] = peer
        self._install(peers)

    def update(self, documents: Iterable[dict[str, Any]], removed: Iterable[str]) -> None:
        """Add or replace some members, and remove others, which need not be members.

        Raises:
            UsageError: a document is malformed.
            ConflictError: two members have one subnet.
        """
        changed = [self._parse(document) for document in documents]
        gone = {parse_ip(text)[2] for text in removed}
        peers = {ip: peer for ip, peer in self.by_underlay.items() if ip not in gone}
        peers.update((peer.underlay_ip, peer) for peer in changed)
        self._install(peers)

    def _parse(self, document: object) -> TunnelPeer:
        if not isinstance(document, dict):
            raise UsageError(f"peer {document!r:.80} is not an object")
        return TunnelPeer(document, self.own)

    def _install(self, peers: dict[str, TunnelPeer]) -> None:
        tables: dict[int, dict[int, dict[int, TunnelPeer]]] = {4: {}, 6: {}}
        for peer in peers.values():
            for version, network, length in peer.subnets:
                other = tables[version].setdefault(length, {}).setdefault(network, peer)
                if other is not peer:
                    raise ConflictError(
                        f"a subnet of length {length} is given to peer {other.underlay_ip} and to "
                        f"peer {peer.underlay_ip}"
                    )
        for ip, peer in peers.items():
            before = self.by_underlay.get(ip)
            if before is not None and before is not peer:
                peer.keep_counting(before)
        self.by_underlay = peers
        for version, by_length in tables.items():
            bits = 32 if version == 4 else 128
            self._routes[version] = [
                ((1 << bits) - (1 << (bits - length)), by_length[length])
                for length in sorted(by_length, reverse=True)
            ]


def _fronts(vni: int, destination: bytes, source: bytes) -> dict[tuple[int, int], bytes]:
    """Encapsulations by IP version and by the protocol whose checksum is unfinished, or 0."""
    found = {}
    for version, kind, start in ((4, vxlan.ETHERTYPE_IPV4, 20), (6, vxlan.ETHERTYPE_IPV6, 40)):
        for protocol in (0, 6, 17):
            remote = (start, protocol == 17) if protocol else None
            found[version, protocol] = vxlan.pack(vni, destination, source, kind, remote)
    return found


def parse_ip(text: object) -> tuple[int, int, str]:
    """IP version, number and usual text form of an address.

    Raises:
        UsageError: it is none.
    """
    if isinstance(text, str) and len(text) < 64:
        family = AF_INET6 if ":" in text else AF_INET
        try:
            packed = inet_pton(family, text)
        except (OSError, ValueError, UnicodeError):
            pass
        else:
            version = 4 if len(packed) == 4 else 6
            return version, int.from_bytes(packed, "big"), inet_ntop(family, packed)
    raise UsageError(f"{text!r:.80} is not an IP address")


def parse_unicast_mac(text: object, name: str) -> bytes:
    """The six bytes of a MAC address.

    Raises:
        UsageError: it is none, or a group's.
    """
    if isinstance(text, str):
        with contextlib.suppress(ValueError):
            mac = parse_mac(text)
            if not mac[0] & 1:
                return mac
    raise UsageError(f"{name}: mac {text!r:.80} is not a unicast MAC address")


def parse_subnet(text: object, name: str) -> Subnet:
    """A CIDR.

    Raises:
        UsageError: it is none, or has host bits.
    """
    if isinstance(text, str):
        address, _, length_text = text.partition("/")
        version, number, _ = parse_ip(address)
        bits = 32 if version == 4 else 128
        if _LENGTH.fullmatch(length_text) and int(length_text) <= bits:
            length = int(length_text)
            if not number & ((1 << (bits - length)) - 1):
                return version, number, length
    raise UsageError(f"{name}: subnet {text!r:.80} is not a CIDR without host bits")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
