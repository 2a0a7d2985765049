"""How an agent that starts learns of its mesh: from the store, or from this host's disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from meshnet.errors import NotFoundError, StoreUnavailableError

if TYPE_CHECKING:
    from meshnet_agent.mesh.follower import Follower
    from meshnet_agent.mesh.membership import Membership
    from meshnet_agent.mesh.saver import Saver

_SILENT_S = 0.5
"""How long a start waits for the store where it can start from disk instead."""


async def learn_mesh(membership: Membership, follower: Follower, saver: Saver) -> None:
    """Join the mesh and list it; where the store is silent, start from what is on disk.

    Raises:
        ConflictError: another agent runs as this host, or this state directory is another host's.
        StoreUnavailableError: the store does not answer, and nothing usable is on disk.
        PolicyRefusedError: the store is not this host's mesh.
    """
    try:
        saved = await saver.load()
    except NotFoundError as missing:
        try:
            await _join_and_list(membership, follower)
        except StoreUnavailableError as error:
            raise StoreUnavailableError(f"{error} ({missing})") from error
        return
    try:
        # A store that is merely slow loses nothing by this: it is listed as soon as it answers.
        with trio.fail_after(_SILENT_S):
            await _join_and_list(membership, follower)
    except (StoreUnavailableError, trio.TooSlowError) as error:
        follower.restore(saved, str(error) or f"no answer within {_SILENT_S} s")


async def _join_and_list(membership: Membership, follower: Follower) -> None:
    await membership.join()
    await follower.list_all()
