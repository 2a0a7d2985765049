"""A copy of the mesh's part of the store, kept current by a listing and the changes after it.

Keys (docs/etcd-layout.md)::

    /meshnet/v1/mesh/networks/NAME            a network
    /meshnet/v1/mesh/hosts/ID                 what a host publishes; outlives its lease
    /meshnet/v1/mesh/alive/ID                 who runs as that host; under the host's lease
    /meshnet/v1/mesh/subnets/NAME/CIDR        whose subnet that is (a reservation)
    /meshnet/v1/endpoints/NAME/ID/ENDPOINT    an endpoint; listed on demand, never watched
    /meshnet/v1/mesh-id                       random name of the mesh (`meshnet_agent.identity`)
    /meshnet/v1/serial/networks               written with every change of the set of networks

A value that cannot be used is left out, remembered with its reason, and shown by ``status``; what
was known under its key before stays in force, so that damage in the store does no more damage here.

No I/O: the agent's watch task feeds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet import codec
from meshnet.codec import BadValueError
from meshnet.model import HostId, MeshSnapshot, NetworkName

if TYPE_CHECKING:
    from meshnet.model import Claim, Host, IpNetwork, Network
    from meshnet.store import Listing, WatchBatch

ROOT = "/meshnet/v1/"
MESH = ROOT + "mesh/"
NETWORKS = MESH + "networks/"
HOSTS = MESH + "hosts/"
ALIVE = MESH + "alive/"
SUBNETS = MESH + "subnets/"
ENDPOINTS = ROOT + "endpoints/"
MESH_ID = ROOT + "mesh-id"
NETWORKS_SERIAL = ROOT + "serial/networks"


class Mirror:
    """The copy.  Not thread-safe; `snapshot` is a value that may go to any thread."""

    def __init__(self) -> None:
        self.revision = 0
        self._networks: dict[NetworkName, tuple[int, Network]] = {}
        self._hosts: dict[HostId, Host] = {}
        self._alive: dict[HostId, Claim] = {}
        self._reservations: dict[NetworkName, dict[IpNetwork, HostId]] = {}
        self._bad: dict[str, str] = {}
        self._keys: set[str] = set()
        self._holes: set[str] = set()

    def load(self, listing: Listing) -> None:
        """Start over from a complete listing of `MESH`."""
        listed = {item.key for item in listing.items}
        for key in self._keys - listed:
            self._remove(key)
        for item in listing.items:
            self._put(item.key, item.value, item.mod_revision)
        self.revision = listing.revision

    def apply(self, batch: WatchBatch) -> None:
        """Take changes in."""
        for change in batch.changes:
            if change.value is None:
                self._remove(change.key)
            else:
                self._put(change.key, change.value, change.revision)
        self.revision = max(self.revision, batch.revision)

    def snapshot(self) -> MeshSnapshot:
        """All of it, as of now: later changes do not show in the value returned.

        Networks come in the order they were created in, the same for every agent: of two that
        contradict each other the older one counts (`meshnet.plan`).
        """
        networks = sorted(self._networks.values(), key=lambda item: (item[0], item[1].name))
        return MeshSnapshot(
            revision=self.revision,
            networks={network.name: network for _, network in networks},
            hosts=dict(self._hosts),
            alive=dict(self._alive),
            reservations={n: dict(r) for n, r in self._reservations.items()},
            bad_values={_printable(key): reason for key, reason in self._bad.items()},
            holes=frozenset(self._holes),
        )

    def _put(self, key: str, value: bytes, revision: int) -> None:
        known = key in self._keys and key not in self._holes
        self._keys.add(key)
        try:
            self._decode(key, value, revision)
        except BadValueError as error:
            self._bad[key] = str(error)
            if not known and key.startswith((NETWORKS, HOSTS, SUBNETS)):
                self._holes.add(key)
        else:
            self._bad.pop(key, None)
            self._holes.discard(key)

    def _decode(self, key: str, value: bytes, revision: int) -> None:
        kind, _, rest = key.removeprefix(MESH).partition("/")
        match kind:
            case "networks":
                network = codec.decode_network(value)
                _check_name(network.name, rest)
                self._networks[network.name] = (revision, network)
            case "hosts":
                host = codec.decode_host(value)
                _check_name(host.id, rest)
                self._hosts[host.id] = host
            case "alive":
                self._alive[HostId(rest)] = codec.decode_claim(value)
            case "subnets":
                name, _, subnet_key = rest.partition("/")
                found = codec.decode_reservation(NetworkName(name), subnet_key, value)
                self._reservations.setdefault(found.network, {})[found.subnet] = found.host
            case _:
                raise BadValueError(f"unknown kind of key {kind!r}")

    def _remove(self, key: str) -> None:
        self._keys.discard(key)
        self._bad.pop(key, None)
        self._holes.discard(key)
        kind, _, rest = key.removeprefix(MESH).partition("/")
        match kind:
            case "networks":
                self._networks.pop(NetworkName(rest), None)
            case "hosts":
                self._hosts.pop(HostId(rest), None)
            case "alive":
                self._alive.pop(HostId(rest), None)
            case "subnets":
                self._remove_reservation(rest)

    def _remove_reservation(self, rest: str) -> None:
        name, _, subnet_key = rest.partition("/")
        try:
            subnet = codec.subnet_from_key(subnet_key)
        except BadValueError:
            return  # it was never taken in
        owned = self._reservations.get(NetworkName(name), {})
        owned.pop(subnet, None)
        if not owned:
            self._reservations.pop(NetworkName(name), None)


def _printable(key: str) -> str:
    """A key as text that can be encoded: one that is not UTF-8 has surrogates in it."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _check_name(inside: str, in_key: str) -> None:
    if inside != in_key:
        raise BadValueError(f"the value names {inside!r}, the key {in_key!r}")


def network_key(name: NetworkName) -> str:
    """Key of a network."""
    return NETWORKS + name


def host_key(host: HostId) -> str:
    """Key of what a host publishes."""
    return HOSTS + host


def alive_key(host: HostId) -> str:
    """Key under a host's lease."""
    return ALIVE + host


def subnet_key(network: NetworkName, subnet: IpNetwork) -> str:
    """Key of a reservation."""
    return f"{SUBNETS}{network}/{codec.subnet_to_key(subnet)}"
