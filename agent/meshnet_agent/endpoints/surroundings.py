"""What endpoints are told of the rest of the agent, and ask of it: small protocols.

The mesh's and the data plane's own parts are what they are; nothing here imports those to run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from meshnet.errors import MeshnetError
    from meshnet.model import Endpoint, IpNetwork, MeshSnapshot, NetworkName
    from meshnet_agent.dataplane.passes import PassResult


class Mesh(Protocol):
    """The mesh, as the store says it is."""

    @property
    def snapshot(self) -> MeshSnapshot:
        """Good until the next change."""
        ...

    async def check_store(self) -> None:
        """Look whether the store is this host's mesh; before anything is written to it.

        Raises:
            PolicyRefusedError: it is not.
            StoreUnavailableError: that cannot be told now.
        """
        ...


class DataPlane(Protocol):
    """What keeps the kernel as it should be, by passes."""

    @property
    def result(self) -> PassResult:
        """Of the last pass that could run."""
        ...

    def mark_dirty(self) -> None:
        """Ask for a pass over everything."""
        ...

    async def wait_for_pass(self) -> None:
        """Wait until the next pass over everything has ended."""
        ...

    async def settle(self) -> None:
        """Have a pass over everything that begins after this call, and wait until it has ended.

        Raises:
            KernelRefusedError: it could not run, or the firewall is not as it should be.
        """
        ...


class Subnets(Protocol):
    """This host's part in the networks."""

    @property
    def subnets(self) -> Mapping[NetworkName, Sequence[IpNetwork]]:
        """What it owns of each."""
        ...

    @property
    def errors(self) -> Mapping[NetworkName, MeshnetError]:
        """Why it owns nothing of a network."""
        ...


class NetworkLookup(Protocol):
    """The store, asked for one network."""

    async def network_exists(self, name: NetworkName) -> bool:
        """Whether there is one of that name, also if this host has not heard of it yet.

        Raises:
            StoreUnavailableError: the store does not answer.
        """
        ...


class OwnEndpoints(Protocol):
    """This host's endpoints, for those who only look."""

    @property
    def all(self) -> Sequence[Endpoint]:
        """The endpoints, oldest first."""
        ...

    def recorded_ids(self) -> set[str]:
        """Ids of all that is on disk, readable or not.

        Raises:
            KernelRefusedError: the disk refused to be read.
        """
        ...
