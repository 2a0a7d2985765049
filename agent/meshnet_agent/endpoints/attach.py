"""Attaching sandboxes to networks, detaching them, and publishing endpoints' ports.

Values in, values out: every front (the API, containers) calls this.

Attaches run one at a time.  They never wait for the reconciler, and wait for the store only if
addresses come from a pool (`meshnet_agent.endpoints.addresses.pool`): many attaches get those at
the same time, before each waits for its turn.  Each call does all of its work, or nothing.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import ConflictError, MeshnetError, NotFoundError
from meshnet.model import Endpoint, EndpointId
from meshnet.ports import select_published
from meshnet.sandbox import HoldSandbox
from meshnet.state import LinkKind
from meshnet.wire.mac import endpoint_mac
from meshnet_agent.endpoints.request import check_names, check_publishable, gateways_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from meshnet.model import HostId, IpInterface, PublishedPort
    from meshnet.sandbox import NetnsId, Sandbox
    from meshnet_agent.endpoints.addresses.subnet import HostAddresses
    from meshnet_agent.endpoints.directory import EndpointDirectory
    from meshnet_agent.endpoints.keeper import Keeper
    from meshnet_agent.endpoints.links import EndpointLinks
    from meshnet_agent.endpoints.networks import ReadyNetworks
    from meshnet_agent.endpoints.published_ports import PublishedPorts
    from meshnet_agent.endpoints.request import AttachRequest, ReadyNetwork
    from meshnet_agent.endpoints.sandbox import OpenSandbox
    from meshnet_agent.tasks.right_of_way import RightOfWay

_log = structlog.get_logger()


class Attacher:
    """Attaches and detaches.

    Args:
        keeper: watches endpoints from the moment they are attached, and frees them.
        right_of_way: taken while an attach is under way.
    """

    def __init__(
        self,
        directory: EndpointDirectory,
        keeper: Keeper,
        links: EndpointLinks,
        ports: PublishedPorts,
        addresses: HostAddresses,
        networks: ReadyNetworks,
        right_of_way: RightOfWay,
    ) -> None:
        self._directory = directory
        self._keeper = keeper
        self._links = links
        self._ports = ports
        self._addresses = addresses
        self._networks = networks
        self._right_of_way = right_of_way
        self._attaching: list[tuple[AttachRequest, Sandbox]] = []

    async def attach(self, sandbox: OpenSandbox, request: AttachRequest) -> Endpoint:
        """Connect a sandbox to a network; on return the endpoint works and is on disk.

        Waits for a network that is not up on this host yet.  If it is cancelled before the link
        exists, it leaves nothing behind; after that it completes.

        Raises:
            MeshnetError: nothing was changed; the class says why.
        """
        started = time.perf_counter()
        check_names(request)
        ready = await self._networks.wait_for(request.network)
        if request.publish:
            check_publishable(ready.network)
        with self._right_of_way.taken(), self._announced(request, sandbox.value):
            endpoint = await self._attach(sandbox, request, ready)
        _log.info(
            "attached",
            endpoint=endpoint.name,
            network=endpoint.network,
            address=str(endpoint.addresses[0]),
            ms=round((time.perf_counter() - started) * 1000, 2),
        )
        return endpoint

    async def _attach(
        self, sandbox: OpenSandbox, request: AttachRequest, ready: ReadyNetwork
    ) -> Endpoint:
        # 12 digits: with its prefix the link's name has the 15 characters that Linux allows.
        identity = EndpointId(secrets.token_hex(6))
        # Addresses before the lock: for those of a pool the wire is asked, for 0.24 s, and others
        # must be able to attach meanwhile.
        async with (
            self._addresses.allocate(ready, identity, request.ip, request.name) as addresses,
            self._directory.changing(),
        ):
            draft = _draft(request, ready, addresses, sandbox.value, identity, self._directory.host)
            with contextlib.ExitStack() as undo:
                published = await self._ports.acquire(draft, request.publish)
                undo.callback(self._ports.release, draft, published)
                # Before the link is made: an agent that is out of descriptors fails here, while
                # there is nothing in the kernel to undo.
                end = sandbox.end()
                if end is not None:
                    undo.callback(end.close)
                endpoint = await self._links.connect(
                    sandbox, replace(draft, published=published), ready, is_new=True
                )
                undo.pop_all()
            # From here on a failure removes the endpoint, too.  Leaving this block by an error
            # frees the addresses, so a link that stayed would share them with the next endpoint.
            self._directory.add(endpoint)
            try:
                self._keeper.watch(endpoint, end)
                if published:
                    await self._ports.bring_to_kernel(endpoint)
            except BaseException:
                await self._undo(endpoint)
                raise
        return endpoint

    async def _undo(self, endpoint: Endpoint) -> None:
        with trio.CancelScope(shield=True):  # what it waits for has deadlines
            try:
                await self._keeper.free(endpoint)
            except MeshnetError as error:
                # Then all of it stays until the sandbox ends, including addresses and ports.
                _log.error("attach not undone", endpoint=endpoint.name, reason=str(error))

    async def detach(self, netns: NetnsId, network: str) -> Endpoint:
        """Undo an attach.

        Raises:
            NotFoundError: the namespace has no endpoint on that network.
            KernelRefusedError: its link or its record cannot be removed; it is still attached.
        """
        async with self._directory.changing():
            for endpoint in self._directory.in_netns(netns):
                if endpoint.network == network:
                    await self._keeper.free(endpoint)
                    return endpoint
        raise NotFoundError(
            f"the namespace has no endpoint on network {network}: meshnet endpoint ls lists them"
        )

    async def release(self, owner: str, network: str | None = None) -> list[Endpoint]:
        """Free what an owner holds; returns it.  Idempotent, and needs no namespace.

        Args:
            network: only there; None: on every network.

        Raises:
            KernelRefusedError: a link or a record cannot be removed; that one is still attached.
        """
        async with self._directory.changing():
            return await self._free_held(
                lambda hold: hold.owner == owner,
                [e for e in self._directory.all if network in (None, e.network)],
            )

    async def collect(self, prefix: str, valid: Collection[str]) -> list[Endpoint]:
        """Free what owners of a kind hold that are not valid any more; returns it.

        Args:
            prefix: what the keys of the owners of that kind begin with.
            valid: keys of those that live.

        Raises:
            KernelRefusedError: a link or a record cannot be removed; that one is still attached.
        """
        kept = frozenset(valid)
        async with self._directory.changing():
            return await self._free_held(
                lambda hold: hold.owner.startswith(prefix) and hold.owner not in kept,
                self._directory.all,
            )

    async def _free_held(
        self, concerns: Callable[[HoldSandbox], bool], endpoints: Iterable[Endpoint]
    ) -> list[Endpoint]:
        freed = []
        for endpoint in endpoints:
            if isinstance(endpoint.sandbox, HoldSandbox) and concerns(endpoint.sandbox):
                await self._keeper.free(endpoint)
                freed.append(endpoint)
        return freed

    # --- published ports ------------------------------------------------------------------------

    async def publish(self, name: str, wanted: Sequence[PublishedPort]) -> Endpoint:
        """Publish further ports of an endpoint; on return they work and are on disk.

        Raises:
            MeshnetError: nothing was changed; the class says why.
        """
        # Outside the lock: this may wait ten seconds, and detaches must go on meanwhile.
        network = self._directory.find(name).network
        ready = await self._networks.wait_for(network, carried=False)
        check_publishable(ready.network)
        async with self._directory.changing():
            before = self._directory.find(name)
            acquired = await self._ports.acquire(before, wanted)
            after = replace(before, published=(*before.published, *acquired))
            try:
                await self._change(before, after)
            except BaseException:
                self._ports.release(before, acquired)
                raise
        return after

    async def unpublish(self, name: str, texts: Sequence[str]) -> Endpoint:
        """Unpublish ports of an endpoint; open connections go on.

        Raises:
            NotFoundError: this host has no such endpoint, or the endpoint has no such port.
            UsageError: a text does not name a port.
        """
        async with self._directory.changing():
            before = self._directory.find(name)
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
            await self._change(before, after)
            self._ports.release(before, gone)
        return after

    async def _change(self, before: Endpoint, after: Endpoint) -> None:
        """Disk first, then the kernel; if the kernel refuses, the record is as before.

        Raises:
            KernelRefusedError: nothing was changed.
        """
        # Passes bring to the kernel what is recorded.  After a crash in between, the next agent's
        # first pass does the rest.
        self._directory.replace(after)
        try:
            await self._ports.bring_to_kernel(after)
        except BaseException:
            self._directory.replace(before)
            raise

    # --- one of each ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _announced(self, request: AttachRequest, sandbox: Sandbox) -> Iterator[None]:
        """While the block runs, no other attach gets the same sandbox and network, or name.

        Raises:
            ConflictError: an endpoint has them, or another attach is under way with them.
        """
        # The lock comes later, after addresses are found, so two equal attaches could get there.
        self._check_free(request, sandbox)
        entry = request, sandbox
        self._attaching.append(entry)
        try:
            yield
        finally:
            self._attaching.remove(entry)

    def _check_free(self, request: AttachRequest, sandbox: Sandbox) -> None:
        for endpoint in self._directory.all:
            if endpoint.sandbox.netns == sandbox.netns and endpoint.network == request.network:
                raise ConflictError(
                    f"{sandbox} is already attached to network {request.network}, as endpoint "
                    f"{endpoint.name} with {endpoint.addresses[0]}: detach it first"
                )
            if request.name is not None and endpoint.name == request.name:
                raise ConflictError(
                    f"endpoint name {request.name} is taken by {endpoint.sandbox} on network "
                    f"{endpoint.network}: choose another --name"
                )
            if endpoint.network == request.network and _same_owner(endpoint.sandbox, sandbox):
                raise ConflictError(
                    f"owner {_owner_of(sandbox)} already has endpoint {endpoint.name} on network "
                    f"{request.network}: release that first"
                )
        for other, other_sandbox in self._attaching:
            if (
                other.network == request.network
                and (other_sandbox.netns == sandbox.netns or _same_owner(other_sandbox, sandbox))
            ) or (request.name is not None and other.name == request.name):
                raise ConflictError(
                    f"{other_sandbox} is being attached to network {other.network} right now: "
                    "wait until that is done, or choose another --name"
                )


def _owner_of(sandbox: Sandbox) -> str | None:
    return sandbox.owner if isinstance(sandbox, HoldSandbox) else None


def _same_owner(one: Sandbox, other: Sandbox) -> bool:
    return _owner_of(one) is not None and _owner_of(one) == _owner_of(other)


def _draft(
    request: AttachRequest,
    ready: ReadyNetwork,
    addresses: tuple[IpInterface, ...],
    sandbox: Sandbox,
    identity: EndpointId,
    host: HostId,
) -> Endpoint:
    return Endpoint(
        id=identity,
        network=ready.network.name,
        host=host,
        name=request.name or f"{sandbox.label}-{identity[:4]}",
        sandbox=sandbox,
        ifname=request.ifname,
        addresses=addresses,
        gateways=gateways_of(ready.network, addresses),
        mac=endpoint_mac(addresses[0].ip),
        mtu_bytes=ready.mtu_bytes,
        default_route=request.default_route and not ready.network.internal,
        parent=ready.uplink if ready.endpoint_link is LinkKind.MACVLAN else None,
    )
