"""The names of the modes that a network may have.

A mode's backend says what the mode does (`meshnet.backends.table`).  The names are in a separate
module because the client offers them, and must start fast.
"""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """How a network carries its packets."""

    VXLAN = "vxlan"
    UDP = "udp"
    MACVLAN = "macvlan"
    UNDERLAY_BRIDGE = "underlay-bridge"
    BRIDGE = "bridge"


DEFAULT_MODE = next(iter(Mode))
"""Mode of a network whose creator names none: the first."""
