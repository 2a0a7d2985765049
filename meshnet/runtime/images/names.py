"""The lines of the store's index: which name is which image.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from meshnet.errors import NotFoundError, UsageError
from meshnet.runtime.images import oci
from meshnet.runtime.images.oci import BadImageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.runtime.images.oci import Descriptor, Digest

_ID = re.compile(r"(?:sha256:)?([0-9a-f]{4,64})")


class Entry(NamedTuple):
    """A line of the index: an image by one of its names; no name: it has none."""

    id: Digest
    manifest: Descriptor
    name: str


def find(entries: list[Entry], text: str) -> list[Entry]:
    """All entries of the image that `text` means, the one with that name first.

    Raises:
        NotFoundError: there is none.
        UsageError: several ids begin like that, or it is not a name.
    """
    name = canonical(text)
    found = [e for e in entries if e.name == name]
    match = _ID.fullmatch(text)
    if not found and match:
        found = [e for e in entries if hex_of(e.id).startswith(match[1])]
        if len({e.id for e in found}) > 1:
            raise UsageError(f"image id {text} is the beginning of several: give more digits")
    if not found:
        if name is None and not match:
            oci.parse_reference(text)  # says what is wrong with it
        raise NotFoundError(f"image {text} is not on this host: meshnet image ls lists them")
    return [*found, *(e for e in entries if e.id == found[0].id and e not in found)]


def canonical(text: str) -> str | None:
    """A name in full; None: it is none."""
    try:
        return str(oci.parse_reference(text))
    except BadImageError:
        return None


def tidied(entries: Iterable[Entry]) -> list[Entry]:
    """The last one who took a name has it; an image without one keeps an entry all the same."""
    entries = list(entries)
    by_name = {e.name: e for e in entries if e.name}
    named = {e.id for e in by_name.values()}
    nameless = {e.id: e._replace(name="") for e in entries if e.id not in named}
    return [*by_name.values(), *nameless.values()]


def hex_of(digest: Digest) -> str:
    """A digest as a file's name."""
    return digest.removeprefix("sha256:")


def short(digest: Digest) -> str:
    """A digest for people."""
    return hex_of(digest)[:12]
