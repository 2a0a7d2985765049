"""MTU arithmetic of VXLAN.

::

    |<------------------------- underlay MTU -------------------------->|
    | outer IP | UDP 8 | VXLAN 8 | inner Ethernet 14 | inner IP packet  |
    | 20 or 40 |                                     |<--- overlay MTU >|

RFC 7348 §5 (VXLAN), RFC 791 and RFC 8200 (outer header without options).
"""

from __future__ import annotations

from meshnet.errors import UsageError
from meshnet.wire.segment import MAX_SEGMENTS, MAX_SEND_BYTES
from meshnet.wire.vxlan import ENCAPSULATION_BYTES

UDP_HEADER_BYTES = 8
VXLAN_HEADER_BYTES = 8
ETHERNET_HEADER_BYTES = 14
IP_HEADER_BYTES = {4: 20, 6: 40}
MINIMUM_MTU_BYTES = {4: 576, 6: 1280}
"""Smallest MTU an overlay of that IP version may have (RFC 791 §3.1; RFC 8200 §5)."""
DEFAULT_GSO_MAX_BYTES = 65_536
"""``gso_max_size`` of a link that nobody set one for (``GSO_LEGACY_MAX_SIZE``)."""


def encapsulation_bytes(underlay_version: int) -> int:
    """Bytes VXLAN adds to an inner IP packet on an IPv4 (50) or IPv6 (70) underlay."""
    return (
        IP_HEADER_BYTES[underlay_version]
        + UDP_HEADER_BYTES
        + VXLAN_HEADER_BYTES
        + ETHERNET_HEADER_BYTES
    )


def overlay_mtu_bytes(underlay_mtu_bytes: int, underlay_version: int, inner_version: int) -> int:
    """Largest inner IP packet that fits the underlay's MTU.

    Args:
        underlay_mtu_bytes: MTU of the route to the peers.
        underlay_version: IP version of the outer header.
        inner_version: 6 if the overlay carries IPv6, else 4: decides the smallest allowed MTU.

    Raises:
        UsageError: the result is below the smallest MTU the inner IP version allows.
    """
    mtu = underlay_mtu_bytes - encapsulation_bytes(underlay_version)
    if mtu < MINIMUM_MTU_BYTES[inner_version]:
        raise UsageError(
            f"underlay MTU {underlay_mtu_bytes} leaves {mtu} bytes to an IPv{inner_version} "
            f"overlay, which needs {MINIMUM_MTU_BYTES[inner_version]}: raise the underlay's MTU"
        )
    return mtu


def gso_max_bytes(mtu_bytes: int) -> int:
    """The ``gso_max_size`` of endpoints with which a super-packet is one send of the VTEP.

    Cut and encapsulated, a full 64 KiB is a little more than one ``UDP_SEGMENT`` send may be, and
    the few segments that are left over cost as much as the rest.  The kernel takes up to 321 bytes
    for headers off what it is told (``sk_setup_caps``).

    Args:
        mtu_bytes: of the overlay.

    Returns:
        At most 65,536, the kernel's default and, before 5.19, the most it takes.
    """
    segments = min(MAX_SEGMENTS, MAX_SEND_BYTES // (mtu_bytes + ENCAPSULATION_BYTES))
    return min(segments * (mtu_bytes - 52) + 330, DEFAULT_GSO_MAX_BYTES)
