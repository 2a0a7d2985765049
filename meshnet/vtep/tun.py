"""The userspace VTEP's TUN, which gives and takes super-packets.

::

    routes ──► TUN ── read: virtio header + up to 64 KiB ──► process ── UDP_SEGMENT ──► underlay
    routes ◄── TUN ◄─ write ──────────────────────────────── process ◄─ UDP_GRO ─────── underlay

The TUN is *persistent*: it, its addresses and the routes through it outlive the process, and a new
one takes it up by its name.  While no process has it open it has no carrier.  **Routes through it
must then not be made with nexthop objects**: the kernel removes those, and their routes, from a
device that loses its carrier (``nexthop_flush_dev`` on ``NETDEV_CHANGE``, net/ipv4/nexthop.c),
while plain device routes only turn ``linkdown``.

Everything happens in the caller's network namespace.  linux/if_tun.h.
May import only the standard library and `meshnet.errors`: the VTEP starts within milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

from meshnet.errors import KernelRefusedError, NotFoundError
from meshnet.vtep.refusals import translate_refusal

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
        raise translate_refusal(error, f"TUN {name}") from error
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
