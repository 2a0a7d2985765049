"""``underlay-bridge``: endpoints on the physical network, by a bridge in the host's link's place.

::

    endpoint eth0 ── mne… ┐
    endpoint eth0 ── mne… ┼── mnp<VNI>, with the host's own addresses ── eth0 ── switch ── gateway

The bridge has taken the host's link over (`meshnet.kernel.takeover`,
docs/design/underlay-bridge.md): it has the link's MAC, addresses and routes, and the link is one of
its ports.  So host and endpoints are neighbours on it, and of all other machines.  That is done
before anything is planned here, and nothing of it is compared by `meshnet.diff`: what is on the
bridge is the host's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.backends import Blocked, LinkNames, NetworkPlan
from meshnet.backends.physical import PhysicalBackend, endpoint_mtu
from meshnet.firewall import FirewallNetwork
from meshnet.firewall.elements import endpoint_elements
from meshnet.modes import Mode
from meshnet.state import Link, LinkKind, endpoint_link_name

if TYPE_CHECKING:
    from meshnet.backends import NetworkInput, Underlay
    from meshnet.model import Network
    from meshnet.state import KernelState


class UnderlayBridgeBackend(PhysicalBackend):
    """The mode (see `meshnet.backends.Backend`)."""

    mode = Mode.UNDERLAY_BRIDGE

    def link_names(self, network: Network) -> LinkNames:
        """None of ours: the bridge is the host's link now, and its link a port of that."""
        return LinkNames(parents=(network.parent or "", self.takeover_bridge(network)))

    def takeover_bridge(self, network: Network) -> str:
        """Name of the bridge; at most 11 characters."""
        return f"mnp{network.vni}"

    def blocked(self, network: Network, underlay: Underlay, takeover: str | None) -> Blocked | None:
        """Refused also if the takeover failed; until it is done the network is not up."""
        blocked = super().blocked(network, underlay, takeover)
        if blocked is not None:
            return blocked
        if takeover:
            return Blocked(takeover, refused=True)
        if takeover is None or self.takeover_bridge(network) not in underlay.links:
            return Blocked(f"link {network.parent} is being taken over", refused=False)
        return None

    def plan_host(self, wanted: NetworkInput, state: KernelState) -> NetworkPlan:
        """The ports of endpoints."""
        bridge = self.takeover_bridge(wanted.network)
        for endpoint in wanted.endpoints:
            state.links[endpoint_link_name(endpoint.id)] = Link(
                LinkKind.VETH, endpoint.mtu_bytes, None, master=bridge, hairpin=True
            )
            state.elements.update(endpoint_elements(endpoint))
        mtu_bytes, errors = endpoint_mtu(wanted, bridge)
        return NetworkPlan(
            mtu_bytes=mtu_bytes,
            uplink=bridge,
            firewall=FirewallNetwork(),
            errors=errors,
        )


UNDERLAY_BRIDGE = UnderlayBridgeBackend()
