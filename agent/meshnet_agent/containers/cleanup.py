"""Puts away what containers leave behind at their end, and removes the rest when they go."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import MeshnetError, NotFoundError
from meshnet.runtime.engine.conmon import read_exit
from meshnet_agent.containers.processes import send

if TYPE_CHECKING:
    from meshnet_agent.containers.bundle.sources import Sources
    from meshnet_agent.containers.directory import Container, ContainerDirectory
    from meshnet_agent.containers.networking import Networking
    from meshnet_agent.containers.record import ContainerRecord
    from meshnet_agent.containers.runtime import RuntimeProvider
    from meshnet_agent.containers.volumes import Volumes

_log = structlog.get_logger()


class Cleanup:
    """Takes containers down again.

    Every step is idempotent, since the agent may be killed during any of them.
    """

    def __init__(
        self,
        directory: ContainerDirectory,
        runtime: RuntimeProvider,
        networking: Networking,
        sources: Sources,
        volumes: Volumes,
    ) -> None:
        self._directory = directory
        self._runtime = runtime
        self._networking = networking
        self._sources = sources
        self._volumes = volumes

    async def put_away(self, container: Container) -> None:
        """Remove cgroup, processes, endpoints and mounts, but no files.  Failures are only logged.

        The caller holds the container's lock.
        """
        record = container.record
        if record.shim is not None and read_exit(container.bundle.exits, record.id) is None:
            send(record.shim, signal.SIGKILL)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._detach_all, record)
            try:
                await (await self._runtime.get()).delete(record.id)
            except MeshnetError as error:
                _log.error("container not deleted", container=record.name, reason=str(error))
        # Only after the processes, which keep the mounts busy.
        try:
            await trio.to_thread.run_sync(container.bundle.unmount)
        except MeshnetError as error:
            _log.error("root file system stays", container=record.name, reason=str(error))

    async def _detach_all(self, record: ContainerRecord) -> None:
        for endpoint in record.endpoints:
            try:
                await self._networking.detach(endpoint.pid, endpoint.network)
            except NotFoundError:
                pass  # the keeper saw the process end first, and freed the endpoint
            except MeshnetError as error:
                _log.error("endpoint stays", container=record.name, reason=str(error))

    async def forget(self, container: Container, *, volumes: bool) -> None:
        """Remove what is left of a container that was put away: its files, its hold on an image.

        Args:
            volumes: remove its anonymous volumes, too.
        """
        record = container.record

        def remove() -> None:
            self._sources.release(record)
            container.bundle.remove()

        await trio.to_thread.run_sync(remove)
        self._directory.drop(container)
        if volumes:
            # Last: while the container is in the directory its volumes are in use.
            await self._volumes.remove_anonymous(record.mount_points)

    async def purge(self, container: Container, *, volumes: bool) -> None:
        """Remove a container with everything it has; anonymous volumes only with `volumes`."""
        async with container.lock:
            await self.put_away(container)
            await self.forget(container, volumes=volumes)
        container.ended.set()
