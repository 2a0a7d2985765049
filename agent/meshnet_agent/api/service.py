"""What the API's requests do: the agent's parts put to the use of one caller.

Returns JSON documents (`meshnet_agent.api.documents`); raises `MeshnetError`.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import trio

from meshnet.backends import Peer
from meshnet.backends.macvlan import shim_name
from meshnet.backends.overlay import bridge_name
from meshnet.backends.udp import UDP, tun_name
from meshnet.backends.vxlan import vxlan_name
from meshnet.diff import Failure, Table
from meshnet.errors import ConflictError, MeshnetError, NotFoundError, StoreUnavailableError
from meshnet.model import EndpointId, HostId, Network, NetworkName, Vni
from meshnet.plan import NetworkOutcome, backend_of, way_to
from meshnet.state import RouteKey, endpoint_link_name
from meshnet_agent.api.documents import (
    Document,
    endpoint_document,
    host_document,
    network_document,
)
from meshnet_agent.endpoints.sandbox import open_sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from meshnet.model import Endpoint, Host, MeshSnapshot, PublishedPort
    from meshnet_agent.containers.images import Images
    from meshnet_agent.daemon import Agent
    from meshnet_agent.dataplane.fallback import Fall
    from meshnet_agent.endpoints.request import AttachRequest

_SHOWN_ERRORS = 20
_SLICE = 500
_NO_NEXTHOP_OBJECTS = (
    "this kernel has no nexthop objects: routes name their gateways, which takes Linux ever longer "
    "the more hosts there are; run Linux 5.3 or newer"
)


class Service:
    """The operations of the API on one agent.

    Attributes:
        passed_over: OCI runtimes that cannot run here, and why; empty until one was needed.
        images: this host's images, which need neither the mesh nor the kernel's tables.
    """

    def __init__(self, agent: Agent, images: Images) -> None:
        self._agent = agent
        self.images = images
        self.passed_over: dict[str, str] = {}

    async def create_network(self, build: Callable[[Vni], Network], vni: int | None) -> Document:
        """Create a network and wait, for a while, until it is up here.

        It exists also if it does not come up on this host: then `error` says why.

        Raises:
            PolicyRefusedError: the store is not this host's mesh; also of what removes something.
        """
        await self._agent.follower.check_store()
        network = await self._agent.registry.create_network(build, vni)
        try:
            ready = await self._agent.networks.wait_for(network.name)
        except MeshnetError as error:
            return network_document(network, None) | {"error": str(error)}
        return network_document(network, ready.mtu_bytes)

    async def remove_network(self, name: str) -> None:
        """Remove a network (`Registry.remove_network`).

        Raises:
            NotFoundError: there is no such network.
            ConflictError: it has endpoints.
        """
        # This host's own endpoints may not be published yet.
        mine = [e for e in self._agent.endpoints.all if e.network == name]
        if mine:
            some = ", ".join(e.name for e in mine[:3])
            raise ConflictError(
                f"network {name} has {len(mine)} endpoints on this host ({some}): detach them first"
            )
        await self._agent.follower.check_store()
        await self._agent.registry.remove_network(NetworkName(name))

    async def remove_host(self, host: str) -> Document:
        """Forget a host (`Registry.remove_host`)."""
        await self._agent.follower.check_store()
        endpoints = await self._agent.registry.remove_host(HostId(host))
        return {"id": host, "endpoints": [endpoint_document(e) for e in endpoints]}

    async def detach(self, pid: int, network: str) -> Document:
        """Detach a process (`Attacher.detach`)."""
        found = self._agent.endpoints.find_of_process(pid, network)
        return endpoint_document(await self._agent.attacher.detach(found.sandbox.netns, network))

    async def attach(self, pid: int, request: AttachRequest) -> Document:
        """Attach a process (`Attacher.attach`)."""
        started = time.perf_counter()
        with open_sandbox(pid) as sandbox:
            endpoint = await self._agent.attacher.attach(sandbox, request)
        elapsed_ms = (time.perf_counter() - started) * 1000
        return endpoint_document(endpoint) | {"agent_ms": round(elapsed_ms, 3)}

    def endpoints_of(self, pid: int) -> list[Document]:
        """The endpoints in a process's network namespace."""
        return [endpoint_document(e) for e in self._agent.endpoints.of_process(pid)]

    async def publish(self, name: str, ports: Sequence[PublishedPort]) -> Document:
        """Publish ports of a live endpoint (`Attacher.publish`)."""
        await self._find_endpoint(name)
        return endpoint_document(await self._agent.attacher.publish(name, ports))

    async def unpublish(self, name: str, ports: Sequence[str]) -> Document:
        """Take published ports of a live endpoint away (`Attacher.unpublish`)."""
        await self._find_endpoint(name)
        return endpoint_document(await self._agent.attacher.unpublish(name, ports))

    async def _find_endpoint(self, name: str) -> Endpoint:
        """One of this host; the error names the host that has it."""
        try:
            return self._agent.endpoints.find(name)
        except NotFoundError:
            with contextlib.suppress(StoreUnavailableError):
                for endpoint in await self._agent.registry.list_endpoints():
                    if name in (endpoint.name, endpoint.id):
                        raise NotFoundError(
                            f"endpoint {name} is on host {endpoint.host}: ask the agent there"
                        ) from None
            raise

    def network_documents(self) -> list[Document]:
        """All networks."""
        return [self._network_document(n) for n in self._agent.follower.snapshot.networks.values()]

    async def inspect_network(self, name: str) -> Document:
        """One network, with its hosts and this host's endpoints.

        Raises:
            NotFoundError: there is no such network.
        """
        snapshot = self._agent.follower.snapshot
        network = snapshot.networks.get(NetworkName(name))
        if network is None:
            raise NotFoundError(f"network {name} does not exist: meshnet network ls lists them")
        hosts: dict[str, list[str]] = {}
        for number, host in enumerate(list(snapshot.hosts)):
            await _let_others_run(number)
            owned = snapshot.subnets_of(host, network.name)
            if owned:
                hosts[host] = [str(s) for s in owned]
        return self._network_document(network) | {
            "hosts": hosts,
            "endpoints": [
                endpoint_document(e) for e in self._agent.endpoints.all if e.network == network.name
            ],
            "vtep": await self._vtep_document(network),
        }

    async def _vtep_document(self, network: Network) -> Document | None:
        """What the network's userspace VTEP counted; None: it has none here."""
        underlay = self._agent.reconciler.result.underlay
        if (
            self._agent.vteps is None
            or underlay is None
            or not (network.fallback or backend_of(network, underlay) is UDP)
        ):
            return None
        counted = await trio.to_thread.run_sync(self._agent.vteps.counters, tun_name(network))
        hosts = {str(h.underlay_ip): h.id for h in self._agent.follower.snapshot.hosts.values()}
        return {
            "drops": counted.get("drops", {}),
            "totals": counted.get("totals", {}),
            "peers": [
                {"host": hosts.get(peer["underlay_ip"], ""), **peer}
                for peer in counted.get("peers", [])
            ],
        }

    def _network_document(self, network: Network) -> Document:
        outcome = self._agent.reconciler.result.networks.get(network.name)
        plan = outcome.plan if outcome is not None else None
        return network_document(network, plan.mtu_bytes if plan is not None else None)

    async def endpoint_documents(self) -> Document:
        """Endpoints of all hosts; of this host alone while the store does not answer."""
        local = {e.id: e for e in self._agent.endpoints.all}
        warning = None
        others = []
        try:
            others = [
                e
                for e in await self._agent.registry.list_endpoints()
                if e.host != self._agent.host.id
            ]
        except StoreUnavailableError as error:
            warning = f"only this host's endpoints are shown: {error}"
        found = sorted([*local.values(), *others], key=lambda e: (e.network, e.host, e.name))
        return {"endpoints": [endpoint_document(e) for e in found], "warning": warning}

    async def host_documents(self) -> list[Document]:
        """All hosts."""
        snapshot = self._agent.follower.snapshot
        documents = []
        for number, (_, host) in enumerate(sorted(snapshot.hosts.items())):
            await _let_others_run(number)
            documents.append(host_document(host, snapshot, *self._paths_to(host)))
        return documents

    def _paths_to(self, host: Host) -> tuple[dict[NetworkName, str], dict[NetworkName, str]]:
        """How packets to a host leave this one, by network, and why if they are in fallback."""
        agent = self._agent
        snapshot, result = agent.follower.snapshot, agent.reconciler.result
        path: dict[NetworkName, str] = {}
        if host.id == agent.host.id or result.underlay is None:
            return path, {}
        for name, outcome in result.networks.items():
            network, subnets = snapshot.networks.get(name), snapshot.subnets_of(host.id, name)
            if network is not None and subnets and outcome.plan is not None:
                path[name] = way_to(
                    network, Peer(host, subnets), agent.probes.fallen, result.underlay
                )
        falls = agent.probes.falls
        return path, {n: falls[n, host.id].why for n in path if (n, host.id) in falls}

    def _notes(self) -> list[str]:
        """What an operator should know, and is no error."""
        notes = self._agent.ports.notes()
        notes += [
            f"{name} runs no containers here: {why}" for name, why in self.passed_over.items()
        ]
        dead = sorted(self._agent.follower.dead_for_s())
        if dead:
            some = f"{', '.join(dead[:5])}{', …' if len(dead) > 5 else ''}"
            notes.append(f"no agent runs on {some}, or it does not reach etcd: see meshnet hosts")
        underlay = self._agent.reconciler.result.underlay
        if underlay is not None and not underlay.nexthop_objects:
            notes.append(_NO_NEXTHOP_OBJECTS)
        return notes

    def _probe_fields(self, network: Network) -> Document:
        """What a network's status says of its fallback."""
        if not network.fallback:
            return {"fallen": [], "probes": None}
        probes = self._agent.probes
        found = probes.statistics(network.name)
        return {
            "fallen": [
                {"host": host, "why": fall.why, "since_s": _since_s(fall)}
                for (name, host), fall in sorted(probes.falls.items())
                if name == network.name
            ],
            "probes": {
                "sent": found.sent,
                "lost": found.lost,
                "rtt_ms": {"p50": found.rtt_p50_ms, "max": found.rtt_max_ms},
            },
        }

    async def status_document(self) -> Document:
        """How this host is doing."""
        snapshot = self._agent.follower.snapshot
        result = self._agent.reconciler.result
        blocked = self._agent.reconciler.blocked
        per_network, other = _sort_failures(result.failures, snapshot)
        networks = []
        for network in snapshot.networks.values():
            outcome = result.networks.get(network.name) or NetworkOutcome()
            errors = [*outcome.errors, *_some(list(outcome.peer_errors.values()))]
            errors += _some([str(f) for f in per_network[network.name]])
            if network.name in self._agent.membership.errors:
                errors = [str(self._agent.membership.errors[network.name]), *errors]
            mine = [e for e in self._agent.endpoints.all if e.network == network.name]
            unhealed = self._agent.endpoints.unhealed
            errors += self._agent.pool.errors(network.name)
            errors += [f"endpoint {e.name}: {unhealed[e.id]}" for e in mine if e.id in unhealed]
            networks.append(
                {
                    "name": network.name,
                    "mode": network.mode,
                    "peers": outcome.peers,
                    "endpoints": len(mine),
                    "in_sync": self._agent.reconciler.in_sync
                    and outcome.plan is not None
                    and not errors,
                    "pending": self._agent.reconciler.pending,
                    "errors": errors,
                    **self._probe_fields(network),
                }
            )
        return {
            "host": {"id": self._agent.host.id, "underlay_ip": str(self._agent.host.underlay_ip)},
            "store": {
                "connected": self._agent.follower.connected and self._agent.membership.lease_ok,
                "revision": snapshot.revision,
                "lag_s": round(self._agent.follower.lag_s, 3),
                "error": self._agent.follower.error,
            },
            "networks": networks,
            "set_aside": [
                {"network": name, "address": str(address), "mac": mac.hex(":")}
                for name, address, mac in self._agent.pool.set_aside
            ],
            "bad_values": [
                {"key": key, "reason": reason}
                for key, reason in {**snapshot.bad_values, **self._agent.pool.bad_values}.items()
            ],
            "errors": [
                *([blocked] if blocked else []),
                *map(_unreadable, sorted(self._agent.endpoints.unreadable)),
                *(f"nothing is deleted while {key} cannot be read" for key in snapshot.holes),
                *_some([str(f) for f in other]),
            ],
            "notes": self._notes(),
            "drops": await self._agent.drops(),
            "kernel": {
                "passes": self._agent.reconciler.passes,
                "full_passes": self._agent.reconciler.full_passes,
                "writes": self._agent.reconciler.writes,
                "last": {
                    "scope": result.scope,
                    "seconds": round(result.seconds, 4),
                    **{stage: round(s, 4) for stage, s in asdict(result.stages).items()},
                },
            },
        }


