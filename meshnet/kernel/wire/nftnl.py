"""Elements of our nftables sets, and counters, by netlink: without a process of ``nft``.

A run of ``nft`` costs 5 to 10 ms; adding an endpoint's elements here costs a tenth of one.  Writes
go as a batch, which nf_tables accepts as a whole or not at all.

linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h; the header, and numbers in attributes, are
big-endian.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from meshnet.firewall.elements import SETS, TABLE, key_size
from meshnet.firewall.rules import COUNTERS, FAMILIES, Count
from meshnet.kernel.wire import rtnl
from meshnet.state import ElementKey
from meshnet.tables import Failure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from meshnet.kernel.wire.rtnl import Body
    from meshnet.tables import Op

NETLINK_NETFILTER = 12
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_SUBSYS_NFTABLES = 16, 17, 10
NFT_MSG_NEWSETELEM, NFT_MSG_GETSETELEM, NFT_MSG_DELSETELEM = 12, 13, 14
NFT_MSG_NEWOBJ, NFT_MSG_GETOBJ = 18, 19
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_DATA, NFTA_SET_ELEM_FLAGS = 1, 1, 2, 3
NFTA_DATA_VALUE, NFT_SET_ELEM_CATCHALL = 1, 2
NFTA_OBJ_TABLE, NFTA_OBJ_NAME, NFTA_OBJ_TYPE, NFTA_OBJ_DATA = 1, 2, 3, 4
NFT_OBJECT_COUNTER, NFTA_COUNTER_BYTES, NFTA_COUNTER_PACKETS = 1, 1, 2
_NFGENMSG = struct.Struct(">BBH")  # family, version, resource (of a batch: the subsystem)
_FAMILIES = {"inet": 1, "bridge": 7}


def _kind(message: int) -> int:
    return NFNL_SUBSYS_NFTABLES << 8 | message


def _head(family: str, table_attribute: int) -> bytes:
    """The beginning of every message: header and table."""
    name = rtnl.attr(table_attribute, TABLE.encode() + b"\0")
    return _NFGENMSG.pack(_FAMILIES[family], 0, 0) + name


_SET_HEADS = {
    name: _head(named.family, NFTA_SET_ELEM_LIST_TABLE)
    + rtnl.attr(NFTA_SET_ELEM_LIST_SET, name.encode() + b"\0")
    for name, named in SETS.items()
}
_SIZES = {name: (key_size(named.key), key_size(named.value)) for name, named in SETS.items()}


def encode_element(op: Op) -> list[rtnl.Request]:
    """Add or delete an element; a changed value takes both, since elements cannot be replaced.

    An empty key is the catch-all ("*"), an element that only others make, and that we delete.
    """
    set_name, key = op.key
    if key:
        element = rtnl.nested_attr(NFTA_SET_ELEM_KEY, rtnl.attr(NFTA_DATA_VALUE, key))
    else:
        element = rtnl.attr(NFTA_SET_ELEM_FLAGS, NFT_SET_ELEM_CATCHALL.to_bytes(4, "big"))
    requests = []
    if op.exists:
        requests.append(_element_request(NFT_MSG_DELSETELEM, 0, set_name, element))
    if op.value is not None:
        if op.value:
            element += rtnl.nested_attr(NFTA_SET_ELEM_DATA, rtnl.attr(NFTA_DATA_VALUE, op.value))
        requests.append(_element_request(NFT_MSG_NEWSETELEM, rtnl.NLM_F_CREATE, set_name, element))
    return requests


def _element_request(message: int, flags: int, set_name: str, element: bytes) -> rtnl.Request:
    elements = rtnl.nested_attr(
        NFTA_SET_ELEM_LIST_ELEMENTS, rtnl.nested_attr(NFTA_LIST_ELEM, element)
    )
    return rtnl.Request(_kind(message), flags, _SET_HEADS[set_name] + elements)


def decode_elements(set_name: str, bodies: Sequence[Body]) -> dict[ElementKey, bytes]:
    """The elements in a dump of a set."""
    key_bytes, value_bytes = _SIZES[set_name]
    found = {}
    for data, start, end in bodies:
        for kind, first, last in _attributes(data, start + _NFGENMSG.size, end):
            if kind != NFTA_SET_ELEM_LIST_ELEMENTS:
                continue
            for _, begin, stop in _attributes(data, first, last):
                element = rtnl.parse_attrs(data, begin, stop)
                # Both are nested: 4 bytes of attribute header, then NFTA_DATA_VALUE's payload.
                key = element.get(NFTA_SET_ELEM_KEY, b"")[4 : 4 + key_bytes]
                value = element.get(NFTA_SET_ELEM_DATA, b"")[4 : 4 + value_bytes]
                found[ElementKey(set_name, key)] = value
    return found


def _attributes(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Attributes, possibly several of one type: type, start and end of the payload."""
    while start + 4 <= end:
        length, kind = rtnl.ATTR_HEADER.unpack_from(data, start)
        if length < 4 or start + length > end:
            return
        yield kind & 0x3FFF, start + 4, start + length
        start += (length + 3) & ~3


