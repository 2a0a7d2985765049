"""This host's endpoints: attached, watched by pidfd, recorded on disk, freed.

An endpoint lives as long as its namespace has a process.  When the process it was attached to ends,
another process of the same namespace takes its place; when there is none, the address is freed.

Attaching and detaching run one at a time in the wiring's own thread, so that neither waits for the
reconciler.  They need neither the store nor a pass; only addresses of a pool, which many attaches
take at the same time, are the store's (`meshnet_agent.endpoints.addresses.pool`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import (
    ConflictError,
    MeshnetError,
    NotFoundError,
    PolicyRefusedError,
)
from meshnet.kernel import EndpointWiring
from meshnet.kernel.netns import host_netns_inodes, netns_inode, open_process, start_ticks
from meshnet.model import Endpoint, EndpointId
from meshnet.ports import select_published
from meshnet.state import LinkKind, endpoint_link_name
from meshnet.wire.mac import endpoint_mac
from meshnet_agent.endpoints.addresses.subnet import SubnetAddresses
from meshnet_agent.endpoints.request import (
    check_names,
    check_publishable,
    gateways_of,
    inner_routes,
)
from meshnet_agent.endpoints.sandbox import Owners
from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence

    from meshnet.kernel import Wiring
    from meshnet.model import (
        HostId,
        IpInterface,
        IpNetwork,
        Network,
        NetworkName,
        PublishedPort,
    )
    from meshnet_agent.endpoints.addresses.subnet import Addresses
    from meshnet_agent.endpoints.published_ports import PublishedPorts
    from meshnet_agent.endpoints.request import AttachRequest, ReadyNetwork
    from meshnet_agent.state_dir import StateDir
    from meshnet_agent.tasks.worker import Worker

_log = structlog.get_logger()


class Endpoints:
    """All endpoints of this host.

    Attributes:
        changed: raised when an endpoint came, went or changed, for whoever publishes them.
        unhealed: endpoints whose link is gone for good, and why.
        unreadable: ids of endpoints whose record could not be read at the start, links of which are
            there.
        ports: who has which published port.

    Args:
        pool: where addresses of underlay networks come from.
        settle: brings the kernel's rules to what the endpoints now are, or raises.
    """

    def __init__(
        self,
        worker: Worker[Wiring],
        disk: StateDir,
        host: HostId,
        pool: Addresses,
        ports: PublishedPorts,
        settle: Callable[[], Awaitable[None]],
    ) -> None:
        self.changed = Flag()
        self.unhealed: dict[EndpointId, str] = {}
        self.unreadable: set[str] = set()
        self.ports = ports
        self._settle = settle
        self._worker = worker
        self._owners = Owners(worker)
        self._disk = disk
        self._host = host
        self._endpoints: dict[EndpointId, Endpoint] = {}
        self._recorded: list[Endpoint] = []
        self._subnets = SubnetAddresses(self._addresses_in_use)
        self._pool = pool
        self._attaching: list[tuple[AttachRequest, int]] = []
        self._watchers: dict[EndpointId, trio.CancelScope] = {}
        self._ending: set[EndpointId] = set()
        self._lock = trio.Lock()
        self._nursery: trio.Nursery | None = None

    def expects_link(self, name: str) -> bool:
        """Whether the host-side link of that name belongs to an endpoint that is not ending."""
        identity = EndpointId(name.removeprefix(endpoint_link_name("")))
        return identity in self._endpoints and identity not in self._ending

    @property
    def all(self) -> list[Endpoint]:
        """The endpoints, oldest first."""
        return list(self._endpoints.values())

    def _addresses_in_use(self) -> list[IpInterface]:
        return [a for e in self._endpoints.values() for a in e.addresses]

    def subnet_of(self, network: NetworkName, version: int) -> IpNetwork | None:
        """The subnet of an IP version that endpoints of a network are in, also while starting."""
        known = (*self._endpoints.values(), *self._recorded)
        of_network = (a for e in known if e.network == network for a in e.addresses)
        return next((a.network for a in of_network if a.version == version), None)

    async def load(self) -> None:
        """Read what is on disk, and see that it is this host's: others look for it by its host id.

        Raises:
            ConflictError: an endpoint that is attached is another host id's.
            KernelRefusedError: the disk refused to be read.
        """
        self._recorded, self.unreadable = self._disk.load_endpoints()
        others = [e for e in self._recorded if e.host != self._host]
        link_names = await self._list_links() if others else set()
        for endpoint in others:
            found = await self._owners.find(endpoint, link_names)
            if found is not None:
                os.close(found[1])
                raise ConflictError(
                    f"endpoint {endpoint.name} is attached as one of host {endpoint.host}, and "
                    f"this agent is {self._host}: start it with --host-id {endpoint.host}, or end "
                    f"process {endpoint.pid} and all others that are attached"
                )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over what `load` has read, then watch processes for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await self._recover()
            task_status.started()
            await trio.sleep_forever()

    # --- attach and detach --------------------------------------------------------------------

    async def attach(self, request: AttachRequest, ready: ReadyNetwork) -> Endpoint:
        """Connect a process's namespace; on return the endpoint works and is on disk.

        Raises:
            MeshnetError: nothing was changed; the class says why.
        """
        check_names(request)
        if request.publish:
            check_publishable(ready.network)
        with open_process(request.pid) as (pid_fd, netns_fd):
            inode = netns_inode(netns_fd)
            if inode in host_netns_inodes():
                raise PolicyRefusedError(
                    f"process {request.pid} is in this host's own network namespace: start it in "
                    "one of its own, for example with `unshare --net`"
                )
            identity = EndpointId(secrets.token_hex(6))
            source: Addresses = self._pool if ready.network.mode.is_underlay else self._subnets
            with self._announced(request, inode):
                async with (
                    source.take(ready, identity, request.ip) as addresses,
                    self._lock,
                ):
                    draft = self._draft(request, ready, addresses, inode, identity)
                    with contextlib.ExitStack() as undo:
                        published = await self.ports.take(draft, request.publish)
                        undo.callback(self.ports.free, draft, published)
                        draft = replace(draft, published=published)
                        endpoint = await self._worker.run(
                            lambda wiring: self._connect(wiring, netns_fd, draft, ready)
                        )
                        undo.pop_all()
                    self._endpoints[endpoint.id] = endpoint
                    self._watch(endpoint, os.dup(pid_fd))
                    if published:
                        try:
                            await self._bring_to_kernel(endpoint, published)
                        except MeshnetError:
                            await self._remove(endpoint)
                            raise
        self.changed.set()
        return endpoint

    async def detach(self, pid: int, network: str) -> Endpoint:
        """Undo an attach.

        Raises:
            NotFoundError: the process has no endpoint on that network.
        """
        async with self._lock:
            endpoint = self._find(pid, network)
            await self._remove(endpoint)
        self.changed.set()
        return endpoint

    async def publish(
        self, name: str, wanted: Sequence[PublishedPort], network: Network
    ) -> Endpoint:
        """Publish further ports of an endpoint; on return they work and are on disk.

        Args:
            network: the endpoint's.

        Raises:
            MeshnetError: nothing was changed; the class says why.
        """
        check_publishable(network)
        async with self._lock:
            before = self.find(name)
            taken = await self.ports.take(before, wanted)
            try:
                after = replace(before, published=(*before.published, *taken))
                self._record(after)
                await self._bring_to_kernel(after, taken)
            except MeshnetError:
                self.ports.free(before, taken)
                self._record(before)
                raise
        self.changed.set()
        return after

    async def unpublish(self, name: str, texts: Sequence[str]) -> Endpoint:
        """Take published ports of an endpoint away; connections that are open go on.

        Raises:
            NotFoundError: there is no such endpoint, or it has no such port.
            UsageError: a text stands for no port.
        """
        async with self._lock:
            before = self.find(name)
            gone: set[PublishedPort] = set()
            for text in texts:
                found = select_published(before.published, text)
                if not found:
                    have = ", ".join(map(str, before.published)) or "none"
                    raise NotFoundError(
                        f"endpoint {before.name} has no published port {text}: it has {have}"
                    )
                gone.update(found)
            after = replace(before, published=tuple(p for p in before.published if p not in gone))
            self._record(after)
            try:
                await self._bring_to_kernel(before, gone)
            except MeshnetError:
                self._record(before)
                raise
            self.ports.free(before, gone)
        self.changed.set()
        return after

    def find(self, name: str) -> Endpoint:
        """The endpoint of a name or id.

        Raises:
            NotFoundError: this host has none.
        """
        for endpoint in self._endpoints.values():
            if name in (endpoint.name, endpoint.id):
                return endpoint
        raise NotFoundError(
            f"endpoint {name} does not exist on this host: meshnet endpoint ls lists them"
        )

    def _record(self, endpoint: Endpoint) -> None:
        """Disk first: after a crash the next agent's first pass makes of it what is recorded."""
        self._disk.save_endpoint(endpoint)
        self._endpoints[endpoint.id] = endpoint

    async def _bring_to_kernel(
        self, endpoint: Endpoint, changed: Collection[PublishedPort]
    ) -> None:
        """On return packets to ports that came or went go where they should now."""
        await self._settle()
        await self.ports.redirect(endpoint, changed)

    async def remove_network(self, network: NetworkName) -> None:
        """Free what is left on a network that is gone from the store."""
        async with self._lock:
            gone = [e for e in self._endpoints.values() if e.network == network]
            for endpoint in gone:
                _log.warning("endpoint freed, its network was removed", endpoint=endpoint.name)
                await self._remove(endpoint)
        if gone:
            self.changed.set()

    async def heal(
        self, link_names: Collection[str], ready: Callable[[str], Awaitable[ReadyNetwork]]
    ) -> None:
        """Connect endpoints again whose link is gone: somebody deleted it, or its parent went.

        Args:
            link_names: host-side links that a pass missed; macvlans are looked for in any case.
        """
        bare = {e.id for e in self.all if e.parent is not None and not await self._has_macvlan(e)}
        async with self._lock:
            gone = set(link_names) - await self._list_links()
            for endpoint in [
                e
                for e in self.all
                if endpoint_link_name(e.id) in gone
                or (e.id in bare and not await self._has_macvlan(e))
            ]:
                try:
                    with open_process(endpoint.pid) as (_, netns_fd):
                        network = await ready(endpoint.network)
                        await self._worker.run(
                            lambda w, fd=netns_fd, e=endpoint, n=network: self._connect(w, fd, e, n)  # type: ignore[misc]
                        )
                    _log.warning("endpoint link was gone, made again", endpoint=endpoint.name)
                    self.unhealed.pop(endpoint.id, None)
                except MeshnetError as error:
                    reason = f"its link is gone and cannot be made: {error}"
                    if self.unhealed.get(endpoint.id) != reason:
                        _log.error("endpoint not healed", endpoint=endpoint.name, reason=reason)
                    self.unhealed[endpoint.id] = reason

    async def _has_macvlan(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint's macvlan is in its namespace; also if that cannot be looked at."""
        try:
            with open_process(endpoint.pid) as (_, netns_fd):
                found = await self._worker.run(lambda wiring: wiring.holds(netns_fd, endpoint))
        except MeshnetError:
            return True  # its process is ending, and with it the endpoint
        if found:
            self.unhealed.pop(endpoint.id, None)
        return found

    def _connect(
        self, wiring: Wiring, netns_fd: int, endpoint: Endpoint, ready: ReadyNetwork
    ) -> Endpoint:
        """In the wiring's thread: kernel first, then disk; neither without the other.

        A macvlan cannot be found by who does not know of it: it is drafted on disk before.
        """
        new = endpoint.id not in self._endpoints
        if new and endpoint.parent is not None:
            self._disk.save_draft(endpoint)
        try:
            default = wiring.connect(
                netns_fd,
                EndpointWiring(
                    endpoint=endpoint,
                    uplink=ready.uplink,
                    routes=inner_routes(ready),
                    gso_max_bytes=ready.gso_max_bytes,
                    announce=ready.network.mode.is_underlay,
                ),
            )
        except BaseException:
            if new:
                self._disk.remove_endpoint(endpoint.id)
            raise
        endpoint = replace(endpoint, default_route=default)
        try:
            self._disk.save_endpoint(endpoint)
        except BaseException:
            wiring.disconnect(endpoint)
            if new:
                self._disk.remove_endpoint(endpoint.id)
            raise
        return endpoint

    def _draft(
        self,
        request: AttachRequest,
        ready: ReadyNetwork,
        addresses: tuple[IpInterface, ...],
        inode: int,
        identity: EndpointId,
    ) -> Endpoint:
        return Endpoint(
            id=identity,
            network=ready.network.name,
            host=self._host,
            name=request.name or f"pid{request.pid}-{identity[:4]}",
            pid=request.pid,
            ifname=request.ifname,
            addresses=addresses,
            gateways=gateways_of(ready.network, addresses),
            mac=endpoint_mac(addresses[0].ip),
            mtu_bytes=ready.mtu_bytes,
            default_route=request.default_route and not ready.network.internal,
            netns_inode=inode,
            pid_start_ticks=start_ticks(request.pid),
            parent=ready.uplink if ready.endpoint_link is LinkKind.MACVLAN else None,
        )

    @contextlib.contextmanager
    def _announced(self, request: AttachRequest, inode: int) -> Iterator[None]:
        """While the block runs nobody else attaches the same, or by the same name.

        Raises:
            ConflictError: somebody has, or is about to.
        """
        self._check_free(request, inode)
        entry = request, inode
        self._attaching.append(entry)
        try:
            yield
        finally:
            self._attaching.remove(entry)

    def _check_free(self, request: AttachRequest, inode: int) -> None:
        for endpoint in self._endpoints.values():
            if endpoint.netns_inode == inode and endpoint.network == request.network:
                raise ConflictError(
                    f"process {request.pid} is attached to network {request.network} already, as "
                    f"{endpoint.name} with {endpoint.addresses[0]}: detach it first"
                )
            if request.name is not None and endpoint.name == request.name:
                raise ConflictError(
                    f"endpoint name {request.name} is taken by process {endpoint.pid} on network "
                    f"{endpoint.network}: choose another --name"
                )
        for other, other_inode in self._attaching:
            if (other_inode, other.network) == (inode, request.network) or (
                request.name is not None and other.name == request.name
            ):
                raise ConflictError(
                    f"process {other.pid} is being attached to network {other.network} right now: "
                    "wait for that, or choose another --name"
                )

    def of_process(self, pid: int) -> list[Endpoint]:
        """Those in a process's network namespace; of one that has ended, those it was given."""
        inode = -1
        with contextlib.suppress(OSError):
            inode = os.stat(f"/proc/{pid}/ns/net").st_ino
        return [
            e
            for e in self._endpoints.values()
            if e.netns_inode == inode or (inode == -1 and e.pid == pid)
        ]

    def _find(self, pid: int, network: str) -> Endpoint:
        for endpoint in self.of_process(pid):
            if endpoint.network == network:
                return endpoint
        raise NotFoundError(
            f"process {pid} has no endpoint on network {network}: meshnet endpoint ls lists them"
        )

    async def _remove(self, endpoint: Endpoint) -> None:
        with self._end(endpoint.id):
            await self._worker.run(lambda wiring: wiring.disconnect(endpoint))
        self._disk.remove_endpoint(endpoint.id)
        del self._endpoints[endpoint.id]
        self.unhealed.pop(endpoint.id, None)
        if endpoint.published:
            # Its ports must lead nowhere before somebody else has its address.
            try:
                await self._bring_to_kernel(endpoint, endpoint.published)
            except MeshnetError as error:
                _log.error("ports stay published", endpoint=endpoint.name, reason=str(error))
            self.ports.free(endpoint, endpoint.published)
        for source in (self._subnets, self._pool):
            source.free(endpoint.addresses)
        watcher = self._watchers.pop(endpoint.id, None)
        if watcher is not None:
            watcher.cancel()

    @contextlib.contextmanager
    def _end(self, identity: EndpointId) -> Iterator[None]:
        """While the block runs the end of the endpoint's link is no surprise."""
        self._ending.add(identity)
        try:
            yield
        finally:
            self._ending.discard(identity)

    # --- the life of an endpoint --------------------------------------------------------------

    def _watch(self, endpoint: Endpoint, pid_fd: int) -> None:
        """Start watching; takes the descriptor over."""
        scope = self._watchers[endpoint.id] = trio.CancelScope()
        if self._nursery is None:
            raise RuntimeError("endpoints are watched only while run() runs")
        self._nursery.start_soon(self._wait_for_end, endpoint.id, pid_fd, scope)

    async def _wait_for_end(
        self, identity: EndpointId, pid_fd: int, scope: trio.CancelScope
    ) -> None:
        try:
            with scope:
                await trio.lowlevel.wait_readable(pid_fd)
        finally:
            os.close(pid_fd)
        if scope.cancelled_caught:
            return
        with self._end(identity):
            await self._inherit_or_free(identity)
        self.changed.set()

    async def _inherit_or_free(self, identity: EndpointId) -> None:
        """Another process of the namespace takes over from one that ended, or nobody does."""
        async with self._lock:
            endpoint = self._endpoints.get(identity)
            if endpoint is None:
                return
            try:
                heir = await self._owners.find_heir(endpoint)
                if heir is None:
                    _log.info("endpoint freed, its process ended", endpoint=endpoint.name)
                    self._watchers.pop(identity, None)
                    await self._remove(endpoint)
                else:
                    self._adopt(*heir)
            except MeshnetError as error:
                # What is left of it is collected at the next start.
                _log.error("endpoint not freed", endpoint=endpoint.name, reason=str(error))

    async def _list_links(self) -> set[str]:
        return set(await self._worker.run(lambda wiring: wiring.list_endpoint_links()))

    def _adopt(self, endpoint: Endpoint, pid_fd: int) -> None:
        self._endpoints[endpoint.id] = endpoint
        self._watch(endpoint, pid_fd)
        self._disk.save_endpoint(endpoint)

    async def _recover(self) -> None:
        """At start: keep what lives, free what does not, remove links nobody recorded."""
        link_names = await self._list_links()
        for endpoint in self._recorded:
            try:
                found = await self._owners.find(endpoint, link_names)
                if found is not None:
                    await self._worker.run(lambda wiring, e=endpoint: wiring.adopt(e))  # type: ignore[misc]
                    self._adopt(*found)
                    await self.ports.take_again(endpoint)
                    continue
                _log.info("endpoint freed, its process ended meanwhile", endpoint=endpoint.name)
                await self._worker.run(lambda wiring, e=endpoint: wiring.disconnect(e))  # type: ignore[misc]
                self._disk.remove_endpoint(endpoint.id)
            except MeshnetError as error:
                _log.error("endpoint not taken over", endpoint=endpoint.name, reason=str(error))
        for draft in self._disk.load_drafts():
            _log.warning("endpoint undone, its attach was cut short", endpoint=draft.name)
            try:
                await self._worker.run(lambda wiring, e=draft: wiring.disconnect(e))  # type: ignore[misc]
                self._disk.remove_endpoint(draft.id)
            except MeshnetError as error:
                _log.error("endpoint not undone", endpoint=draft.name, reason=str(error))
        self._recorded = []
        recorded = {endpoint_link_name(i) for i in {*self._endpoints, *self.unreadable}}
        self.unreadable = {i for i in self.unreadable if endpoint_link_name(i) in link_names}
        for name in link_names - recorded:
            _log.warning("unrecorded endpoint link removed", link=name)
            await self._worker.run(lambda wiring, n=name: wiring.remove_link(n))  # type: ignore[misc]
        self.changed.set()
