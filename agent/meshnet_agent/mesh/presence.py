"""Notices that this host was away from the mesh: its keys may have been removed meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from meshnet_agent.mesh.view import MeshListener

if TYPE_CHECKING:
    from meshnet.model import HostId, MeshSnapshot
    from meshnet.store.mirror import Changes


class Writer(Protocol):
    """A part that maintains keys of this host in the store."""

    def refresh(self) -> None:
        """Compare the keys with the store again, instead of trusting what was written before."""
        ...


class Presence(MeshListener):
    """Has this host's keys checked whenever somebody may have removed them.

    That is when the host has a lease again (a ``host rm`` in between removes everything that the
    host published), and when the store is followed again after an outage.
    """

    def __init__(self, host: HostId, *writers: Writer) -> None:
        self._host = host
        self._writers = writers
        self._was_alive = False

    def mesh_changed(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        """See `MeshListener`."""
        alive = self._host in snapshot.alive
        if alive and not self._was_alive:
            self._refresh()
        self._was_alive = alive

    def store_returned(self) -> None:
        """See `MeshListener`."""
        self._refresh()

    def _refresh(self) -> None:
        for writer in self._writers:
            writer.refresh()
