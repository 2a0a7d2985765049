"""Asking the wire whether an address is free: ARP probes and duplicate address detection.

Frames leave through a link of the host on the physical network, and answers arrive there.  No other
host of the mesh asks for the same address at the same time: etcd decided who may.

RFC 5227 waits up to a second, sends three probes one to two seconds apart and listens for two
more; RFC 4862 takes one second.  Those times are for hosts that all start at once and for slow
networks (RFC 5227 §1.1 calls them tunable), but a user waits for an attach.  So three probes go out
here, and each waits `_WAIT_S` for an answer: a hundred round trips of a switched network.  A
machine that answers later finds out by its own conflict detection (§2.4).

linux/if_packet.h.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Protocol

import trio

from meshnet.errors import KernelRefusedError
from meshnet.kernel.wire.bpf import (
    EVERYTHING,
    IF_EQUAL,
    LOAD_U8,
    LOAD_U32,
    RETURN,
    attach_filter,
)
from meshnet.wire import arp, nd
from meshnet.wire.icmp import ICMPV6

if TYPE_CHECKING:
    from meshnet.kernel.wire.bpf import Step
    from meshnet.model import IpAddress

_PROBES = 3
"""PROBE_NUM of RFC 5227 §1.1."""
_WAIT_S = 0.08
"""For an answer to one probe (see above)."""
_CARRIER_TRIES, _CARRIER_PAUSE_S = 20, 0.005
"""How often an announcement is tried on a link that has just gone up."""
_ARPHRD_ETHER = 1
_FRAME_BYTES = 1514
_PACKET_MREQ = struct.Struct("=iHH8s")
_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, _PACKET_MR_MULTICAST = 263, 1, 0


class AddressProber(Protocol):
    """Asks the wire."""

    async def probe(self, link: str, address: IpAddress) -> bytes | None:
        """The MAC of whoever answers for an address on a link; None: nobody does.

        Raises:
            KernelRefusedError: the link is gone, down, or not an Ethernet link.
        """
        ...


class WireProber:
    """`AddressProber` by packet sockets; the calling thread's namespace has the link."""

    async def probe(self, link: str, address: IpAddress) -> bytes | None:
        """See `AddressProber`."""
        try:
            opened = _open(link, address)
            try:
                return await _ask(trio.socket.from_stdlib_socket(opened), address)
            finally:
                # Closing a packet socket takes 12 ms: the kernel waits for all processors.  In a
                # thread, so that the event loop goes on; shielded, so that the socket is closed
                # before a cancellation leaves.
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(opened.close)
        except OSError as error:
            raise KernelRefusedError(
                f"address {address} cannot be probed on link {link}: {error}"
            ) from error


def announce(link: str, address: IPv6Address, mac: bytes) -> None:
    """Tell all nodes on a link of the calling thread's namespace that an address is here now.

    For IPv4 the kernel does this itself, if asked to (``arp_notify``).  One announcement, not
    several as RFC 4861 §7.2.6 allows: a node that missed it asks.  So none is sent on a link that
    stays without carrier, which is not an error.

    Raises:
        OSError: the link is gone or down.
    """
    index = socket.if_nametoindex(link)
    # Not by a packet socket: the kernel takes 12 ms to close one.
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, ICMPV6) as sender:
        sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, nd.HOP_LIMIT)
        sender.bind((str(address), 0))
        everybody = str(IPv6Address(nd.ALL_NODES))
        # A copy to this namespace's own kernel would have it warn of a duplicate address.
        sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
        packet = nd.encode_announcement(address, mac)
        for _ in range(_CARRIER_TRIES):
            try:
                sender.sendto(packet, (everybody, 0, 0, index))
            except OSError as error:
                # The kernel makes the route for multicast once it has seen the carrier, some time
                # after the link went up (addrconf_notify in net/ipv6/addrconf.c).
                if error.errno != errno.ENETUNREACH:
                    raise
                time.sleep(_CARRIER_PAUSE_S)
            else:
                return


async def _ask(wire: trio.socket.SocketType, address: IpAddress) -> bytes | None:
    *_, hardware, mac = wire.getsockname()
    if hardware != _ARPHRD_ETHER:
        raise OSError("it is not an Ethernet link")
    if isinstance(address, IPv4Address):
        probe = arp.encode_probe(address, mac)
    else:
        probe = nd.encode_probe(address, mac)
    for _ in range(_PROBES):
        await wire.send(probe)
        with trio.move_on_after(_WAIT_S):
            while True:
                frame = await wire.recv(_FRAME_BYTES)
                if isinstance(address, IPv4Address):
                    found = arp.find_conflict(frame, address, mac)
                else:
                    found = nd.find_conflict(frame, address, mac)
                if found is not None:
                    return found
    return None


def _open(link: str, address: IpAddress) -> socket.socket:
    """A socket that sees only what concerns the address: hundreds may be open at once."""
    # Protocol 0 receives nothing until `bind`: no frame slips in before the filter is attached.
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    try:
        if isinstance(address, IPv4Address):
            attach_filter(opened, _arp_filter(address))
            opened.bind((link, arp.ETHERTYPE))
        else:
            attach_filter(opened, _nd_filter(address))
            opened.bind((link, nd.ETHERTYPE))
            # Another node that probes the address sends to its solicited-node group; whoever has
            # it answers to all nodes (RFC 4861 §7.2.4), as a probe has no source address.
            group = nd.group_mac(nd.solicited_node(address))
            index = socket.if_nametoindex(link)
            opened.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, _membership(index, group))
            everybody = nd.group_mac(nd.ALL_NODES)
            opened.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, _membership(index, everybody))
    except BaseException:
        opened.close()
        raise
    return opened


def _membership(index: int, mac: bytes) -> bytes:
    """``struct packet_mreq``."""
    return _PACKET_MREQ.pack(index, _PACKET_MR_MULTICAST, len(mac), mac)


def _arp_filter(address: IPv4Address) -> list[Step]:
    """Packets whose sender has the address, or that ask for it."""
    number = int(address)
    return [
        (LOAD_U32, 0, 0, arp.SENDER_IP_AT),
        (IF_EQUAL, 2, 0, number),
        (LOAD_U32, 0, 0, arp.TARGET_IP_AT),
        (IF_EQUAL, 0, 1, number),
        (RETURN, 0, 0, EVERYTHING),
        (RETURN, 0, 0, 0),
    ]


def _nd_filter(address: IPv6Address) -> list[Step]:
    """Solicitations and advertisements of the address."""
    packed = address.packed
    wanted = [(LOAD_U8, nd.NEXT_HEADER_AT, ICMPV6)]
    wanted += [
        (LOAD_U32, nd.TARGET_AT + at, int.from_bytes(packed[at : at + 4], "big"))
        for at in range(0, 16, 4)
    ]
    program: list[Step] = []
    for number, (load, at, value) in enumerate(wanted):
        to_the_end = 2 * (len(wanted) - number - 1) + 1
        program += [(load, 0, 0, at), (IF_EQUAL, 0, to_the_end, value)]
    return [*program, (RETURN, 0, 0, EVERYTHING), (RETURN, 0, 0, 0)]
