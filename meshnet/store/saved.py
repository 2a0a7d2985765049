"""The mesh as a host last knew it, as a record on its disk: what it starts from without a store.

Pure: `meshnet_agent.mesh.saver` writes the record, `meshnet_agent.mesh.follower` starts from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec

from meshnet.codec.checksum import checked, with_checksum
from meshnet.codec.document import BadValueError
from meshnet.codec.hosts import encode_claim, encode_host, encode_reservation
from meshnet.codec.networks import encode_network
from meshnet.model import HostId, Reservation
from meshnet.store import KeyValue
from meshnet.store.mirror import Mirror, alive_key, host_key, network_key, subnet_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meshnet.store.mirror import MirrorState

_Revision = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Key = Annotated[str, msgspec.Meta(max_length=1000)]


class _SavedV1(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag=1):
    """The record.

    Attributes:
        items: key, value as the store has it, and revision; that is 0 of all but networks.
    """

    mesh: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    host: Annotated[str, msgspec.Meta(max_length=64)]
    saved_at_s: float
    revision: _Revision
    last_put: tuple[_Key, _Revision] | None
    last_deletion: tuple[_Key, _Revision] | None
    items: list[tuple[_Key, msgspec.Raw, _Revision]]


_FORMAT = msgspec.json.Decoder(_SavedV1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedMesh:
    """What the record says.

    Attributes:
        mesh: name of the mesh (`meshnet_agent.mesh.identity`).
        host: who saved it.
        saved_at_s: Unix time.
        mirror: a copy of the store as it was then.  Its snapshot has a hole, for nobody knows what
            has changed since.
    """

    mesh: str
    host: HostId
    saved_at_s: float
    mirror: Mirror


def encode_saved(state: MirrorState, *, mesh: str, host: HostId, now_s: float) -> bytes:
    """The record, with a checksum.  At 10,000 hosts 4 MB and a tenth of a second."""
    record = _SavedV1(
        mesh=mesh,
        host=host,
        saved_at_s=now_s,
        revision=state.snapshot.revision,
        last_put=state.last_put,
        last_deletion=state.last_deletion,
        items=list(_items_of(state)),
    )
    return with_checksum(msgspec.json.encode(record))


def decode_saved(raw: bytes) -> SavedMesh:
    """Read the record.  Values in it are checked like those of the store.

    Raises:
        BadValueError: damaged, or of another version.
    """
    try:
        record = _FORMAT.decode(checked(raw, required=True))
    except (ValueError, RecursionError) as error:  # DecodeError, UnicodeDecodeError
        raise BadValueError(str(error)) from error
    mirror = Mirror(from_disk=True)
    mirror.add_listed(
        KeyValue(key, bytes(value), revision) for key, value, revision in record.items
    )
    mirror.finish(record.revision)
    mirror.last_put, mirror.last_deletion = record.last_put, record.last_deletion
    return SavedMesh(
        mesh=record.mesh, host=HostId(record.host), saved_at_s=record.saved_at_s, mirror=mirror
    )


def _items_of(state: MirrorState) -> Iterator[tuple[str, msgspec.Raw, int]]:
    known = state.snapshot
    for name, network in known.networks.items():
        value = msgspec.Raw(encode_network(network))
        yield network_key(name), value, state.network_revisions[name]
    for identity, host in known.hosts.items():
        yield host_key(identity), msgspec.Raw(encode_host(host)), 0
    for identity, claim in known.alive.items():
        yield alive_key(identity), msgspec.Raw(encode_claim(claim)), 0
    for name, reservations in known.reservations.items():
        for subnet, owner in reservations.items():
            value = msgspec.Raw(
                encode_reservation(Reservation(network=name, subnet=subnet, host=owner))
            )
            yield subnet_key(name, subnet), value, 0
