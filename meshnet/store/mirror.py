"""A copy of the mesh's part of the store, kept current by a listing and the changes after it.

Keys (docs/etcd-layout.md)::

    /meshnet/v1/mesh/networks/NAME            a network
    /meshnet/v1/mesh/hosts/ID                 what a host publishes; outlives its lease
    /meshnet/v1/mesh/alive/ID                 who runs as that host; under the host's lease
    /meshnet/v1/mesh/subnets/NAME/CIDR        whose subnet that is (a reservation)
    /meshnet/v1/endpoints/NAME/ID/ENDPOINT    an endpoint; listed on demand, never watched
    /meshnet/v1/addresses/NAME/ADDRESS        who has it (`meshnet.store.addresses`); never watched
    /meshnet/v1/mesh-id                       random name of the mesh
    /meshnet/v1/serial/networks               written with every change of the set of networks

A value that cannot be used is left out, remembered with the reason, and shown by ``status``.  What
was known under its key before stays in force, so that damage in the store does not spread to the
kernel.

No I/O: the agent's watch task feeds it.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meshnet.codec.document import BadValueError, check_key_name
from meshnet.codec.hosts import (
    decode_claim,
    decode_host,
    decode_reservation,
    subnet_from_key,
    subnet_to_key,
)
from meshnet.codec.networks import decode_network
from meshnet.model import HostId, MeshSnapshot, NetworkName, Reservations
from meshnet.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from meshnet.model import Claim, Host, IpNetwork, Network
    from meshnet.store import KeyValue, Listing, WatchBatch

ROOT = "/meshnet/v1/"
MESH = ROOT + "mesh/"
NETWORKS = MESH + "networks/"
HOSTS = MESH + "hosts/"
ALIVE = MESH + "alive/"
SUBNETS = MESH + "subnets/"
ENDPOINTS = ROOT + "endpoints/"
ADDRESSES = ROOT + "addresses/"
MESH_ID = ROOT + "mesh-id"
NETWORKS_SERIAL = ROOT + "serial/networks"
_SHOWN_CHARACTERS = 400
"""Most characters of a bad key that are shown; valid keys are shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorState:
    """All that a mirror knows, as a value.

    Attributes:
        network_revisions: of the last write of each network: they are used in that order.
        last_put, last_deletion: as of `Mirror`.
    """

    snapshot: MeshSnapshot
    network_revisions: Mapping[NetworkName, int]
    last_put: tuple[str, int] | None
    last_deletion: tuple[str, int] | None


@dataclass(slots=True)
class Changes:
    """What some changes of the store affect.

    Attributes:
        hosts: hosts whose entry or subnets changed.
        leases: hosts that got or lost a lease, or whose entry appeared, changed or went.
        networks: whether networks, or the set of unreadable values, changed.
    """

    hosts: set[HostId] = field(default_factory=set)
    leases: set[HostId] = field(default_factory=set)
    networks: bool = False


