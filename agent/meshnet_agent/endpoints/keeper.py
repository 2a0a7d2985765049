"""Keeps endpoints as they should be while the mesh and the kernel change around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.state import endpoint_link_name
from meshnet_agent.mesh.view import MeshListener
from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    from meshnet.model import MeshSnapshot
    from meshnet.store.mirror import Changes
    from meshnet_agent.dataplane.passes import PassResult
    from meshnet_agent.endpoints.attach import Endpoints
    from meshnet_agent.endpoints.networks import ReadyNetworks
    from meshnet_agent.mesh.view import MeshView


class Keeper(MeshListener):
    """Frees endpoints whose network is gone, and heals those whose link is."""

    def __init__(self, endpoints: Endpoints, networks: ReadyNetworks, mesh: MeshView) -> None:
        self._endpoints = endpoints
        self._networks = networks
        self._mesh = mesh
        self._missing: frozenset[str] = frozenset()
        self._look = Flag()
        self._look.set()  # networks may have been removed while this agent was down

    def mesh_changed(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        """See `MeshListener`."""
        if changes is None or changes.networks:
            self._look.set()

    def passed(self, result: PassResult) -> None:
        """See `PassListener`: nothing but a look tells of the end of a macvlan."""
        known = {endpoint_link_name(e.id) for e in self._endpoints.all}
        self._missing = result.missing & known
        if self._missing or any(e.parent is not None for e in self._endpoints.all):
            self._look.set()

    async def run(self) -> None:
        """Free and heal for ever."""
        while True:
            await self._look.wait()
            snapshot = self._mesh.snapshot
            if not snapshot.holes:
                for network in {e.network for e in self._endpoints.all} - snapshot.networks.keys():
                    await self._endpoints.remove_network(network)
            missing, self._missing = self._missing, frozenset()
            if missing or any(e.parent is not None for e in self._endpoints.all):
                await self._endpoints.heal(missing, self._networks.ready)
