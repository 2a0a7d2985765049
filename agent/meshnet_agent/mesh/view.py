"""What the mesh is, for the parts that go by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from meshnet.model import MeshSnapshot
    from meshnet.store.mirror import Changes


class MeshView(Protocol):
    """What the store says of the mesh, as far as this agent has heard."""

    @property
    def snapshot(self) -> MeshSnapshot:
        """Good until the next change (`Mirror.view`): keep a copy, not this."""
        ...

    @property
    def connected(self) -> bool:
        """Whether the store is followed now."""
        ...

    async def check_store(self) -> None:
        """Look whether the store is this host's mesh; before anything is written to it.

        Raises:
            PolicyRefusedError: it is not this host's mesh, or is an older copy of it.
            StoreUnavailableError: nobody can tell now.
        """
        ...


class MeshListener:
    """A part that is told what happens to the mesh.  Its methods return at once."""

    def mesh_changed(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        """The store says something new.

        Args:
            changes: what the change comes to; None: everything was read anew.
        """

    def store_returned(self) -> None:
        """The store is followed again.

        It may have been another one in between, and what was written last may be lost.
        """
