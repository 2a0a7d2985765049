"""Mounts a container's root: the layers of its image below one writable layer of its own.

Layers are shared by all containers of all images that have them: the page cache holds their bytes
once.  What a container changes is copied up into its writable layer.
Source: Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError, NotFoundError
from meshnet.system import libc
from meshnet.system.proc import mounts

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_OPTIONS_BYTES = os.sysconf("SC_PAGE_SIZE") - 1
"""mount(2) takes a page of options."""


def mount_overlay(lowerdirs: Sequence[Path], upper: Path, work: Path, target: Path) -> None:
    """Mount layers, the uppermost first, below the writable layer `upper`.

    Args:
        work: an empty directory on the file system of `upper`, for the kernel.

    Raises:
        NotFoundError: there is no layer, or one is missing.
        KernelRefusedError: the kernel refused.
    """
    if not lowerdirs:
        raise NotFoundError("the image has no layer to mount: choose an image that has one")
    with ExitStack() as stack:
        lower = list(map(str, lowerdirs))
        options = _options(lower, upper, work)
        if len(options) > _MAX_OPTIONS_BYTES:
            # Many layers: the kernel looks their short names up while it mounts, and never again.
            lower = [f"/proc/self/fd/{_open(path, stack)}" for path in lower]
            options = _options(lower, upper, work)
        try:
            libc.mount("overlay", target, "overlay", 0, options)
        except OSError as error:
            raise KernelRefusedError(
                f"{len(lower)} layers cannot be mounted on {target}: {error.strerror}; the "
                "kernel's log says more"
            ) from error


def unmount(target: Path) -> None:
    """Take a mount away, at once also where files of it are open.

    Raises:
        KernelRefusedError: nothing is mounted there, or the kernel refused.
    """
    try:
        libc.umount(target, libc.MNT_DETACH)
    except OSError as error:
        raise KernelRefusedError(f"{target} stays mounted: {error.strerror}") from error


def mounts_below(directory: Path) -> list[Path]:
    """Where something is mounted in a directory or on it, in the order in which it was done."""
    place = os.path.realpath(directory)
    found = [mount.point for mount in mounts()]
    return [Path(path) for path in found if path == place or path.startswith(f"{place}/")]


def _options(lower: Sequence[str], upper: Path, work: Path) -> bytes:
    layers = ":".join(map(_escaped, lower))
    return os.fsencode(
        f"lowerdir={layers},upperdir={_escaped(str(upper))},workdir={_escaped(str(work))}"
    )


def _escaped(path: str) -> str:
    """Overlayfs splits its options at commas, and layers at colons."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def _open(path: str, stack: ExitStack) -> int:
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFoundError(f"layer {path} is missing: load the image again") from error
    stack.callback(os.close, fd)
    return fd
