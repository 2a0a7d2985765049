"""Networks that are up on this host: what attaching needs of one, now or as soon as it is up."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from meshnet.errors import ConflictError, NotFoundError, StoreUnavailableError
from meshnet.model import NetworkName
from meshnet_agent.dataplane.problems import find_dead_link, find_problems
from meshnet_agent.endpoints.request import ReadyNetwork

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.kernel import Wiring
    from meshnet_agent.dataplane.view import DataplaneView
    from meshnet_agent.endpoints.surroundings import NetworkLookup, Subnets
    from meshnet_agent.mesh.view import MeshView
    from meshnet_agent.tasks.worker import Worker

_DEADLINE_S = 10.0
"""How long to wait for a network to come up on this host."""
_LOOK_AGAIN_S = 0.1


class ReadyNetworks:
    """Looks up networks for endpoints.

    Args:
        registry: asked for networks that the mesh's snapshot does not show yet.
        wiring: says whether a network's uplink exists, whatever the last pass said.
    """

    def __init__(
        self,
        mesh: MeshView,
        dataplane: DataplaneView,
        subnets: Subnets,
        registry: NetworkLookup,
        wiring: Worker[Wiring],
    ) -> None:
        self._mesh = mesh
        self._dataplane = dataplane
        self._subnets = subnets
        self._registry = registry
        self._wiring = wiring

    async def ready(self, name: str) -> ReadyNetwork:
        """A network that is up on this host now.

        Raises:
            NotFoundError: there is no such network.
            ConflictError, PoolExhaustedError: it is not up; the message says why.
        """
        network = self._mesh.snapshot.networks.get(NetworkName(name))
        outcome = self._dataplane.result.networks.get(NetworkName(name))
        if network is None:
            raise _missing(name)
        if outcome is None or outcome.plan is None:
            refused = self._subnets.errors.get(network.name)
            if refused is not None:
                raise refused
            reason = "; ".join(outcome.errors) if outcome is not None else ""
            raise ConflictError(
                f"network {name} is not up on this host: {reason or 'no pass has run yet'}"
            )
        plan = outcome.plan
        subnets = self._subnets.subnets.get(network.name, ())
        # Ask the kernel, too: somebody may have deleted the uplink since the last pass.
        if not subnets or not await self._wiring.run(lambda wiring: wiring.has_link(plan.uplink)):
            raise ConflictError(f"network {name} is not up on this host: see meshnet status")
        return ReadyNetwork(
            network=network,
            subnets=subnets,
            uplink=plan.uplink,
            mtu_bytes=plan.mtu_bytes,
            endpoint_link=plan.endpoint_link,
            gso_max_bytes=plan.gso_max_bytes,
        )

    async def wait_for(self, name: str, *, carried: bool = True) -> ReadyNetwork:
        """A network, once it is up on this host.

        Args:
            carried: wait until the kernel has all of its links, too.

        Raises:
            NotFoundError: there is no such network, not even in the store.
            PoolExhaustedError: it has no subnet left for this host.
            ConflictError: it did not come up in time; the message says why.
        """
        key = NetworkName(name)
        # Another host may have created it a moment ago, and the watch has not told us yet.
        if key not in self._mesh.snapshot.networks and not await self._just_created(key):
            raise _missing(name)
        with trio.move_on_after(_DEADLINE_S):
            while not self._is_refused(key):
                with contextlib.suppress(NotFoundError, ConflictError):
                    return await self._ready(name, carried=carried)
                # A pass over some hosts wakes nobody, so look again after a while anyway.
                with trio.move_on_after(_LOOK_AGAIN_S):
                    await self._dataplane.wait_for_pass()
        # Once more, now for the reason: this raises what stood in the way.
        return await self._ready(name, carried=carried)

    async def find_problems(self, name: NetworkName) -> Sequence[str]:
        """What does not work of a network that is up, as far as passes can tell."""
        with trio.move_on_after(_DEADLINE_S):
            # Links were made; what is on them comes with the next pass.
            while self._dataplane.result.again:
                await self._dataplane.wait_for_pass()
        return self.current_problems(name)

    def current_problems(self, name: NetworkName) -> Sequence[str]:
        """What does not work of a network, by the last pass."""
        network = self._mesh.snapshot.networks.get(name)
        return find_problems(self._dataplane.result, network) if network is not None else ()

    async def _ready(self, name: str, *, carried: bool) -> ReadyNetwork:
        found = await self.ready(name)
        dead = find_dead_link(self._dataplane.result, found.network) if carried else None
        if dead is not None:
            raise ConflictError(
                f"network {name} is not up on this host: the kernel refused {dead}: "
                "see meshnet status"
            )
        return found

    def _is_refused(self, name: NetworkName) -> bool:
        """Whether waiting for the network is pointless."""
        outcome = self._dataplane.result.networks.get(name)
        return name in self._subnets.errors or (outcome is not None and outcome.refused)

    async def _just_created(self, name: NetworkName) -> bool:
        try:
            return await self._registry.network_exists(name)
        except StoreUnavailableError:
            return False


def _missing(name: str) -> NotFoundError:
    return NotFoundError(f"network {name} does not exist: meshnet network ls lists them")
