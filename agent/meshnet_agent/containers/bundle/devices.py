"""Looks up in /dev the devices of the host that a container wants."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import NotFoundError
from meshnet.runtime.spec.devices import Device, DeviceWish

if TYPE_CHECKING:
    from collections.abc import Iterator


def find_devices(wish: DeviceWish) -> Iterator[Device]:
    """The device; for a directory, such as ``/dev/snd``, all devices in it.

    Raises:
        NotFoundError: there is no such device.
    """
    source = Path(wish.source)
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if not p.is_symlink()):
            if path.is_char_device() or path.is_block_device():
                place = str(Path(wish.destination, path.relative_to(source)))
                yield from find_devices(DeviceWish(str(path), place, wish.access))
        return
    try:
        status = os.stat(source)
    except OSError as error:
        raise NotFoundError(f"device {source} does not exist on this host: {error}") from error
    if not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise NotFoundError(f"{source} is not a device: give the path of one, such as /dev/fuse")
    yield Device(
        path=wish.destination,
        kind="c" if stat.S_ISCHR(status.st_mode) else "b",
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        access=wish.access,
    )
