"""What the mesh is, for the parts that depend on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from meshnet.model import MeshSnapshot
    from meshnet.store.mirror import Changes


class MeshView(Protocol):
    """What the store says about the mesh, as far as this agent knows."""

    @property
    def snapshot(self) -> MeshSnapshot:
        """Valid until the next change (`Mirror.view`): to keep it, make a copy."""
        ...

    @property
    def connected(self) -> bool:
        """Whether the store is followed now."""
        ...

    async def check_store(self) -> None:
        """Check that the store holds this host's mesh; to be called before writing to it.

        Raises:
            PolicyRefusedError: it holds another mesh, or an older copy of this one.
            StoreUnavailableError: the store does not answer.
        """
        ...


class MeshListener:
    """A part that is told about changes of the mesh.  Its methods return at once."""

    def mesh_changed(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        """The mesh changed.

        Args:
            snapshot: the mesh now; valid until the next change.
            changes: what changed; None: everything was listed again.
        """

    def store_returned(self) -> None:
        """The store is followed again.

        Another etcd may have answered in between, and the last writes may be lost.
        """
