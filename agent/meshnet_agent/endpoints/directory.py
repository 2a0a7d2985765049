"""This host's endpoints, as every part of the agent sees them.

The parts that attach and keep endpoints write here, one at a time (`EndpointDirectory.changing`);
all others only read.  A change is on disk before it is here, because after a crash the next agent
brings the kernel to what is recorded.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from meshnet.errors import NotFoundError
from meshnet.model import EndpointId
from meshnet.state import endpoint_link_name
from meshnet_agent.endpoints.sandbox import select_bound, select_of_process
from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence

    from meshnet.model import Endpoint, HostId, IpNetwork, NetworkName
    from meshnet.sandbox import NetnsId
    from meshnet_agent.endpoints.hold import BoundNetns
    from meshnet_agent.endpoints.records import EndpointRecords


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointsReport:
    """This host's endpoints.

    Attributes:
        unhealed: those whose link is gone for good, and why.
        unreadable: ids of those whose record could not be read.
    """

    all: Sequence[Endpoint]
    unhealed: Mapping[EndpointId, str]
    unreadable: Collection[str]


class EndpointDirectory:
    """All endpoints of this host.

    Attributes:
        host: the id of this host.
        changed: raised when an endpoint came, went or changed, for whoever publishes them.
        unhealed: endpoints whose link is gone and could not be made again, and why.
        unreadable: ids of endpoints whose record could not be read at the start, and whose link
            exists.
        inherited: what an earlier agent left on disk and nobody has taken over yet.
    """

    def __init__(self, records: EndpointRecords, host: HostId) -> None:
        self.host = host
        self.changed = Flag()
        self.unhealed: dict[EndpointId, str] = {}
        self.unreadable: set[str] = set()
        self.inherited: list[Endpoint] = []
        self._lock = trio.Lock()
        self._is_written = False
        self._records = records
        self._endpoints: dict[EndpointId, Endpoint] = {}
        self._ending: set[EndpointId] = set()

    # --- reading ------------------------------------------------------------------------------

    @property
    def all(self) -> list[Endpoint]:
        """The endpoints, oldest first."""
        return list(self._endpoints.values())

    def get(self, identity: EndpointId) -> Endpoint | None:
        """The endpoint with an id, as it is now."""
        return self._endpoints.get(identity)

    def find(self, name: str) -> Endpoint:
        """The endpoint with a name or id.

        Raises:
            NotFoundError: this host has none.
        """
        for endpoint in self._endpoints.values():
            if name in (endpoint.name, endpoint.id):
                return endpoint
        raise NotFoundError(
            f"endpoint {name} does not exist on this host: meshnet endpoint ls lists them"
        )

    def in_netns(self, netns: NetnsId) -> list[Endpoint]:
        """The endpoints in a network namespace."""
        return [e for e in self._endpoints.values() if e.sandbox.netns == netns]

    def of_process(self, pid: int) -> list[Endpoint]:
        """Those in a process's network namespace; if it has ended, those attached by its pid."""
        return select_of_process(self._endpoints.values(), pid)

    def find_of_process(self, pid: int, network: str) -> Endpoint:
        """The one of `of_process` that is on a network.

        Raises:
            NotFoundError: there is none.
        """
        for endpoint in self.of_process(pid):
            if endpoint.network == network:
                return endpoint
        raise NotFoundError(
            f"process {pid} has no endpoint on network {network}: meshnet endpoint ls lists them"
        )

    def find_bound(self, bound: BoundNetns, network: str) -> Endpoint:
        """The one on a network in the namespace that is bound to a path, or was.

        Raises:
            NotFoundError: there is none.
        """
        for endpoint in select_bound(self._endpoints.values(), bound):
            if endpoint.network == network:
                return endpoint
        raise NotFoundError(
            f"network namespace {bound.path} has no endpoint on network {network}: "
            "meshnet endpoint ls lists them"
        )

    def subnet_of(self, network: NetworkName, version: int) -> IpNetwork | None:
        """The subnet of an IP version that endpoints of a network are in, also while starting."""
        # With those not taken over yet: a host that comes back must get the subnet that they use.
        known = (*self._endpoints.values(), *self.inherited)
        of_network = (a for e in known if e.network == network for a in e.addresses)
        return next((a.network for a in of_network if a.version == version), None)

    def expects_link(self, name: str) -> bool:
        """Whether the host-side link of that name belongs to an endpoint that is not ending."""
        identity = EndpointId(name.removeprefix(endpoint_link_name("")))
        return identity in self._endpoints and identity not in self._ending

    def recorded_ids(self) -> set[str]:
        """Ids of all that is on disk, readable or not.

        Raises:
            KernelRefusedError: the disk refused to be read.
        """
        return self._records.ids()

    def report(self) -> EndpointsReport:
        """This host's endpoints, now."""
        return EndpointsReport(
            all=self.all, unhealed=dict(self.unhealed), unreadable=frozenset(self.unreadable)
        )

    # --- writing ------------------------------------------------------------------------------

    def load(self) -> None:
        """Read what is on disk: it is `inherited` until somebody takes it over.

        Raises:
            KernelRefusedError: the disk refused to be read.
        """
        self.inherited, self.unreadable = self._records.load()

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """While the block runs, nobody else writes; then `changed` is raised if the block wrote.

        It is not raised sooner, because what is undone at once need not be published.
        """
        async with self._lock:
            self._is_written = False
            try:
                yield
            finally:
                if self._is_written:
                    self.changed.set()

    def add(self, endpoint: Endpoint) -> None:
        """Add an endpoint that is on disk already (`EndpointLinks` records what it connects)."""
        self._endpoints[endpoint.id] = endpoint
        self._is_written = True

    def replace(self, endpoint: Endpoint) -> None:
        """Record a known endpoint as it is now.

        Raises:
            KernelRefusedError: the disk refused; it is as before.
        """
        self._records.save(endpoint)
        self.add(endpoint)

    def remove(self, identity: EndpointId) -> None:
        """Forget an endpoint whose link is gone.

        Raises:
            KernelRefusedError: the disk refused; it is as before.
        """
        self._records.remove(identity)
        del self._endpoints[identity]
        self.unhealed.pop(identity, None)
        self._is_written = True

    @contextlib.contextmanager
    def ending(self, identity: EndpointId) -> Iterator[None]:
        """While the block runs, a missing link of the endpoint is expected and not healed."""
        # Blocks nest, since the end of a sandbox leads to `Keeper.free`: the outermost one counts.
        is_first = identity not in self._ending
        self._ending.add(identity)
        try:
            yield
        finally:
            if is_first:
                self._ending.discard(identity)
