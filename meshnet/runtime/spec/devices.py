"""Devices of the host in a container, ``--device SRC[:DST][:rwm]``; the words are Docker's.

Pure: who looks for the device is `meshnet_agent.containers.host_support`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from meshnet.errors import UsageError

_ACCESS = re.compile("(?=.)r?w?m?")


@dataclass(frozen=True, slots=True)
class DeviceWish:
    """What the option says.

    Attributes:
        access: of ``r``, ``w`` and ``m`` (make a node).
    """

    source: str
    destination: str
    access: str = "rwm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that is there.

    Attributes:
        kind: ``c`` or ``b``.
        mode: permissions of its node.
    """

    path: str
    kind: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    access: str


def parse_device(text: str) -> DeviceWish:
    """``/dev/fuse``, ``/dev/sda:/dev/xvda``, ``/dev/sda:r`` or ``/dev/sda:/dev/xvda:rw``.

    Raises:
        UsageError: anything else.
    """
    source, *rest = text.split(":")
    access = "rwm"
    if rest and _ACCESS.fullmatch(rest[-1]):
        access = rest.pop()
    destination = rest[0] if rest else source
    if len(rest) > 1 or not source.startswith("/") or not destination.startswith("/"):
        raise UsageError(f"device {text!r} is not usable: give /SRC[:/DST][:rwm]")
    return DeviceWish(source, destination, access)
