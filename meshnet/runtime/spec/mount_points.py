"""Mount points (`volumes`) of a container: of ``-v`` and of its image's ``VOLUME``.  Pure."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshnet.errors import UsageError
from meshnet.runtime.spec.options import parse_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from meshnet.runtime.spec.options import ContainerOptions


@dataclass(frozen=True, slots=True)
class MountPoint:
    """A volume of the store (`meshnet.runtime.engine.volumes`) in a container.

    Attributes:
        anonymous: made for this container, which takes it along where that is asked for.
    """

    name: str
    destination: str
    read_only: bool = False
    anonymous: bool = False


def mount_points(
    options: ContainerOptions, declared: Iterable[str], random_name: Callable[[], str]
) -> tuple[MountPoint, ...]:
    """The volumes of the store that a container wants.

    Args:
        declared: paths of the image's ``VOLUME``; the leading slash may be missing.  What
            ``-v`` or ``--tmpfs`` mounts at the same path wins.

    Raises:
        UsageError: an image wants its root to be a volume.
    """
    given = [parse_volume(text) for text in options.volumes]
    found = [
        MountPoint(v.source or random_name(), v.destination, v.read_only, anonymous=not v.source)
        for v in given
        if not v.is_bind
    ]
    taken = {posixpath.normpath(v.destination) for v in given}
    taken |= {posixpath.normpath(text.partition(":")[0]) for text in options.tmpfs}
    for path in dict.fromkeys(posixpath.normpath("/" + text.lstrip("/")) for text in declared):
        if path == "/":
            raise UsageError(f"image {options.image} has / as a VOLUME: build it without")
        if path not in taken:
            found.append(MountPoint(random_name(), path, anonymous=True))
    return tuple(found)
