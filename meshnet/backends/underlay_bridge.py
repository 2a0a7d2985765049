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

from meshnet.backends import NetworkPlan
from meshnet.backends.macvlan import endpoint_mtu
from meshnet.firewall import FirewallNetwork
from meshnet.firewall.elements import endpoint_elements
from meshnet.state import Link, LinkKind, endpoint_link_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.backends import NetworkInput, NexthopIds, Peer
    from meshnet.model import HostId, Network
    from meshnet.state import KernelState


def parent_bridge_name(network: Network) -> str:
    """Name of the bridge that takes the place of the network's parent; at most 11 characters."""
    return f"mnp{network.vni}"


class UnderlayBridgeBackend:
    """The mode (see `meshnet.backends.Backend`)."""

    def plan_host(self, wanted: NetworkInput, state: KernelState) -> NetworkPlan:
        """The ports of endpoints."""
        bridge = parent_bridge_name(wanted.network)
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

    def plan_peers(
        self, wanted: NetworkInput, peers: Iterable[Peer], state: KernelState, ids: NexthopIds
    ) -> dict[HostId, str]:
        """Nothing: the physical network leads to other hosts' endpoints."""
        return {}


UNDERLAY_BRIDGE = UnderlayBridgeBackend()