class Mirror:
    """The copy.  Not thread-safe; `snapshot` is a value that may go to any thread.

    Filled with `add_listed` and `finish`, then kept current with `apply`.

    Args:
        before: the copy that this one is to replace: where the listing has a value that cannot be
            used, what was known before stays in force.
        from_disk: it is filled from this host's disk, and nobody knows what has changed since: its
            snapshot has a hole, so that nothing is deleted because it is missing.

    Attributes:
        last_put, last_deletion: key and revision of the latest ones known.  A store that does not
            have them has another history (it was restored from an older copy).
        contradiction: a key whose listed value is older than the copy to be replaced, and yet
            differs from it: the listing comes from another history.
    """

    def __init__(self, before: Mirror | None = None, *, from_disk: bool = False) -> None:
        self.revision = 0
        self.from_disk = from_disk
        self.last_put: tuple[str, int] | None = None
        self.last_deletion: tuple[str, int] | None = None
        self.contradiction: str | None = None
        self._before = before
        self._networks: dict[NetworkName, tuple[int, Network]] = {}
        self._hosts: dict[HostId, Host] = {}
        self._alive: dict[HostId, Claim] = {}
        self._reservations: dict[NetworkName, Reservations] = {}
        self._bad: dict[str, str] = {}
        self._holes: set[str] = {"etcd"} if from_disk else set()
        self._changes = Changes()
        self._shown: MeshSnapshot | None = None

    def add_listed(self, items: Iterable[KeyValue]) -> None:
        """Take in a part of a complete listing of `MESH`."""
        for item in items:
            if self.last_put is None or item.mod_revision > self.last_put[1]:
                self.last_put = (item.key, item.mod_revision)
            self._put(item.key, item.value, item.mod_revision)
            if self._contradicts(item):
                self.contradiction = item.key

    def finish(self, revision: int) -> None:
        """Note that the listing is complete, and its revision."""
        self.revision = revision
        self._before = None
        self._shown = None
        self._changes = Changes()

    def apply(self, batch: WatchBatch) -> Changes:
        """Take in changes; returns what they affect."""
        for change in batch.changes:
            if change.value is None:
                self.last_deletion = (change.key, change.revision)
                self._remove(change.key)
            else:
                self.last_put = (change.key, change.revision)
                self._put(change.key, change.value, change.revision)
        self.revision = max(self.revision, batch.revision)
        if self._changes.networks:
            self._shown = None
        changes, self._changes = self._changes, Changes()
        return changes

    def view(self) -> MeshSnapshot:
        """The whole mesh as of now, without copying: valid until the next change is taken in.

        Networks are in the order of their creation, the same on every agent: of two that exclude
        each other, the older one is used (`meshnet.plan`).
        """
        if self._shown is None or self._shown.revision != self.revision:
            shown = self._shown
            self._shown = MeshSnapshot(
                revision=self.revision,
                networks=shown.networks if shown is not None else self._in_order(),
                hosts=self._hosts,
                alive=self._alive,
                reservations=self._reservations,
                bad_values={printable_key(key): reason for key, reason in self._bad.items()},
                holes=frozenset(map(printable_key, self._holes)),
            )
        return self._shown

    def snapshot(self) -> MeshSnapshot:
        """The whole mesh as of now, as a copy that later changes do not affect."""
        now = self.view()
        return MeshSnapshot(
            revision=now.revision,
            networks=now.networks,
            hosts=dict(self._hosts),
            alive=dict(self._alive),
            reservations={name: held.copy() for name, held in self._reservations.items()},
            bad_values=now.bad_values,
            holes=now.holes,
        )

    def state(self) -> MirrorState:
        """All that this copy knows, as a value that later changes do not affect."""
        return MirrorState(
            snapshot=self.snapshot(),
            network_revisions={name: revision for name, (revision, _) in self._networks.items()},
            last_put=self.last_put,
            last_deletion=self.last_deletion,
        )

    def _in_order(self) -> dict[NetworkName, Network]:
        by_age = sorted(self._networks.values(), key=lambda item: (item[0], item[1].name))
        return {network.name: network for _, network in by_age}

    def _put(self, key: str, value: bytes, revision: int) -> None:
        try:
            self._decode(key, value, revision)
        except BadValueError as error:
            self._bad[key] = str(error)
            self._changes.networks = True
            known = self._value(key) is not None or self._inherit(key)
            if not known and key.startswith((NETWORKS, HOSTS, SUBNETS)):
                self._holes.add(key)
        else:
            self._forget_badness(key)

    def _decode(self, key: str, value: bytes, revision: int) -> None:
        kind, _, rest = key.removeprefix(MESH).partition("/")
        match kind:
            case "networks":
                network = decode_network(value)
                _check_name(network.name, rest)
                self._networks[network.name] = (revision, network)
                self._changes.networks = True
            case "hosts":
                self._put_host(decode_host(value), rest)
            case "alive":
                check_key_name(rest)
                self._alive[_host_id(rest)] = decode_claim(value)
                self._changes.leases.add(_host_id(rest))
            case "subnets":
                name, _, subnet_key = rest.partition("/")
                found = decode_reservation(NetworkName(name), subnet_key, value)
                held = self._reservations.setdefault(found.network, Reservations())
                before = held.put(found.subnet, _host_id(found.host))
                if before != found.host:
                    self._changes.hosts |= {h for h in (before, found.host) if h is not None}
            case _:
                raise BadValueError(f"unknown kind of key {kind!r}")

    def _put_host(self, host: Host, in_key: str) -> None:
        _check_name(host.id, in_key)
        if self._hosts.get(host.id) != host:
            self._hosts[_host_id(host.id)] = host
            self._changes.hosts.add(host.id)
            self._changes.leases.add(host.id)

    def _value(self, key: str) -> object:
        """What is known under a key; None: nothing."""
        kind, _, rest = key.removeprefix(MESH).partition("/")
        match kind:
            case "networks":
                return self._networks.get(NetworkName(rest), (0, None))[1]
            case "hosts":
                return self._hosts.get(HostId(rest))
            case "alive":
                return self._alive.get(HostId(rest))
            case "subnets":
                name, _, subnet_key = rest.partition("/")
                with contextlib.suppress(BadValueError):
                    subnet = subnet_from_key(subnet_key)
                    return self._reservations.get(NetworkName(name), Reservations()).get(subnet)
        return None

    def _contradicts(self, item: KeyValue) -> bool:
        """Whether the copy before should have known this, and did not.

        Leases are left out: one that ran out and was granted again is not another history.
        """
        before = self._before
        return (
            before is not None
            and item.mod_revision <= before.revision
            and not item.key.startswith(ALIVE)
            and item.key not in self._bad
            and item.key not in before._bad
            and before._value(item.key) != self._value(item.key)
        )

    def _inherit(self, key: str) -> bool:
        """Take over what the copy before knew under a key; returns whether it knew anything."""
        before = self._before
        if before is None or before._value(key) is None:
            return False
        kind, _, rest = key.removeprefix(MESH).partition("/")
        match kind:
            case "networks":
                self._networks[NetworkName(rest)] = before._networks[NetworkName(rest)]
            case "hosts":
                self._hosts[_host_id(rest)] = before._hosts[HostId(rest)]
            case "alive":
                self._alive[_host_id(rest)] = before._alive[HostId(rest)]
            case _:
                name, _, subnet_key = rest.partition("/")
                subnet = subnet_from_key(subnet_key)
                owner = before._reservations[NetworkName(name)][subnet]
                self._reservations.setdefault(NetworkName(name), Reservations()).put(subnet, owner)
        return True

    def _remove(self, key: str) -> None:
        self._forget_badness(key)
        kind, _, rest = key.removeprefix(MESH).partition("/")
        match kind:
            case "networks":
                self._networks.pop(NetworkName(rest), None)
                self._changes.networks = True
            case "hosts":
                self._hosts.pop(HostId(rest), None)
                self._changes.hosts.add(HostId(rest))
                self._changes.leases.add(HostId(rest))
            case "alive":
                self._alive.pop(HostId(rest), None)
                self._changes.leases.add(HostId(rest))
            case "subnets":
                self._remove_reservation(rest)

    def _forget_badness(self, key: str) -> None:
        if self._bad.pop(key, None) is not None:
            self._holes.discard(key)
            self._changes.networks = True

    def _remove_reservation(self, rest: str) -> None:
        name, _, subnet_key = rest.partition("/")
        try:
            subnet = subnet_from_key(subnet_key)
        except BadValueError:
            return  # it was never taken in
        held = self._reservations.get(NetworkName(name))
        if held is None:
            return
        owner = held.remove(subnet)
        if owner is not None:
            self._changes.hosts.add(owner)
        if not held:
            del self._reservations[NetworkName(name)]


def load(listing: Listing, before: Mirror | None = None) -> Mirror:
    """A copy of a complete listing of `MESH`."""
    mirror = Mirror(before)
    mirror.add_listed(listing.items)
    mirror.finish(listing.revision)
    return mirror


def _host_id(text: str) -> HostId:
    """A host's id, interned: thousands of keys name the same hosts."""
    return HostId(sys.intern(text))


def printable_key(key: str) -> str:
    """A key as printable text: bytes of it that are not UTF-8 are surrogates in the `str`."""
    text = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return printable(text, _SHOWN_CHARACTERS)


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
    return f"{SUBNETS}{network}/{subnet_to_key(subnet)}"
