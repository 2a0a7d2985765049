"""MAC addresses that are computed, never stored and never random (design decision D4).

::

     0        8        16                              48
    +--------+--------+--------------------------------+
    |  0x02  |  role  |  low 32 bits of the address    |
    +--------+--------+--------------------------------+

0x02 is the "locally administered" bit of IEEE 802.  The role keeps a VTEP, a gateway and an
endpoint apart.  For an IPv6 subnet the 32 bits are those just left of the host part, which differ
between all subnets of one network (`meshnet.ipam` allows at most 2^32 of them).

For an endpoint's IPv6 address there is no such part: its last 32 bits are those of other addresses
on the same bridge or physical network, too.  So its MAC has a hash of all of it::

     0           8        16                              48
    +-----------+--------+--------------------------------+
    | 6 bits 10 |  0x45  |  32 bits of the hash           |
    +-----------+--------+--------------------------------+
"""

from __future__ import annotations

import re
from hashlib import blake2s
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshnet.model import IpAddress, IpNetwork

_VTEP, _GATEWAY, _ENDPOINT, _ENDPOINT6 = ord("m"), ord("g"), ord("e"), ord("E")
_TEXT = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)


def parse_mac(text: str) -> bytes:
    """The six bytes of a MAC address in its usual text form, such as ``02:6d:0a:2a:01:00``.

    Raises:
        ValueError: it is none.
    """
    if not _TEXT.fullmatch(text):
        raise ValueError(f"{text!r:.80} is not a MAC address")
    return bytes.fromhex(text.replace(":", ""))


def vtep_mac(subnet: IpNetwork) -> bytes:
    """MAC of the VXLAN device of the host that owns `subnet`: unique within the network."""
    bits = int(subnet.network_address)
    if subnet.version == 6:
        bits >>= subnet.max_prefixlen - subnet.prefixlen
    return _mac(_VTEP, bits)


def gateway_mac(subnet: IpNetwork) -> bytes:
    """MAC of the bridge that is the gateway of `subnet`."""
    return bytes((0x02, _GATEWAY)) + vtep_mac(subnet)[2:]


def endpoint_mac(address: IpAddress) -> bytes:
    """MAC of the endpoint with `address`: an address that comes back brings its MAC along.

    Of 10,000 IPv6 addresses on one physical network, two have one MAC once in 5,000 cases.
    """
    if address.version == 4:
        return _mac(_ENDPOINT, int(address))
    first, *rest = blake2s(address.packed, digest_size=5).digest()
    return bytes((first & ~3 | 2, _ENDPOINT6, *rest))


def is_endpoint_mac(mac: bytes) -> bool:
    """Whether an endpoint, of whatever mesh, has this MAC."""
    return mac[:2] == bytes((0x02, _ENDPOINT)) or (mac[0] & 3 == 2 and mac[1] == _ENDPOINT6)


def link_local_of(mac: bytes) -> bytes:
    """The IPv6 link-local address of a MAC, packed: modified EUI-64 (RFC 4291, appendix A)."""
    return b"\xfe\x80" + bytes(6) + bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:]


def _mac(role: int, bits: int) -> bytes:
    return bytes((0x02, role)) + (bits & 0xFFFF_FFFF).to_bytes(4, "big")
