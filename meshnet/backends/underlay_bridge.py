"""``underlay-bridge``: endpoints on the physical network, on a bridge over the host's link.

::

    endpoint eth0 ── mne… ┐
    endpoint eth0 ── mne… ┼── mnp<VNI>, with the host's own addresses ── eth0 ── switch ── gateway

The bridge has taken the host's link over (`meshnet.kernel.takeover`,
docs/design/underlay-bridge.md): it has the link's MAC, addresses and routes, and the link is one of
its ports.  So the host, its endpoints and all other machines are neighbours.  The takeover comes
before any plan here, and `meshnet.diff` does not compare the bridge, which belongs to the host: a
pass must never delete the host's own addresses.
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
        """None of ours: the bridge is the host's link now, and the former link is its port."""
        return LinkNames(parents=(network.parent or "", self.takeover_bridge(network)))

    def takeover_bridge(self, network: Network) -> str:
        """Name of the bridge; at most 11 characters."""
        return f"mnp{network.vni}"

    def blocked(self, network: Network, underlay: Underlay, takeover: str | None) -> Blocked | None:
        """Also refused if the takeover failed; not up until it is done."""
        blocked = super().blocked(network, underlay, takeover)
        if blocked is not None:
            return blocked
        if takeover:
            return Blocked(takeover, refused=True)
        # Both: the agent's word may be older than what somebody did to the bridge since.
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
