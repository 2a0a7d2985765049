"""Keeps what this host knows of the mesh on its disk, to start from while the store is silent.

The file is written from a thread, whole, and at most every few seconds: attaching never waits for
it.  A file that is older than what peers know does no harm: when the store answers, what it says
counts (design decision D5).
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.codec.document import BadValueError
from meshnet.errors import NotFoundError
from meshnet.store.saved import decode_saved, encode_saved
from meshnet.system.files import write_whole
from meshnet_agent.mesh.view import MeshListener
from meshnet_agent.state_dir import set_aside
from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    from pathlib import Path

    from meshnet.model import HostId, MeshSnapshot
    from meshnet.store.mirror import Changes, MirrorState
    from meshnet.store.saved import SavedMesh
    from meshnet_agent.mesh.follower import Follower
    from meshnet_agent.mesh.identity import MeshIdentity
    from meshnet_agent.tasks.worker import Worker

_log = structlog.get_logger()
_LEAST_S, _PART = 5.0, 50
"""The least pause between two writes, and how often what a write took fits into the pause: a large
mesh that changes all the time costs 2 % of a core."""


class SnapshotFile:
    """The file; its methods block.

    Args:
        path: ``snapshot.json`` in the state directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, state: MirrorState, mesh: str, host: HostId) -> None:
        """Replace the file.  A disk error is logged: the next start then needs the store."""
        try:
            write_whole(self._path, encode_saved(state, mesh=mesh, host=host, now_s=time.time()))
        except OSError as error:
            _log.error("mesh not saved", file=str(self._path), reason=str(error))

    def load(self) -> SavedMesh | None:
        """What the file says; None: there is none that can be used."""
        try:
            return decode_saved(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.error("saved mesh cannot be read", file=str(self._path), reason=str(error))
            return None
        except BadValueError as error:
            with contextlib.suppress(OSError):
                set_aside(self._path, str(error))
            return None


class Saver(MeshListener):
    """Has the file written after changes, and read at a start."""

    def __init__(
        self,
        follower: Follower,
        identity: MeshIdentity,
        host: HostId,
        file: Worker[SnapshotFile],
    ) -> None:
        self._follower = follower
        self._identity = identity
        self._host = host
        self._file = file
        self._changed = Flag()

    def mesh_changed(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        """See `MeshListener`."""
        self._changed.set()

    async def run(self) -> None:
        """Write after changes.  Never returns."""
        while True:
            await self._changed.wait()
            started = time.perf_counter()
            await self._save()
            spent_s = time.perf_counter() - started
            await trio.sleep(max(_LEAST_S, _PART * spent_s))

    async def _save(self) -> None:
        mesh = self._identity.mesh
        # A snapshot with a hole, such as the one read from this file, says less than the file.
        if mesh is None or not self._follower.is_complete:
            return
        state = self._follower.copy_state()
        await self._file.run(lambda file: file.save(state, mesh, self._host))

    async def load(self) -> SavedMesh:
        """What is on disk, if it is this host's and of its mesh.

        Raises:
            NotFoundError: there is nothing to use; the message says why.
        """
        saved = await self._file.run(lambda file: file.load())
        if saved is None:
            raise NotFoundError("there is no usable copy of the mesh on this host's disk")
        if (saved.mesh, saved.host) != (self._identity.mesh, self._host):
            raise NotFoundError(
                f"the copy of the mesh on this host's disk is of host {saved.host} in mesh "
                f"{saved.mesh}, and this is host {self._host} in mesh {self._identity.mesh}"
            )
        return saved
