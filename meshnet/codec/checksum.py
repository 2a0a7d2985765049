"""The last field of a record on disk, a JSON object: by it no damage is believed.

A version without it passes over it; a record without it, of such a version, is taken as it is.
"""

from __future__ import annotations

import re
import zlib

from meshnet.codec.document import BadValueError

_CHECKSUM = re.compile(rb',"crc32":"([0-9a-f]{8})"}\Z')


def with_checksum(record: bytes) -> bytes:
    """A record with a last field by which `checked` knows it."""
    body = record.removesuffix(b"}")
    return body + b',"crc32":"%08x"}' % zlib.crc32(body)


def checked(record: bytes) -> bytes:
    """A record, if it is as it was written.

    Raises:
        BadValueError: it is not.
    """
    found = _CHECKSUM.search(record)
    if found is None and b'"crc32":' in record:
        raise BadValueError("its checksum is damaged")
    if found is not None and int(found[1], 16) != zlib.crc32(record[: found.start()]):
        raise BadValueError("its checksum is of another content")
    return record
