"""The modes that a network may have: their names and nothing else.

What each of them does is its backend's (`meshnet.backends.table`).  A module of its own, so that
the client, which must start fast, can offer them.
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
"""Of a network whose creator names none: the first."""
