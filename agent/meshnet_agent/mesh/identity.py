"""Which mesh this host belongs to: checked before anything is read from the store or written.

An etcd that was wiped, was restored from an older copy, or is a different one answers like any
other, and says that all networks are gone.  So the first agent of a mesh writes a random name into
the store, and every agent remembers that name and the latest revision that it saw.  Agents refuse a
store that does not have the name, or whose revision is older: the data path stays as it is until an
operator restores the store or removes the file with the name.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import structlog

from meshnet.codec.checksum import checked, with_checksum
from meshnet.codec.document import BadValueError
from meshnet.errors import PolicyRefusedError
from meshnet.store import Absent, Put
from meshnet.store.mirror import MESH_ID
from meshnet.system.files import write_whole
from meshnet.text import printable
from meshnet_agent.state_dir import set_aside

if TYPE_CHECKING:
    from pathlib import Path

    from meshnet.store import Store
    from meshnet.store.mirror import Mirror

_log = structlog.get_logger()
_SAVE_EVERY = 1000
"""How many revisions pass before the latest one is written to disk again."""


class _Remembered(msgspec.Struct, frozen=True):
    """The content of the file."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    revision: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    v: Literal[1] = 1


_FORMAT = msgspec.json.Decoder(_Remembered)


class MeshIdentity:
    """The mesh's name and its latest revision, remembered in a file.

    Args:
        file: ``mesh.json`` in the state directory.
    """

    def __init__(self, store: Store, file: Path) -> None:
        self._store = store
        self._file = file
        self._id, self._revision = _read(file)
        self._saved = self._revision

    @property
    def mesh(self) -> str | None:
        """The name of this host's mesh; None: it belongs to none yet."""
        return self._id

    def observe(self, revision: int) -> None:
        """Note a revision that was seen; `save` writes it to disk, and so does a later `check`."""
        self._revision = max(self._revision, revision)

    async def check(self) -> None:
        """Check that the store holds this host's mesh, and that its revision did not go back.

        A host that belongs to no mesh yet joins that of the store, and names it if it has no name.

        Raises:
            PolicyRefusedError: it does not; the message says why, and what to do.
            StoreUnavailableError: the store does not answer.
        """
        before = self._id
        found, revision = await self._look()
        if self._id is None:
            if found is None:
                # Two first agents may race here, so the name is read again: the first one's counts.
                await self._store.commit(
                    [Absent(MESH_ID)], [Put(MESH_ID, secrets.token_hex(8).encode())]
                )
                found, revision = await self._look()
            self._id = found
            _log.info("belongs to mesh", mesh=found)
        elif found is None:
            raise PolicyRefusedError(
                f"etcd is empty, and this host belongs to mesh {self._id}: restore etcd or correct "
                f"--etcd; to start anew stop the agents and remove {self._file}"
            )
        elif found != self._id:
            raise PolicyRefusedError(
                f"etcd holds mesh {found}, and this host belongs to mesh {self._id}: correct "
                f"--etcd; to join that mesh stop this agent and remove {self._file}"
            )
        elif revision < self._revision:
            raise PolicyRefusedError(
                f"etcd is at revision {revision} and was at {self._revision}: it was restored from "
                "an older copy, which may lack networks that are in use; to accept that stop this "
                f"agent and remove {self._file}"
            )
        self.observe(revision)
        if found != before or self._revision > self._saved + _SAVE_EVERY:
            self.save()

    async def check_history(self, mirror: Mirror) -> None:
        """Check that the last changes that the mirror knows are in the store's history.

        The revision alone does not show it: a store that was restored from an older copy and has
        been written to since may have reached any revision.

        Raises:
            PolicyRefusedError: they are not.
            CompactedError: that part of the history is compacted away: list again.
            StoreUnavailableError: the store does not answer.
        """
        for known, put in ((mirror.last_put, True), (mirror.last_deletion, False)):
            if known is None:
                continue
            key, revision = known
            found = await self._store.read(key, revision=revision)
            if [item.mod_revision for item in found.items] != ([revision] if put else []):
                raise self.refusal_of(key, revision)

    def refusal_of(self, key: str, revision: int) -> PolicyRefusedError:
        """The error for a key that at `revision` differs from what this agent saw there."""
        return PolicyRefusedError(
            f"etcd's {printable(key, 200)} at revision {revision} is not what it was: etcd was "
            "restored from an older copy, which may lack networks that are in use; to accept that "
            f"stop this agent and remove {self._file}"
        )

    def save(self) -> None:
        """Write name and revision to disk.

        A disk error is logged and not raised: it weakens this guard, but stops nothing else.
        """
        if self._id is None:
            return
        document = _Remembered(self._id, self._revision)
        try:
            write_whole(self._file, with_checksum(msgspec.json.encode(document)))
        except OSError as error:
            _log.error("mesh file cannot be written", file=str(self._file), reason=str(error))
        else:
            self._saved = self._revision

    async def _look(self) -> tuple[str | None, int]:
        listing = await self._store.read(MESH_ID)
        value = next((item.value for item in listing.items), None)
        name = printable(value.decode(errors="replace"), 200) if value is not None else None
        return name, listing.revision


def _read(file: Path) -> tuple[str | None, int]:
    """Name and revision in the file; None and 0 if there is none, or it is damaged (set aside)."""
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return None, 0
    except OSError as error:
        _log.error("mesh file cannot be read", file=str(file), reason=str(error))
        return None, 0
    try:
        remembered = _FORMAT.decode(checked(raw))
    except (BadValueError, ValueError, RecursionError) as error:  # or DecodeError
        with contextlib.suppress(OSError):
            set_aside(file, str(error)[:200])
        return None, 0
    return remembered.id, remembered.revision
