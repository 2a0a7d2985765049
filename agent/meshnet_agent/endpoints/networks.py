"""Networks that endpoints can be attached to: those that are up on this host now."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

import trio

from meshnet.errors import ConflictError, NotFoundError, StoreUnavailableError
from meshnet.model import NetworkName
from meshnet_agent.endpoints.request import ReadyNetwork

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshnet.errors import MeshnetError
    from meshnet.kernel import Wiring
    from meshnet.model import IpNetwork
    from meshnet_agent.dataplane.view import DataplaneView
    from meshnet_agent.mesh.view import MeshView
    from meshnet_agent.tasks.worker import Worker

_READY_DEADLINE_S = 10.0
"""How long a request waits for a network to come up on this host."""


class HostSubnets(Protocol):
    """This host's subnets (`meshnet_agent.mesh.membership.Membership`)."""

    @property
    def subnets(self) -> Mapping[NetworkName, tuple[IpNetwork, ...]]:
        """By network, IPv4 first."""
        ...

    @property
    def errors(self) -> Mapping[NetworkName, MeshnetError]:
        """By network, why there are none."""
        ...


class NetworkList(Protocol):
    """The networks in the store (`meshnet.store.registry.Registry`)."""

    async def network_exists(self, name: NetworkName) -> bool:
        """Whether there is one of that name.

        Raises:
            StoreUnavailableError: the store does not answer.
        """
        ...


class ReadyNetworks:
    """Finds networks, and waits for them."""

    def __init__(
        self,
        mesh: MeshView,
        dataplane: DataplaneView,
        host_subnets: HostSubnets,
        stored: NetworkList,
        wiring: Worker[Wiring],
    ) -> None:
        self._mesh = mesh
        self._dataplane = dataplane
        self._host_subnets = host_subnets
        self._stored = stored
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
            raise NotFoundError(f"network {name} does not exist: meshnet network ls lists them")
        if outcome is None or outcome.plan is None:
            refused = self._host_subnets.errors.get(network.name)
            if refused is not None:
                raise refused
            reason = "; ".join(outcome.errors) if outcome is not None else ""
            raise ConflictError(
                f"network {name} is not up on this host: {reason or 'no pass has run yet'}"
            )
        plan = outcome.plan
        subnets = self._host_subnets.subnets.get(network.name, ())
        if not subnets or not await self._wiring.run(lambda w: w.has_link(plan.uplink)):
            raise ConflictError(f"network {name} is not up on this host: see meshnet status")
        return ReadyNetwork(
            network=network,
            subnets=subnets,
            uplink=plan.uplink,
            mtu_bytes=plan.mtu_bytes,
            endpoint_link=plan.endpoint_link,
            gso_max_bytes=plan.gso_max_bytes,
        )

    async def wait_for(self, name: str) -> ReadyNetwork:
        """A network, once it is up on this host.

        Raises:
            NotFoundError: there is no such network, not even in the store.
            PoolExhaustedError: it has no subnet left for this host.
            ConflictError: it did not come up in time; the message says why.
        """
        key = NetworkName(name)
        if key not in self._mesh.snapshot.networks and not await self._just_created(key):
            raise NotFoundError(f"network {name} does not exist: meshnet network ls lists them")
        with trio.move_on_after(_READY_DEADLINE_S):
            while not self._is_refused(key):
                with contextlib.suppress(NotFoundError, ConflictError):
                    return await self.ready(name)
                with trio.move_on_after(0.1):
                    await self._dataplane.wait_for_pass()
        return await self.ready(name)

    def _is_refused(self, name: NetworkName) -> bool:
        """Whether waiting for the network is in vain."""
        outcome = self._dataplane.result.networks.get(name)
        return name in self._host_subnets.errors or (outcome is not None and outcome.refused)

    async def _just_created(self, name: NetworkName) -> bool:
        try:
            return await self._stored.network_exists(name)
        except StoreUnavailableError:
            return False
