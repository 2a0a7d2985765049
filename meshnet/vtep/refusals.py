"""What the kernel's refusals of a TUN or a socket mean for people."""

from __future__ import annotations

import errno
import os

from meshnet.errors import ConflictError, KernelRefusedError, PolicyRefusedError


def translate_refusal(
    error: OSError, what: str
) -> ConflictError | PolicyRefusedError | KernelRefusedError:
    """The error of meshnet that an error of the kernel is.

    Args:
        what: what was asked for, as the message names it.
    """
    if error.errno in (errno.EBUSY, errno.EADDRINUSE):
        return ConflictError(f"{what} is in use by another process or device")
    if error.errno in (errno.EPERM, errno.EACCES):
        return PolicyRefusedError(f"{what} needs root (CAP_NET_ADMIN)")
    if error.errno == errno.EINVAL:
        return ConflictError(f"{what} exists and is another kind of device: remove or rename it")
    return KernelRefusedError(f"{what}: {os.strerror(error.errno or 0)}")
