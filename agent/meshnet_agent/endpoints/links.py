"""The links of endpoints: in the kernel and on disk, neither without the other.

All of it runs in the wiring's own thread, one call at a time, so that an attach waits neither for
the reconciler nor, on the event loop, for the disk.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from meshnet.kernel import EndpointWiring
from meshnet_agent.endpoints.request import inner_routes

if TYPE_CHECKING:
    from meshnet.kernel import Wiring
    from meshnet.model import Endpoint
    from meshnet_agent.endpoints.records import EndpointRecords
    from meshnet_agent.endpoints.request import ReadyNetwork
    from meshnet_agent.endpoints.sandbox import OpenSandbox
    from meshnet_agent.tasks.worker import Worker


class EndpointLinks:
    """Makes and removes links together with their records."""

    def __init__(self, wiring: Worker[Wiring], records: EndpointRecords) -> None:
        self._wiring = wiring
        self._records = records

    async def connect(
        self, sandbox: OpenSandbox, endpoint: Endpoint, ready: ReadyNetwork, *, is_new: bool
    ) -> Endpoint:
        """Connect a sandbox; on return the endpoint works and is on disk.

        Args:
            is_new: False for an endpoint that is recorded already: its record stays even if it
                cannot be connected again.

        Returns:
            The endpoint as it is now: with the default routes that the namespace did not have yet.

        Raises:
            MeshnetError: nothing was changed; the class says why.
        """
        return await self._wiring.run(
            lambda wiring: self._connect(wiring, sandbox.netns_fd, endpoint, ready, is_new=is_new)
        )

    def _connect(
        self,
        wiring: Wiring,
        netns_fd: int,
        endpoint: Endpoint,
        ready: ReadyNetwork,
        *,
        is_new: bool,
    ) -> Endpoint:
        """In the wiring's thread: kernel first, then disk."""
        if is_new and endpoint.parent is not None:
            # A macvlan is not seen from the host's namespace: after a crash only this tells of it.
            self._records.save_draft(endpoint)
        try:
            default = wiring.connect(
                netns_fd,
                EndpointWiring(
                    endpoint=endpoint,
                    uplink=ready.uplink,
                    routes=inner_routes(ready),
                    gso_max_bytes=ready.gso_max_bytes,
                ),
            )
        except BaseException:
            if is_new:
                self._records.remove(endpoint.id)
            raise
        endpoint = replace(endpoint, default_versions=default)
        try:
            self._records.save(endpoint)
        except BaseException:
            wiring.disconnect(endpoint)
            if is_new:
                self._records.remove(endpoint.id)
            raise
        return endpoint

    async def disconnect(self, endpoint: Endpoint) -> None:
        """Remove an endpoint's link; its record stays.  Idempotent.

        Raises:
            KernelRefusedError: the link exists and cannot be removed.
        """
        await self._wiring.run(lambda wiring: wiring.disconnect(endpoint))

    async def lead_default(self, sandbox: OpenSandbox, endpoint: Endpoint) -> Endpoint:
        """Lead the namespace's default route through an endpoint, where no other has it.

        Returns:
            The endpoint as it is now; it is not on disk yet.

        Raises:
            KernelRefusedError: its link is gone, or the kernel refused.
        """
        more = await self._wiring.run(lambda w: w.lead_default(sandbox.netns_fd, endpoint))
        versions = sorted({*endpoint.default_versions, *more})
        return replace(endpoint, default_versions=tuple(versions))

    async def discard(self, endpoint: Endpoint) -> None:
        """Remove the link and the record of an endpoint that nobody has taken over.

        Raises:
            KernelRefusedError: one of them cannot be removed.
        """
        await self.disconnect(endpoint)
        # The record last: after a crash in between, the next start finds it and does the rest.
        self._records.remove(endpoint.id)

    def load_drafts(self) -> list[Endpoint]:
        """Endpoints that were about to be connected when the agent was killed.

        Raises:
            KernelRefusedError: the disk refused to be read.
        """
        return self._records.load_drafts()

    async def take_over(self, endpoint: Endpoint) -> None:
        """Tell the firewall of what an earlier agent connected; writes nothing."""
        await self._wiring.run(lambda wiring: wiring.adopt(endpoint))

    async def holds(self, sandbox: OpenSandbox, endpoint: Endpoint) -> bool:
        """Whether an endpoint's macvlan is in its namespace.

        Raises:
            KernelRefusedError: the namespace cannot be looked at.
        """
        return await self._wiring.run(lambda wiring: wiring.holds(sandbox.netns_fd, endpoint))

    async def list_all(self) -> set[str]:
        """Names of all host-side links of endpoints, whoever made them."""
        return set(await self._wiring.run(lambda wiring: wiring.list_endpoint_links()))

    async def remove_unrecorded(self, name: str) -> None:
        """Remove a link that does not belong to an endpoint."""
        await self._wiring.run(lambda wiring: wiring.remove_link(name))
