"""Keeps this host's endpoints: takes them over at the start, watches, heals and frees them.

An endpoint lives as long as its sandbox.  When the process it was attached to ends, another process
of the same namespace takes its place.  If there is none, the endpoint goes and its addresses are
free again.  An endpoint in a hold goes when its owner releases it, and when its namespace is gone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import ConflictError, MeshnetError, NotFoundError
from meshnet.sandbox import HoldSandbox
from meshnet.state import endpoint_link_name
from meshnet_agent.endpoints.sandbox import reopen
from meshnet_agent.mesh.view import MeshListener
from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    from collections.abc import Collection

    from meshnet.model import Endpoint, EndpointId, MeshSnapshot, NetworkName
    from meshnet.store.mirror import Changes
    from meshnet_agent.dataplane.pass_values import PassResult
    from meshnet_agent.endpoints.addresses.subnet import HostAddresses
    from meshnet_agent.endpoints.directory import EndpointDirectory
    from meshnet_agent.endpoints.links import EndpointLinks
    from meshnet_agent.endpoints.networks import ReadyNetworks
    from meshnet_agent.endpoints.published_ports import PublishedPorts
    from meshnet_agent.endpoints.sandbox import OpenSandbox, SandboxEnd, Sandboxes

_log = structlog.get_logger()


class Keeper(MeshListener):
    """Keeps endpoints until their sandbox ends.

    Args:
        sandboxes: finds sandboxes again.
        networks: says what connecting an endpoint again needs of its network.
    """

    def __init__(
        self,
        directory: EndpointDirectory,
        sandboxes: Sandboxes,
        links: EndpointLinks,
        ports: PublishedPorts,
        addresses: HostAddresses,
        networks: ReadyNetworks,
    ) -> None:
        self._directory = directory
        self._sandboxes = sandboxes
        self._links = links
        self._ports = ports
        self._addresses = addresses
        self._networks = networks
        self._watchers: dict[EndpointId, trio.CancelScope] = {}
        self._missing: set[str] = set()
        self._look = Flag()
        self._nursery: trio.Nursery | None = None

    async def load(self) -> None:
        """Read what is on disk, and check that what is attached belongs to this host id.

        Raises:
            ConflictError: an attached endpoint belongs to another host id.
            KernelRefusedError: the disk refused to be read.
        """
        self._directory.load()
        # Under a new host id this host gets another subnet, and other hosts would no longer reach
        # an endpoint of the old one.  This happens when the hostname, the default id, changes.
        host = self._directory.host
        others = [e for e in self._directory.inherited if e.host != host]
        link_names = await self._links.list_all() if others else set()
        for endpoint in others:
            if await self._sandboxes.lives(endpoint, link_names):
                raise ConflictError(
                    f"endpoint {endpoint.name} was attached under host id {endpoint.host}, and "
                    f"this agent's is {host}: start it with --host-id {endpoint.host}, or end "
                    f"{endpoint.sandbox} and all others that are attached"
                )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over what `load` has read, then keep endpoints for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await self._recover()
            nursery.start_soon(self._heal_when_asked)
            task_status.started()
            await trio.sleep_forever()

    # --- what others notice ---------------------------------------------------------------------

    def passed(self, result: PassResult) -> None:
        """See `PassListener`: heal endpoints whose link it missed.

        Macvlans are looked for in any case, since the host's namespace does not hear of their end.
        """
        self._missing.update(n for n in result.missing if self._directory.expects_link(n))
        self._look.set()

    def mesh_changed(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        """See `MeshListener`: free what is left on networks that are gone from the store."""
        # A hole is a key of which nothing is known: it may be the network that seems to be gone.
        if self._nursery is None or snapshot.holes:
            return
        for network in {e.network for e in self._directory.all} - snapshot.networks.keys():
            self._nursery.start_soon(self._free_network, network)

    async def _free_network(self, network: NetworkName) -> None:
        async with self._directory.changing():
            for endpoint in [e for e in self._directory.all if e.network == network]:
                try:
                    await self.free(endpoint)
                except MeshnetError as error:  # tried again when the mesh changes
                    _log.error("endpoint not freed", endpoint=endpoint.name, reason=str(error))
                else:
                    _log.warning("endpoint freed, its network was removed", endpoint=endpoint.name)

    # --- healing --------------------------------------------------------------------------------

    async def _heal_when_asked(self) -> None:
        while True:
            await self._look.wait()
            names, self._missing = self._missing, set()
            if names or any(e.parent is not None for e in self._directory.all):
                await self._heal(names)

    async def _heal(self, link_names: Collection[str]) -> None:
        """Connect endpoints again whose link is gone: somebody deleted it, or its parent went."""
        # Macvlans without the lock: each means a look into its namespace, after every pass, and
        # attaches must not wait for that.
        every = self._directory.all
        bare = {e.id for e in every if e.parent is not None and not await self._has_macvlan(e)}
        async with self._directory.changing():
            gone = set(link_names) - await self._links.list_all()
            for endpoint in self._directory.all:
                # Look again: it may have come or gone while we waited for the lock.
                if endpoint_link_name(endpoint.id) in gone or (
                    endpoint.id in bare and not await self._has_macvlan(endpoint)
                ):
                    await self._connect_again(endpoint)

    async def _connect_again(self, endpoint: Endpoint) -> None:
        try:
            try:
                opened = reopen(endpoint.sandbox)
            except NotFoundError:
                if isinstance(endpoint.sandbox, HoldSandbox):
                    _log.info("endpoint freed, its namespace is gone", endpoint=endpoint.name)
                    await self.free(endpoint)
                    return
                raise
            with opened as sandbox:
                ready = await self._networks.ready(endpoint.network)
                await self._links.connect(sandbox, endpoint, ready, is_new=False)
        except (MeshnetError, OSError) as error:
            reason = f"its link is gone and cannot be made: {error}"
            # Logged once for each reason: this is tried after every pass.
            if self._directory.unhealed.get(endpoint.id) != reason:
                _log.error("endpoint not healed", endpoint=endpoint.name, reason=reason)
            self._directory.unhealed[endpoint.id] = reason
        else:
            _log.warning("endpoint link was gone, made again", endpoint=endpoint.name)
            self._directory.unhealed.pop(endpoint.id, None)

    async def _has_macvlan(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint's macvlan is in its namespace; true also if nobody can look there."""
        try:
            with reopen(endpoint.sandbox) as sandbox:
                found = await self._links.holds(sandbox, endpoint)
        except (MeshnetError, OSError):
            return True  # its process is ending, and with it the endpoint
        if found:
            self._directory.unhealed.pop(endpoint.id, None)
        return found

    # --- the life of an endpoint ----------------------------------------------------------------

    def watch(self, endpoint: Endpoint, end: SandboxEnd | None) -> None:
        """Free the endpoint when its sandbox ends.

        Args:
            end: this closes it when it is no longer needed, also if it raises.  None: somebody
                releases it.
        """
        if end is None:
            return
        if self._nursery is None:
            end.close()
            raise RuntimeError("endpoints are watched only while run() runs")
        scope = self._watchers[endpoint.id] = trio.CancelScope()
        self._nursery.start_soon(self._wait_for_end, endpoint.id, end, scope)

    async def _wait_for_end(
        self, identity: EndpointId, end: SandboxEnd, scope: trio.CancelScope
    ) -> None:
        try:
            with scope:
                await end.wait()
        finally:
            end.close()
        if not scope.cancelled_caught:
            # The link goes with the namespace, perhaps while we wait for the lock: it is not to
            # be healed, and a pass for it would be in vain.
            with self._directory.ending(identity):
                await self._inherit_or_free(identity)

    async def _inherit_or_free(self, identity: EndpointId) -> None:
        """Hand an endpoint to another process of its namespace; free it if there is none."""
        async with self._directory.changing():
            endpoint = self._directory.get(identity)
            if endpoint is None:
                return
            try:
                heir = await self._sandboxes.find_heir(endpoint)
                if heir is None:
                    _log.info("endpoint freed, its process ended", endpoint=endpoint.name)
                    self._watchers.pop(identity, None)
                    await self.free(endpoint)
                else:
                    self._keep_in(heir, endpoint)
            except (MeshnetError, OSError) as error:
                # The next start collects what is left of it.
                _log.error("endpoint not freed", endpoint=endpoint.name, reason=str(error))

    def _keep_in(self, sandbox: OpenSandbox, endpoint: Endpoint) -> None:
        """Keep an endpoint for the process that was found from now on; closes the sandbox."""
        with sandbox:
            endpoint = replace(endpoint, sandbox=sandbox.value)
            # In the directory before it is on disk: if the disk refuses, the link of a live
            # endpoint must not count as one that nobody has, and be removed.
            self._directory.add(endpoint)
            self.watch(endpoint, sandbox.end())
            self._directory.replace(endpoint)

    async def free(self, endpoint: Endpoint) -> None:
        """Remove an endpoint: link, record, ports, addresses.  The caller is `changing`.

        Once the link and the record are gone, the rest goes too, even if this is cancelled.

        Raises:
            KernelRefusedError: the link or the record stays, and with it the endpoint.
        """
        with self._directory.ending(endpoint.id):
            await self._links.disconnect(endpoint)
        self._directory.remove(endpoint.id)
        watcher = self._watchers.pop(endpoint.id, None)
        if watcher is not None:
            watcher.cancel()
        try:
            if endpoint.published:
                # Before the address is free: the ports must not lead to its next owner.
                await self._ports.bring_to_kernel(endpoint)
        except MeshnetError as error:
            _log.error("ports stay published", endpoint=endpoint.name, reason=str(error))
        finally:
            self._ports.release(endpoint, endpoint.published)
            self._addresses.remember(endpoint)
            self._addresses.free(endpoint.addresses)
        if endpoint.default_versions:
            await self._hand_on_default(endpoint)

    async def _hand_on_default(self, gone: Endpoint) -> None:
        """Lead the namespace's default route through the next endpoint that is to have it."""
        for endpoint in self._directory.in_netns(gone.sandbox.netns):
            try:
                with reopen(endpoint.sandbox) as sandbox:
                    after = await self._links.lead_default(sandbox, endpoint)
                if after != endpoint:
                    _log.info("default route handed on", before=gone.name, now=after.name)
                    self._directory.replace(after)
                    if after.published:
                        # Answers go back by themselves now.
                        await self._ports.bring_to_kernel(after)
            except (MeshnetError, OSError) as error:
                # Most often the namespace is ending, and with it this endpoint.
                _log.debug("default route not handed on", to=endpoint.name, reason=str(error))

    # --- at start -------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Keep what lives, free what does not, remove links that nobody recorded.

        The only time at which a link without a record can be removed: no attach is under way yet.
        """
        directory = self._directory
        # Listed once for all endpoints, not once for each.
        link_names = await self._links.list_all()
        for endpoint in directory.inherited:
            try:
                await self._take_over_or_free(endpoint, link_names)
            except MeshnetError as error:
                _log.error("endpoint not taken over", endpoint=endpoint.name, reason=str(error))
        for draft in self._links.load_drafts():
            _log.warning("endpoint undone, its attach was cut short", endpoint=draft.name)
            try:
                await self._links.discard(draft)
            except MeshnetError as error:
                _log.error("endpoint not undone", endpoint=draft.name, reason=str(error))
        directory.inherited = []
        known = {e.id for e in directory.all}
        # A link whose record cannot be read stays: its process may be alive.
        recorded = {endpoint_link_name(i) for i in {*known, *directory.unreadable}}
        directory.unreadable = {
            i for i in directory.unreadable if endpoint_link_name(i) in link_names
        }
        for name in link_names - recorded:
            _log.warning("unrecorded endpoint link removed", link=name)
            await self._links.remove_unrecorded(name)
        directory.changed.set()  # even if there are none: the store may still have earlier ones

    async def _take_over_or_free(self, endpoint: Endpoint, link_names: Collection[str]) -> None:
        if isinstance(endpoint.sandbox, HoldSandbox):
            if not self._sandboxes.is_held(endpoint, link_names):
                _log.info("endpoint freed, its namespace is gone", endpoint=endpoint.name)
                self._addresses.remember(endpoint)
                await self._links.discard(endpoint)
                return
            await self._links.take_over(endpoint)
            self._directory.add(endpoint)
        else:
            found = await self._sandboxes.find(endpoint, link_names)
            if found is None:
                _log.info("endpoint freed, its process ended meanwhile", endpoint=endpoint.name)
                self._addresses.remember(endpoint)
                await self._links.discard(endpoint)
                return
            try:
                await self._links.take_over(endpoint)
            except BaseException:
                found.close()
                raise
            self._keep_in(found, endpoint)
        await self._ports.take_over(endpoint)
