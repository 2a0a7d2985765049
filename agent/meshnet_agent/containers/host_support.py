"""What this host's kernel and its devices let a container have."""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError, NotFoundError
from meshnet.runtime.engine.cgroups import accounts_swap
from meshnet.runtime.spec.config import CAPABILITIES
from meshnet.runtime.spec.devices import Device, DeviceWish
from meshnet.runtime.spec.ulimits import UNLIMITED, parse_ulimit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meshnet.runtime.spec.options import ContainerOptions

_RLIMIT_LOCKS = 10
"""The one that Python has no name for (asm-generic/resource.h)."""


def find_devices(wish: DeviceWish) -> Iterator[Device]:
    """The device; of a directory all that are in it, as ``/dev/snd``.

    Raises:
        NotFoundError: there is none.
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
        raise NotFoundError(f"device {source} is no device: give the path of one")
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


def check_kernel(options: ContainerOptions) -> None:
    """Refuse what this host cannot do, before anything is made.

    Raises:
        KernelRefusedError: the message names the option.
    """
    if options.memory_swap_bytes is not None and not accounts_swap():
        raise KernelRefusedError(
            "--memory-swap needs a kernel that accounts swap, and this one has no memory.memsw.* "
            "or memory.swap.* files: boot it with swapaccount=1, or leave the option out"
        )
    for text in options.ulimits:
        wanted = parse_ulimit(text)
        _, hard = resource.getrlimit(
            getattr(resource, f"RLIMIT_{wanted.name.upper()}", _RLIMIT_LOCKS)
        )
        own = UNLIMITED if hard == resource.RLIM_INFINITY else hard
        if wanted.hard > own and not _may_raise_limits():
            raise KernelRefusedError(
                f"ulimit {text}: the agent's own hard limit is {own}, and it has no "
                f"CAP_SYS_RESOURCE to raise it: give {own} or less, or raise "
                f"Limit{wanted.name.upper()}= of its unit"
            )


def _may_raise_limits() -> bool:
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return bool(effective >> CAPABILITIES.index("CAP_SYS_RESOURCE") & 1)
