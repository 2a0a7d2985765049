"""``bridge``: a network of this host only, like Docker's default one.

::

    endpoint eth0 ── mne… ┐
    endpoint eth0 ── mne… ┴ mnb<VNI> 172.30.0.1 ──(routing, masquerade)── the host's own links

Every host uses the network's whole CIDR; none of its packets reaches another host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.backends import Addressing, Backend, LinkNames
from meshnet.backends.routed_bridge import bridge_name, plan_bridge
from meshnet.modes import Mode

if TYPE_CHECKING:
    from meshnet.backends import NetworkInput, NetworkPlan
    from meshnet.model import Network
    from meshnet.state import KernelState


class BridgeBackend(Backend):
    """The mode (see `meshnet.backends.Backend`); its networks do not reach other hosts."""

    mode = Mode.BRIDGE
    addressing = Addressing.WHOLE

    def link_names(self, network: Network) -> LinkNames:
        """The bridge."""
        return LinkNames(local=(bridge_name(network),))

    def plan_host(self, wanted: NetworkInput, state: KernelState) -> NetworkPlan:
        """Bridge and gateway addresses."""
        own_bytes = wanted.network.mtu_bytes
        mtu_bytes = own_bytes if own_bytes is not None else wanted.underlay.mtu_bytes
        return plan_bridge(wanted, mtu_bytes, {}, state)


BRIDGE = BridgeBackend()
