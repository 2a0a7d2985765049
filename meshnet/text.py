"""Names and addresses as people write them, and text that is fit to be shown.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

from meshnet.errors import UsageError

if TYPE_CHECKING:
    from meshnet.model import IpAddress, IpNetwork

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
"""The pattern of a name of a network, a host, an endpoint or a container."""
NAME_PATTERN = re.compile(NAME)
# IFNAMSIZ is 16 with the final NUL; the kernel refuses "." and ".." (dev_valid_name).
IFNAME_PATTERN = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9_.-]{1,15}")

OWNER_PATTERN = re.compile(r"[\x21-\x7e]{1,255}")
"""An owner key of a hold: what a front makes of its own ids, without blanks."""


def printable(text: str, most: int) -> str:
    """Text that is safe in a terminal, a log and a JSON document: cut, and escaped where needed.

    Args:
        most: characters to keep.
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most]
    )
    return shown if len(shown) <= most and len(text) <= most else f"{shown[: most - 1]}…"


def check_name(kind: str, name: str) -> None:
    """Refuse a name that could not be a key, a file name and a word on a command line.

    Raises:
        UsageError: the name contains something other than letters, digits, ``_``, ``.`` and ``-``,
            does not start with a letter or digit, or is longer than 63 characters.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise UsageError(
            f"{kind} name {name[:80]!r} is not usable: use 1 to 63 letters, digits, '_', '.' or "
            "'-', starting with a letter or digit"
        )


def check_owner(owner: str) -> None:
    """Refuse an owner key that could not be a field of a table and a word on a command line.

    Raises:
        UsageError: it is empty, too long, or has blanks or characters other than ASCII's.
    """
    if not OWNER_PATTERN.fullmatch(owner):
        raise UsageError(
            f"owner key {printable(owner, 80)!r} is not usable: use 1 to 255 characters of ASCII "
            "without blanks"
        )


def parse_network(text: str) -> IpNetwork:
    """A CIDR in text form.

    Raises:
        ValueError: not a CIDR, host bits set, or an IPv6 scope (``%eth0``) in it: the library
            takes any text for a scope.
    """
    if "%" in text:
        raise ValueError(f"{text!r} has a scope, and a network cannot have one")
    return ip_network(text)


def parse_address(text: str) -> IpAddress:
    """An address in text form.

    Raises:
        ValueError: not an address, or an IPv6 scope in it.
    """
    if "%" in text:
        raise ValueError(f"{text!r} has a scope, which cannot be used here")
    return ip_address(text)
