"""Which process an endpoint belongs to: the one it was attached to, or an heir of its namespace."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from meshnet.errors import MeshnetError, NotFoundError
from meshnet.kernel.netns import find_process, netns_inode, open_process, start_ticks
from meshnet.state import endpoint_link_name

if TYPE_CHECKING:
    from meshnet.kernel import Wiring
    from meshnet.model import Endpoint
    from meshnet_agent.tasks.worker import Worker


class Owners:
    """Looks for the owners of this host's endpoints.

    What is found is the endpoint as it is with that owner, and the owner's pidfd, which is the
    caller's to close.
    """

    def __init__(self, worker: Worker[Wiring]) -> None:
        self._worker = worker

    async def find(self, endpoint: Endpoint, link_names: set[str]) -> tuple[Endpoint, int] | None:
        """The process that an endpoint on disk is of, or its heir, as in `find_heir`.

        Args:
            link_names: host-side links that there are.
        """
        found = _same_process(endpoint)
        if found is None and (
            endpoint.parent is not None or endpoint_link_name(endpoint.id) in link_names
        ):
            # The link is there, so the namespace is, and its inode still means that one.
            found = await self.find_heir(endpoint)
        return found

    async def find_heir(self, endpoint: Endpoint) -> tuple[Endpoint, int] | None:
        """Another process of the namespace, as a changed endpoint and its pidfd."""
        while True:
            pid = await trio.to_thread.run_sync(find_process, endpoint.netns_inode)
            if pid is None:
                return None
            # One that ends before it is opened may have left children.
            with contextlib.suppress(NotFoundError), open_process(pid) as (pid_fd, netns_fd):
                if netns_inode(netns_fd) == endpoint.netns_inode:
                    if endpoint.parent is not None and not await self._worker.run(
                        lambda wiring, fd=netns_fd: wiring.holds(fd, endpoint)  # type: ignore[misc]
                    ):
                        return None  # another namespace, which got the inode of one that is gone
                    heir = replace(endpoint, pid=pid, pid_start_ticks=start_ticks(pid))
                    return heir, os.dup(pid_fd)


def _same_process(endpoint: Endpoint) -> tuple[Endpoint, int] | None:
    """The endpoint with a pidfd, if the very process it was attached to still runs."""
    try:
        with open_process(endpoint.pid) as (pid_fd, netns_fd):
            if (
                start_ticks(endpoint.pid) == endpoint.pid_start_ticks
                and netns_inode(netns_fd) == endpoint.netns_inode
            ):
                return endpoint, os.dup(pid_fd)
    except MeshnetError:
        pass
    return None
