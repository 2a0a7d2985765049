"""What the userspace VTEP has open: a TUN that gives and takes super-packets, and a UDP socket.

::

    routes ──► TUN ── read: virtio header + up to 64 KiB ──► process ── UDP_SEGMENT ──► underlay
    routes ◄── TUN ◄─ write ──────────────────────────────── process ◄─ UDP_GRO ─────── underlay

The TUN is *persistent*: it, its addresses and the routes through it outlive the process, and a new
one takes it up by its name.  While no process has it open it has no carrier.  **Routes through it
must then not be made with nexthop objects**: the kernel removes those, and their routes, from a
device that loses its carrier (``nexthop_flush_dev`` on ``NETDEV_CHANGE``, net/ipv4/nexthop.c),
while plain device routes only turn ``linkdown``.

Everything happens in the caller's network namespace.  linux/if_tun.h, linux/udp.h, linux/in.h.
May import only the standard library and `meshnet.errors`: the VTEP starts within milliseconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct

from meshnet.errors import ConflictError, KernelRefusedError, NotFoundError, PolicyRefusedError

DEVICE = "/dev/net/tun"

_TUNSETIFF = 0x4004_54CA
_TUNSETPERSIST = 0x4004_54CB
_TUNSETOFFLOAD = 0x4004_54D0
_TUNSETVNETHDRSZ = 0x4004_54D8
_SIOCSIFMTU, _SIOCGIFMTU = 0x8922, 0x8921
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 0x1
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000

_F_CSUM, _F_TSO4, _F_TSO6, _F_TSO_ECN, _F_USO4, _F_USO6 = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40
_OFFLOADS = (
    # TUN takes USO from Linux 6.2 on, and both or none.
    _F_CSUM | _F_TSO4 | _F_TSO6 | _F_TSO_ECN | _F_USO4 | _F_USO6,
    _F_CSUM | _F_TSO4 | _F_TSO6 | _F_TSO_ECN,
    _F_CSUM,
    0,
)

SOL_UDP = socket.IPPROTO_UDP
UDP_SEGMENT = 103
UDP_GRO = 104
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER = 10, 23
_PMTUDISC_OMIT = 5
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER_BYTES = 8 << 20
_SEND_TIMEOUT_S = 0.1


class Tun:
    """A TUN that is open; the caller closes `fd`.

    Attributes:
        fd: non-blocking; one read or write is a 10-byte virtio header and an IP packet.
        uso: whether UDP super-packets are given and taken (Linux 6.2).
    """

    __slots__ = ("fd", "name", "uso")

    def __init__(self, fd: int, name: str, *, uso: bool) -> None:
        self.fd, self.name, self.uso = fd, name, uso


def open_tun(name: str) -> Tun:
    """Take up the persistent TUN of that name, or make it.

    Raises:
        NotFoundError: this kernel has no TUN.
        ConflictError: another process has it open, or the name is another kind of device's.
        PolicyRefusedError: not root, or no CAP_NET_ADMIN.
        KernelRefusedError: anything else.
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NotFoundError(
            f"{DEVICE} cannot be opened ({error.strerror}): load the kernel's module 'tun', and "
            "give a container this device"
        ) from error
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", 10))
        for offloads in _OFFLOADS:
            with contextlib.suppress(OSError):
                fcntl.ioctl(fd, _TUNSETOFFLOAD, offloads)
                break
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    except OSError as error:
        os.close(fd)
        raise _translated(error, f"TUN {name}") from error
    return Tun(fd, name, uso=bool(offloads & _F_USO4))


def bring_up(name: str, mtu_bytes: int) -> None:
    """Set a link's MTU and bring it up, where it is not so already.

    Raises:
        KernelRefusedError: the kernel refused.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            request = struct.pack("16si20x", name.encode(), 0)
            found = struct.unpack_from("i", fcntl.ioctl(any_socket, _SIOCGIFMTU, request), 16)
            if found[0] != mtu_bytes:
                request = struct.pack("16si20x", name.encode(), mtu_bytes)
                fcntl.ioctl(any_socket, _SIOCSIFMTU, request)
            request = struct.pack("16sh22x", name.encode(), 0)
            flags = struct.unpack_from("h", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request), 16)[0]
            if not flags & _IFF_UP:
                request = struct.pack("16sh22x", name.encode(), flags | _IFF_UP)
                fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)
        except OSError as error:
            raise KernelRefusedError(
                f"link {name} with MTU {mtu_bytes}: {error.strerror}"
            ) from error


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
        raise _translated(error, f"UDP {local} port {port}") from error
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


def _translated(
    error: OSError, what: str
) -> ConflictError | PolicyRefusedError | KernelRefusedError:
    if error.errno in (errno.EBUSY, errno.EADDRINUSE):
        return ConflictError(f"{what} is in use by another process or device")
    if error.errno in (errno.EPERM, errno.EACCES):
        return PolicyRefusedError(f"{what} needs root (CAP_NET_ADMIN)")
    if error.errno == errno.EINVAL:
        return ConflictError(f"{what} exists and is another kind of device: remove or rename it")
    return KernelRefusedError(f"{what}: {os.strerror(error.errno or 0)}")
