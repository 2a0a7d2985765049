"""Documents of volumes (docs/cli.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from meshnet_agent.containers.volumes import VolumeUse


class VolumeDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A volume, and the names of the containers that have it."""

    name: str
    path: str
    anonymous: bool
    created_s: float
    containers: tuple[str, ...]


class RemovedVolume(msgspec.Struct, frozen=True, kw_only=True):
    """A volume that is gone."""

    name: str


def volume_document(use: VolumeUse) -> VolumeDocument:
    """A volume, as ``volume ls`` shows it."""
    volume = use.volume
    return VolumeDocument(
        name=volume.name,
        path=volume.path,
        anonymous=volume.anonymous,
        created_s=volume.created_s,
        containers=use.containers,
    )
