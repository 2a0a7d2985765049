"""Where containers, and what they are made of, are on this host's disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003  (a field's type)

from meshnet.runtime.engine.volumes import VolumeStore
from meshnet_agent.containers.bundle.bundle import Bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerPaths:
    """The directories of all containers; absolute, since conmon and the OCI runtime get them.

    Attributes:
        state: records, writable layers and logs.
        run: sockets, and all else that is gone after a reboot.
        userns: mounts of containers with ids of their own.
        images, volumes: the stores.
    """

    state: Path
    run: Path
    userns: Path
    images: Path
    volumes: Path

    def bundle(self, identity: str) -> Bundle:
        """The directories of one container."""
        return Bundle(
            self.state / identity,
            self.run / identity,
            self.userns / identity,
            VolumeStore(self.volumes),
        )
