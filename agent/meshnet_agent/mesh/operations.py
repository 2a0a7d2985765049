"""Operations on the mesh and on this host's endpoints on behalf of a caller: values in and out.

The API and containers call them; nothing here knows about HTTP or JSON.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshnet.errors import ConflictError, MeshnetError, NotFoundError, StoreUnavailableError
from meshnet.model import HostId, Network, NetworkName
from meshnet_agent.endpoints.sandbox import open_bound_sandbox, open_sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from meshnet.model import Endpoint, PublishedPort, Vni
    from meshnet.store.registry import Registry
    from meshnet_agent.dataplane.occupancy import Occupancy
    from meshnet_agent.endpoints.attach import Attacher
    from meshnet_agent.endpoints.directory import EndpointDirectory
    from meshnet_agent.endpoints.hold import BoundNetns
    from meshnet_agent.endpoints.networks import ReadyNetworks
    from meshnet_agent.endpoints.request import AttachRequest
    from meshnet_agent.mesh.view import MeshView


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedNetwork:
    """A network that was created.

    Attributes:
        mtu_bytes: the MTU of its endpoints on this host; None: it has not come up here.
        error: why it has not come up, or not wholly; None if it has.
    """

    network: Network
    mtu_bytes: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshEndpoints:
    """Endpoints of all hosts, by network, host and name.

    Attributes:
        warning: why only this host's are listed; None if all are.
    """

    endpoints: Sequence[Endpoint]
    warning: str | None


class MeshOperations:
    """The operations of one agent; each may raise `MeshnetError`."""

    def __init__(
        self,
        mesh: MeshView,
        registry: Registry,
        networks: ReadyNetworks,
        endpoints: EndpointDirectory,
        attacher: Attacher,
        occupancy: Occupancy,
    ) -> None:
        self._mesh = mesh
        self._registry = registry
        self._networks = networks
        self._endpoints = endpoints
        self._attacher = attacher
        self._occupancy = occupancy

    # --- networks and hosts -----------------------------------------------------------------------

    async def create_network(
        self, build: Callable[[Vni], Network], vni: int | None
    ) -> CreatedNetwork:
        """Create a network and wait, for a while, until it is up here.

        If it does not come up on this host, it exists all the same, and `error` says why.

        Args:
            build: makes the network, given its VNI.
            vni: the VNI asked for; None: a free one.

        Raises:
            ConflictError: its name, VNI, UDP port or addresses are in use.
            PolicyRefusedError: addresses of its CIDRs are in use outside of networks: by etcd, by
                hosts, or on this host's links and routes.  Or the store is not this host's mesh;
                operations that remove something raise it then, too.
        """
        await self._mesh.check_store()
        check_free = await self._occupancy.look()
        network = await self._registry.create_network(build, vni, check_free)
        try:
            ready = await self._networks.wait_for(network.name)
        except MeshnetError as error:
            return CreatedNetwork(network=network, error=str(error))
        problems = await self._networks.find_problems(network.name)
        warning = _summary(network.name, problems)
        return CreatedNetwork(network=network, mtu_bytes=ready.mtu_bytes, error=warning)

    async def remove_network(self, name: str) -> None:
        """Remove a network (`Registry.remove_network`).

        Raises:
            NotFoundError: there is no such network.
            ConflictError: it has endpoints.
        """
        # The registry checks published endpoints only, and this host's may not be published yet.
        mine = [e for e in self._endpoints.all if e.network == name]
        if mine:
            some = ", ".join(e.name for e in mine[:3])
            raise ConflictError(
                f"network {name} has {len(mine)} endpoints on this host ({some}): detach them first"
            )
        await self._mesh.check_store()
        await self._registry.remove_network(NetworkName(name))

    async def remove_host(self, host: HostId) -> Sequence[Endpoint]:
        """Remove a host (`Registry.remove_host`); returns the endpoints that it had published."""
        await self._mesh.check_store()
        return await self._registry.remove_host(host)

    # --- endpoints --------------------------------------------------------------------------------

    def warn_of(self, network: NetworkName) -> str | None:
        """What does not work of a network on this host; None: all does, by the last pass."""
        return _summary(network, self._networks.current_problems(network))

    async def attach(self, pid: int, request: AttachRequest) -> Endpoint:
        """Attach a process, once its network is up here (`Attacher.attach`)."""
        with open_sandbox(pid) as sandbox:
            return await self._attacher.attach(sandbox, request)

    async def detach(self, pid: int, network: str) -> Endpoint:
        """Detach a process; returns the endpoint that was removed (`Attacher.detach`)."""
        found = self._endpoints.find_of_process(pid, network)
        return await self._attacher.detach(found.sandbox.netns, network)

    async def attach_bound(
        self, bound: BoundNetns, owner: str | None, request: AttachRequest
    ) -> Endpoint:
        """Attach a namespace bound to a path, perhaps without a process (`Attacher.attach`).

        Args:
            owner: key of who will release it; None: the namespace is its own owner.
        """
        with open_bound_sandbox(bound, owner) as sandbox:
            return await self._attacher.attach(sandbox, request)

    async def detach_bound(self, bound: BoundNetns, network: str) -> Endpoint:
        """Detach a namespace bound to a path; returns the endpoint that was."""
        found = self._endpoints.find_bound(bound, network)
        return await self._attacher.detach(found.sandbox.netns, network)

    async def release(self, owner: str, network: str | None) -> Sequence[Endpoint]:
        """Free what an owner holds (`Attacher.release`)."""
        return await self._attacher.release(owner, network)

    async def collect(self, prefix: str, valid: Collection[str]) -> Sequence[Endpoint]:
        """Free what owners hold that are not valid any more (`Attacher.collect`)."""
        return await self._attacher.collect(prefix, valid)

    async def publish(self, name: str, ports: Sequence[PublishedPort]) -> Endpoint:
        """Publish ports of a live endpoint (`Attacher.publish`)."""
        await self._find(name)
        return await self._attacher.publish(name, ports)

    async def unpublish(self, name: str, ports: Sequence[str]) -> Endpoint:
        """Stop publishing ports of a live endpoint (`Attacher.unpublish`)."""
        await self._find(name)
        return await self._attacher.unpublish(name, ports)

    async def _find(self, name: str) -> Endpoint:
        """An endpoint of this host; if another host has it, the error names that host."""
        try:
            return self._endpoints.find(name)
        except NotFoundError:
            with contextlib.suppress(StoreUnavailableError):
                for endpoint in await self._registry.list_endpoints():
                    if name in (endpoint.name, endpoint.id):
                        raise NotFoundError(
                            f"endpoint {name} is on host {endpoint.host}: ask the agent there"
                        ) from None
            raise

    def endpoints_of(self, pid: int) -> Sequence[Endpoint]:
        """The endpoints in a process's network namespace."""
        return self._endpoints.of_process(pid)

    async def list_endpoints(self) -> MeshEndpoints:
        """Endpoints of all hosts; of this host alone while the store does not answer."""
        local = self._endpoints.all
        here = self._endpoints.host
        warning = None
        others: list[Endpoint] = []
        try:
            others = [e for e in await self._registry.list_endpoints() if e.host != here]
        except StoreUnavailableError as error:
            warning = f"only this host's endpoints are shown: {error}"
        found = sorted([*local, *others], key=lambda e: (e.network, e.host, e.name))
        return MeshEndpoints(endpoints=found, warning=warning)


def _summary(network: NetworkName, problems: Sequence[str]) -> str | None:
    if not problems:
        return None
    first, *others = problems
    more = f" (and {len(others)} more)" if others else ""
    return f"network {network} does not work wholly on this host: {first}{more}: see meshnet status"
