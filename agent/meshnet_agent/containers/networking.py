"""What containers need of the agent's networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.model import Endpoint
    from meshnet_agent.endpoints.request import AttachRequest


class Networking(Protocol):
    """Puts processes on networks (`meshnet_agent.mesh.operations.MeshOperations`)."""

    async def attach(self, pid: int, request: AttachRequest) -> Endpoint:
        """Attach a process; if the network is not up on this host yet, waits for a while.

        Raises:
            MeshnetError: nothing was changed; the class says why.
        """

    async def detach(self, pid: int, network: str) -> object:
        """Undo an attach; the process may have ended.

        Raises:
            NotFoundError: the endpoint is already gone.
        """

    def endpoints_of(self, pid: int) -> Sequence[Endpoint]:
        """The endpoints in a process's network namespace."""
