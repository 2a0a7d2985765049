"""Protobuf's wire format, as far as etcd's two large responses need it.

Job: read a message's fields from bytes.  Place: control plane; below
`meshnet.store._etcd_messages`.  Pure; may import nothing of meshnet.

The stubs of the `etcd3` package run on protobuf's pure Python implementation, which takes 12 µs a
key and leaves thousands of objects for the garbage collector to walk over: while 90,000 keys were
listed, that alone stopped the event loop for 40 ms at a time.  This takes 3 µs and leaves none.

The format (protobuf.dev/programming-guides/encoding)::

    message = { tag value }      tag = varint(field number << 3 | kind)
    kind 0    varint: seven bits a byte, the least significant ones first, 0x80: more follow
    kind 1    8 bytes
    kind 2    varint length, so many bytes: a string, or a message
    kind 5    4 bytes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_FIXED = {1: 8, 5: 4}


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """A message's fields in order: number, and an unsigned integer or bytes.

    ``dict`` of it is a message without repeated fields.

    Raises:
        ValueError: this is not a message.
    """
    at, end, kind = 0, len(data), 0
    try:
        while at < end:
            tag = data[at]
            at += 1
            if tag > 0x7F:
                tag, at = _long_varint(data, at - 1)
            kind = tag & 7
            # Most varints are of one byte: the call is worth avoiding.
            if kind == 2:
                size = data[at]
                at += 1
                if size > 0x7F:
                    size, at = _long_varint(data, at - 1)
                at += size
                yield tag >> 3, data[at - size : at]
            elif kind == 0:
                value = data[at]
                at += 1
                if value > 0x7F:
                    value, at = _long_varint(data, at - 1)
                yield tag >> 3, value
            else:
                at += _FIXED[kind]
    except LookupError as error:
        raise ValueError(f"not a protobuf message: it is cut short, or has kind {kind}") from error
    if at > end:
        raise ValueError("not a protobuf message: it is cut short")


def _long_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("not a protobuf message: a number is longer than ten bytes")
