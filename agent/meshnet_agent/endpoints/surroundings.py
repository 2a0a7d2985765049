"""What endpoints ask of the rest of the agent, and what others ask of them: small protocols.

Endpoints also know what the mesh is (`meshnet_agent.mesh.view`) and what the data plane last did
(`meshnet_agent.dataplane.view`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from meshnet.errors import MeshnetError
    from meshnet.model import Endpoint, IpNetwork, NetworkName


class Subnets(Protocol):
    """This host's part in the networks."""

    @property
    def subnets(self) -> Mapping[NetworkName, Sequence[IpNetwork]]:
        """The subnets that it owns, by network."""
        ...

    @property
    def errors(self) -> Mapping[NetworkName, MeshnetError]:
        """Why it owns no subnet, by network."""
        ...


class NetworkLookup(Protocol):
    """Looks up one network in the store."""

    async def network_exists(self, name: NetworkName) -> bool:
        """Whether a network of that name exists, even if this host has not heard of it yet.

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
