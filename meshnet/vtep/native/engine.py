"""The engine whose loop is in C (``src/engine.c``).

C carries what is usual, and returns when the caller is called or with *notes*: what is to be
counted, and packets that it does not take.  Those go to the Python engine's sender and receiver, so
that probes, ICMP answers and the reasons of drops are decided in one place for both.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError
from meshnet.vtep.engine import make_carriers
from meshnet.vtep.native.library import load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meshnet.vtep.engine import Parts
    from meshnet.vtep.peers import TunnelPeer

_FROM_TUN, _FROM_PEER, _WANTS_SOCKET, _NOT_SENT, _NOT_WRITTEN = range(1, 6)
_NOTE = struct.Struct("=IiII")
_ERROR = struct.Struct("=i")
_PEER, _ROUTE = struct.Struct("=16s6sHiI"), struct.Struct("=16sIII")
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_COUNTERS = ("rx_packets", "rx_bytes", "rx_calls", "tx_packets", "tx_bytes", "tx_calls")
_COUNTED = struct.Struct(f"={len(_COUNTERS)}Q")
_NOTHING = bytes(_COUNTED.size)


class NativeEngine:
    """See `meshnet.vtep.engine.Engine`."""

    def __init__(self, parts: Parts) -> None:
        """Make it, with the members of the table.

        Raises:
            NotFoundError: it is not built.
            KernelRefusedError: the kernel refused.
        """
        self._library = library = declare(load())
        self._parts = parts
        own = parts.table.own
        self._peers: list[TunnelPeer] = []
        self._engine = library.mn_make(
            parts.tun.fd, parts.underlay.socket.fileno(), parts.called, own.vni, own.mac,
            own.version, parts.mtu_bytes, parts.underlay.segmenting, parts.tun.uso,
        )  # fmt: skip
        if not self._engine:
            raise KernelRefusedError(f"native engine: {os.strerror(ctypes.get_errno())}")
        self._sender, self._receiver = make_carriers(parts)
        self.members_changed()

    def run(self, timeout_s: float | None) -> None:
        """See `Engine.run`."""
        timeout_ms = -1 if timeout_s is None else max(0, int(timeout_s * 1000) + 1)
        error = self._library.mn_run(self._engine, timeout_ms)
        for kind, peer, value, data in list(self._notes()):
            self._handle(kind, peer, value, data)
        if error:
            raise OSError(error, os.strerror(error), self._parts.tun.name)

    def collect(self) -> None:
        """See `Engine.collect`."""
        start, size = self._library.mn_counters(self._engine), _COUNTED.size
        counted = ctypes.string_at(start, size * len(self._peers))
        for i, peer in enumerate(self._peers):
            its = counted[i * size : (i + 1) * size]
            if its != _NOTHING:
                for name, value in zip(_COUNTERS, _COUNTED.unpack(its), strict=True):
                    setattr(peer, name, getattr(peer, name) + value)
        ctypes.memset(start, 0, len(counted))
        not_member, receive_errors = ctypes.c_uint64(), ctypes.c_uint64()
        self._library.mn_drain_drops(
            self._engine, ctypes.byref(not_member), ctypes.byref(receive_errors)
        )
        for reason, number in (("not_member", not_member), ("rx_error", receive_errors)):
            if number.value:
                self._parts.counters.drop(reason, number.value)

    def members_changed(self) -> None:
        """See `Engine.members_changed`."""
        self._sender.forget_sockets()
        self._peers = list(self._parts.table.by_underlay.values())
        peers, routes = [], []
        for i, peer in enumerate(self._peers):
            address, port = peer.address
            packed = socket.inet_pton(
                socket.AF_INET6 if ":" in address else socket.AF_INET, address
            )
            fd = self._sender.socket_of(peer)
            peers.append(_PEER.pack(packed, peer.mac, port, fd, peer.offload))
            for version, network, length in peer.subnets:
                bits = network.to_bytes(4 if version == 4 else 16, "big")
                routes.append(_ROUTE.pack(bits, version, length, i))
        error = self._library.mn_set_peers(
            self._engine, b"".join(peers), len(peers), b"".join(routes), len(routes)
        )
        if error:
            raise MemoryError(f"native engine: {len(peers)} members: {os.strerror(error)}")

    def close(self) -> None:
        """See `Engine.close`."""
        self.collect()
        self._library.mn_free(self._engine)
        self._sender.close()

    def _notes(self) -> Iterator[tuple[int, int, int, bytes]]:
        """The notes of the last run: kind, place of the peer, value, data."""
        size = ctypes.c_uint32()
        start = self._library.mn_notes(self._engine, ctypes.byref(size))
        notes, at = ctypes.string_at(start, size.value), 0
        while at < len(notes):
            kind, peer, value, length = _NOTE.unpack_from(notes, at)
            at += _NOTE.size
            yield kind, peer, value, notes[at : at + length]
            at += length

    def _handle(self, kind: int, number: int, value: int, data: bytes) -> None:
        if kind == _FROM_TUN:
            self._sender.carry_read(data)
            return
        peer = self._peers[number]
        if kind == _FROM_PEER:
            self._receiver.carry_datagram(peer, data)
        elif kind == _WANTS_SOCKET:
            fd = self._sender.socket_of(peer, make=True)
            self._library.mn_set_socket(self._engine, number, fd)
        elif kind == _NOT_SENT:
            self._sender.refused(peer, _ERROR.unpack(data)[0], value)
        elif kind == _NOT_WRITTEN:
            peer.drop("tun_refused")


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Say what the library's functions take and return; `src` has them with what they do."""
    pointer, number, unsigned = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32
    data = ctypes.c_char_p
    for name, result, arguments in (
        ("mn_make", pointer, (number, number, number, unsigned, data, number, unsigned, number,
                              number)),
        ("mn_free", None, (pointer,)),
        ("mn_run", number, (pointer, number)),
        ("mn_set_peers", number, (pointer, data, unsigned, data, unsigned)),
        ("mn_set_socket", None, (pointer, unsigned, number)),
        ("mn_counters", pointer, (pointer,)),
        ("mn_drain_drops", None, (pointer, pointer, pointer)),
        ("mn_notes", pointer, (pointer, pointer)),
    ):  # fmt: skip
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
