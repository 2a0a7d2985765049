"""``bridge``: a network of this host only, as Docker's default one.

::

    endpoint eth0 ── mne… ┐
    endpoint eth0 ── mne… ┴ mnb<VNI> 172.30.0.1 ──(routing, masquerade)── the host's own links

Every host has the network's whole CIDR for itself; no packet of it reaches another host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.backends.overlay import plan_bridge

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.backends import NetworkInput, NetworkPlan, NexthopIds, Peer
    from meshnet.model import HostId
    from meshnet.state import KernelState


class BridgeBackend:
    """The mode (see `meshnet.backends.Backend`)."""

    def plan_host(self, wanted: NetworkInput, state: KernelState) -> NetworkPlan:
        """Bridge and gateway addresses."""
        return plan_bridge(wanted, None, state)

    def plan_peers(
        self, wanted: NetworkInput, peers: Iterable[Peer], state: KernelState, ids: NexthopIds
    ) -> dict[HostId, str]:
        """Nothing: no other host has a part of it."""
        return {}


BRIDGE = BridgeBackend()