def _since_s(fall: Fall) -> float:
    return round(trio.current_time() - fall.since, 1)


async def _let_others_run(number: int) -> None:
    """Called for each of thousands of items: they must not hold up an attach."""
    if number % _SLICE == _SLICE - 1:
        await trio.lowlevel.checkpoint()


def _some(errors: list[str]) -> list[str]:
    """The first errors, and how many more there are: one cause can have ten thousand."""
    left = len(errors) - _SHOWN_ERRORS
    return [*errors[:_SHOWN_ERRORS], *([f"and {left} more like these"] if left > 0 else [])]


def _unreadable(identity: str) -> str:
    return (
        f"the record of endpoint {identity} could not be read and is set aside, as {identity}.bad "
        "in the state directory: its packets are dropped; put it right and start the agent anew, "
        f"or end the process behind {endpoint_link_name(EndpointId(identity))}"
    )


def _sort_failures(
    failures: Collection[Failure], snapshot: MeshSnapshot
) -> tuple[dict[NetworkName, list[Failure]], list[Failure]]:
    """Failures by the network they belong to, and the rest."""
    by_network: dict[NetworkName, list[Failure]] = {n: [] for n in snapshot.networks}
    rest: list[Failure] = []
    for failure in failures:
        owner = next((n.name for n in snapshot.networks.values() if _belongs(failure, n)), None)
        (by_network[owner] if owner is not None else rest).append(failure)
    return by_network, rest


def _belongs(failure: Failure, network: Network) -> bool:
    op = failure.op
    links = [name(network) for name in (bridge_name, vxlan_name, tun_name, shim_name)]
    if op.table is Table.LINK:
        return op.key in links
    if op.table is Table.NEXTHOP and op.value is not None:
        return op.value.dev in links
    if isinstance(op.key, RouteKey):
        return any(
            s.version == (4 if len(op.key.prefix) == 4 else 6)
            and int(s.network_address)
            <= int.from_bytes(op.key.prefix, "big")
            <= int(s.broadcast_address)
            for s in network.subnets
        )
    return getattr(op.key, "dev", None) in links