def decode_counters(bodies: Sequence[Body]) -> dict[str, Count]:
    """The counters in a dump of a table's objects, by name."""
    found = {}
    for data, start, end in bodies:
        attrs = rtnl.parse_attrs(data, start + _NFGENMSG.size, end)
        counted = attrs.get(NFTA_OBJ_DATA, b"")
        numbers = rtnl.parse_attrs(counted, 0, len(counted))
        name = attrs.get(NFTA_OBJ_NAME, b"").rstrip(b"\0").decode(errors="replace")
        if name in COUNTERS:
            found[name] = Count(
                int.from_bytes(numbers.get(NFTA_COUNTER_PACKETS, b""), "big"),
                int.from_bytes(numbers.get(NFTA_COUNTER_BYTES, b""), "big"),
            )
    return found


class NftSocket:
    """A NETLINK_NETFILTER socket of the calling thread's network namespace."""

    def __init__(self) -> None:
        self._netlink = rtnl.RtnlSocket(protocol=NETLINK_NETFILTER)

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    @property
    def port_id(self) -> int:
        """The socket's netlink address: the sender in notifications of what it writes."""
        return self._netlink.port_id

    def write_elements(self, ops: Sequence[Op]) -> list[Failure]:
        """Write elements, all in one batch.

        A refusal undoes the whole batch, so the rest is tried again without the refused ones.

        Returns:
            The operations that were refused.
        """
        failures: list[Failure] = []
        left = list(ops)
        while left:
            refused = self._write_batch(left)
            failures += refused.values()
            if not refused:
                break
            left = [op for i, op in enumerate(left) if i not in refused]
        return failures

    def _write_batch(self, ops: Sequence[Op]) -> dict[int, Failure]:
        """Write one batch; returns failures by the operation's index: with any, nothing is done."""
        requests, owners = [], []
        for i, op in enumerate(ops):
            for request in encode_element(op):
                requests.append(request)
                owners.append(i)
        body = _NFGENMSG.pack(0, 0, NFNL_SUBSYS_NFTABLES)
        errors = self._netlink.transact(
            rtnl.Request(NFNL_MSG_BATCH_BEGIN, 0, body),
            requests,
            rtnl.Request(NFNL_MSG_BATCH_END, 0, body),
        )
        if -1 in errors:  # the batch as a whole
            return {i: Failure(op, errors[-1].errno, str(errors[-1])) for i, op in enumerate(ops)}
        return {
            owners[n]: Failure(ops[owners[n]], error.errno, str(error))
            for n, error in errors.items()
        }

    def dump_elements(self) -> dict[ElementKey, bytes]:
        """The elements of all our sets that exist."""
        found: dict[ElementKey, bytes] = {}
        for name, head in _SET_HEADS.items():
            bodies = self._dump(NFT_MSG_GETSETELEM, NFT_MSG_NEWSETELEM, head)
            found |= decode_elements(name, bodies)
        return found

    def dump_counters(self) -> dict[str, Count]:
        """What our counters have counted, by name; those that do not exist are missing."""
        found: dict[str, Count] = {}
        for family in FAMILIES:
            body = _head(family, NFTA_OBJ_TABLE)
            body += rtnl.attr(NFTA_OBJ_TYPE, NFT_OBJECT_COUNTER.to_bytes(4, "big"))
            found |= decode_counters(self._dump(NFT_MSG_GETOBJ, NFT_MSG_NEWOBJ, body))
        return found

    def _dump(self, message: int, answer: int, body: bytes) -> list[Body]:
        try:
            return self._netlink.dump(_kind(message), body, answer=_kind(answer))
        except OSError as error:
            if error.errno == errno.ENOENT:  # no such table or set
                return []
            raise
