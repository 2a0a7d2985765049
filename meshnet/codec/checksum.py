"""The checksum of a record on disk: the last field of its JSON object, so that damage is noticed.

Versions before it ignore the field.  Their records have none and are accepted as they are.
"""

from __future__ import annotations

import re
import zlib

from meshnet.codec.document import BadValueError

_CHECKSUM = re.compile(rb',"crc32":"([0-9a-f]{8})"}\Z')


def with_checksum(record: bytes) -> bytes:
    """The record with its checksum (CRC-32 of all bytes before the field) as the last field."""
    body = record.removesuffix(b"}")
    return body + b',"crc32":"%08x"}' % zlib.crc32(body)


def checked(record: bytes, *, required: bool = False) -> bytes:
    """The record, unchanged, if its checksum is right or it has none.

    Args:
        required: this kind of record always had one.

    Raises:
        BadValueError: the checksum is wrong, damaged or missing.
    """
    found = _CHECKSUM.search(record)
    # A damaged field must not make the record look like one of an earlier version.
    if found is None and (required or b'"crc32":' in record):
        raise BadValueError("its checksum is damaged")
    if found is not None and int(found[1], 16) != zlib.crc32(record[: found.start()]):
        raise BadValueError("its checksum does not match its content")
    return record
