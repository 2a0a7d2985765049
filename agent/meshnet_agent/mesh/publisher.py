"""Publishes this host's endpoints in the store, so that every agent can list them.

``attach`` does not wait for it: an endpoint works before others can list it.  At start, and after
an outage of the store, the published keys are compared with the endpoints that exist
(docs/design/published-endpoints.md).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.codec.endpoints import encode_endpoint
from meshnet.errors import PolicyRefusedError, StoreUnavailableError
from meshnet.store.registry import endpoint_key
from meshnet_agent.tasks.backoff import Backoff

if TYPE_CHECKING:
    from meshnet.model import HostId
    from meshnet.store.registry import Registry
    from meshnet_agent.endpoints.directory import EndpointDirectory
    from meshnet_agent.mesh.view import MeshView

_log = structlog.get_logger()
_DELAYS_S = (0.2, 10.0)
_REFRESH_S = 600.0
"""Seconds after which the published keys are listed again, in case somebody removed some."""


class Publisher:
    """Keeps the keys of this host's endpoints current."""

    def __init__(
        self, registry: Registry, mesh: MeshView, endpoints: EndpointDirectory, host: HostId
    ) -> None:
        self._registry = registry
        self._mesh = mesh
        self._endpoints = endpoints
        self._host = host
        self._published: dict[str, bytes] = {}
        self._stale = True

    def refresh(self) -> None:
        """List what is published again, and publish what is missing.  Returns at once."""
        self._stale = True
        self._endpoints.changed.set()

    async def run(self) -> None:
        """Publish after every change.  Never returns."""
        backoff, said = Backoff(*_DELAYS_S), ""
        while True:
            with trio.move_on_after(_REFRESH_S * random.uniform(0.9, 1.1)) as waiting:
                await self._endpoints.changed.wait()
            if waiting.cancelled_caught:
                self._stale = True
            try:
                await self._sync()
                backoff.reset()
                said = ""
            except (StoreUnavailableError, PolicyRefusedError) as error:
                if str(error) != said:  # an outage may last for hours: say it once
                    _log.warning("endpoints not published", reason=str(error))
                said = str(error)
                self._stale = True
                await trio.sleep(backoff.failed())
                self._endpoints.changed.set()

    async def _sync(self) -> None:
        # Endpoints were once published in an etcd that all agents refuse, and were missing in the
        # real one: there `network rm` then cut them off.
        if self._stale or not self._mesh.connected:
            await self._mesh.check_store()
        if self._stale:
            # Before the listing: a refresh that is asked for meanwhile must not be forgotten.
            self._stale = False
            published: dict[str, bytes] = {}
            for network in self._mesh.snapshot.networks:
                published |= await self._registry.list_published(network, self._host)
            self._published = published
        wanted = {endpoint_key(e): encode_endpoint(e) for e in self._endpoints.all}
        puts = {k: v for k, v in wanted.items() if self._published.get(k) != v}
        deletes = [key for key in self._published if key not in wanted]
        if puts or deletes:
            await self._registry.publish(puts, deletes)
        self._published = wanted
