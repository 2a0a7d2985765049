"""The backend of each mode: the one table of all modes, and questions to it as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.backends import Setting
from meshnet.backends.bridge import BRIDGE
from meshnet.backends.macvlan import MACVLAN
from meshnet.backends.udp import UDP
from meshnet.backends.underlay_bridge import UNDERLAY_BRIDGE
from meshnet.backends.vxlan import VXLAN
from meshnet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshnet.backends import Addressing, Backend
    from meshnet.model import Network
    from meshnet.modes import Mode

BACKENDS: Mapping[Mode, Backend] = {
    backend.mode: backend for backend in (VXLAN, UDP, MACVLAN, UNDERLAY_BRIDGE, BRIDGE)
}
"""One for each mode."""


def backend_of(network: Network) -> Backend:
    """The backend of a network's mode; on one host another may carry it (`Backend.on`)."""
    return BACKENDS[network.mode]


def addressing_of(network: Network) -> Addressing:
    """How the hosts share a network's addresses."""
    return BACKENDS[network.mode].addressing


def check_mode(network: Network) -> None:
    """Refuse settings that a network's mode does not have, and the lack of those that it needs.

    Raises:
        UsageError: says which setting, and which modes have it.
    """
    for setting, given in (
        (Setting.FALLBACK, network.fallback),
        (Setting.DIRECT_ROUTING, network.direct_routing),
        (Setting.HOST_ACCESS, network.host_access),
        (Setting.PARENT, network.parent),
        (Setting.RANGE, network.ranges),
        (Setting.GATEWAY, network.gateways),
    ):
        if given:
            check_setting(network.mode, setting)
    BACKENDS[network.mode].check(network)


def check_setting(mode: Mode, setting: Setting) -> None:
    """Refuse a setting that a mode does not have.

    Raises:
        UsageError: says which modes have it.
    """
    if setting in BACKENDS[mode].settings:
        return
    having = [str(m) for m, backend in BACKENDS.items() if setting in backend.settings]
    *first, last = having
    modes = f"modes {', '.join(first)} and {last}" if first else f"mode {last}"
    # In every other mode a host reaches its endpoints anyway: "has no" would sound like a lack.
    lacks = "needs" if setting is Setting.HOST_ACCESS else "has"
    raise UsageError(f"mode {mode} {lacks} no {setting}: it is for {modes}")
