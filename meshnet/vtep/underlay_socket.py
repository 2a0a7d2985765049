"""The userspace VTEP's UDP sockets: one that is bound, and one connected to each of a few peers.

Everything happens in the caller's network namespace.  linux/udp.h, linux/in.h.  May import only the
standard library, `meshnet.errors` and `meshnet.vtep`: the VTEP starts within milliseconds.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct

from meshnet.errors import NotFoundError
from meshnet.vtep.refusals import translate_refusal

SOL_UDP = socket.IPPROTO_UDP
UDP_SEGMENT = 103
UDP_GRO = 104
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER = 10, 23
_PMTUDISC_OMIT = 5
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER_BYTES = 8 << 20
_SEND_TIMEOUT_S = 0.1


class UnderlaySocket:
    """The UDP socket that tunnel packets come in by and leave by; the caller closes it.

    Attributes:
        local: the address it is bound to.
        segmenting: whether the kernel takes ``UDP_SEGMENT`` (4.18).
        receiving_trains: whether it hands over ``UDP_GRO`` (5.0).
    """

    __slots__ = ("local", "receiving_trains", "segmenting", "socket")

    def __init__(
        self, socket_: socket.socket, local: str, *, segmenting: bool, trains: bool
    ) -> None:
        self.socket, self.local = socket_, local
        self.segmenting, self.receiving_trains = segmenting, trains


def connect_underlay(local: str, address: tuple[str, int]) -> socket.socket:
    """A socket to send to one peer with: the kernel looks the way up once, not for each packet.

    Its source port is the kernel's choice, another one for each peer, so that the underlay can
    spread peers over paths (RFC 7348 §5); what peers send comes to the bound socket alone.

    Raises:
        OSError: there is no way to the peer.
    """
    made = _make_socket(local)
    try:
        made.bind((local, 0))
        made.connect(address)
    except OSError:
        made.close()
        raise
    return made


def open_underlay(local: str, port: int) -> UnderlaySocket:
    """Bind to the underlay address.

    - Blocking, because a full send buffer is to slow the TUN's reader down; for at most 0.1 s, so
      that a stuck card does not stop the process.  Reads are to say ``MSG_DONTWAIT``.
    - Outer checksums are the kernel's default, on: a card computes them, and they are what protects
      inner packets with an unfinished checksum.
    - Don't-fragment is off, as for a kernel VXLAN device (``df unset``): the overlay's MTU is made
      to fit, and a path that is narrower than anybody knew fragments instead of losing all.
      ``PMTUDISC_OMIT`` also lets no forged ICMP message shrink the path.

    Raises:
        ConflictError: another socket, such as a kernel VXLAN device, has the port.
        NotFoundError: no link has the address.
        KernelRefusedError: anything else.
    """
    made = _make_socket(local)
    try:
        segmenting = _accepts(made, UDP_SEGMENT, 0)
        trains = _accepts(made, UDP_GRO, 1)
        made.bind((local, port))
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise NotFoundError(f"underlay address {local} is on no link of this host") from error
        raise translate_refusal(error, f"UDP {local} port {port}") from error
    return UnderlaySocket(made, local, segmenting=segmenting, trains=trains)


def _make_socket(local: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in local else socket.AF_INET
    made = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        with contextlib.suppress(PermissionError):
            made.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    timeout = struct.pack("ll", 0, int(_SEND_TIMEOUT_S * 1e6))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_OMIT)
    else:
        made.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_OMIT)
    return made


def _accepts(made: socket.socket, option: int, value: int) -> bool:
    try:
        made.setsockopt(SOL_UDP, option, value)
    except OSError:
        return False
    return True
