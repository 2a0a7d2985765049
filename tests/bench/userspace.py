"""The userspace VTEP between the hosts made by hand: with itself, and with the kernel's VXLAN.

    udp            python -m meshnet.vtep ─ python -m meshnet.vtep
    kernel ↔ udp   a kernel VXLAN device with `ip` ─ python -m meshnet.vtep

All that is assumed about the program is in `_vtep_argv` and `_is_there`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING

from meshnet.state import format_mac
from meshnet.wire.mac import vtep_mac
from tests.bench.native import NotAvailableError
from tests.bench.tunnels import MTU_BYTES, plain_route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.tunnels import End

_MODULE = "meshnet.vtep"
_VNI = 44
_UDP_PORT, _MIXED_PORT = 8472, 8473  # 4789 is the hand-made VXLAN's on the same hosts


class Udp:
    """Two userspace VTEPs."""

    name = "udp"
    mtu_bytes = MTU_BYTES

    def start(self, ends: tuple[End, End]) -> Sequence[int]:
        """See `tests.bench.tunnels.Tunnel`."""
        _require()
        return [_start_vtep(end, peer, _UDP_PORT) for end, peer in (ends, ends[::-1])]

    def route(self, end: End, peer: End) -> Sequence[str]:
        """See `tests.bench.tunnels.Tunnel`."""
        return plain_route(end, peer)


class Mixed:
    """The kernel's VXLAN on the first host, a userspace VTEP on the second."""

    name = "kernel ↔ udp"
    mtu_bytes = MTU_BYTES

    def start(self, ends: tuple[End, End]) -> Sequence[int]:
        """See `tests.bench.tunnels.Tunnel`."""
        _require()
        kernel, userspace = ends
        _make_device(kernel, userspace, _MIXED_PORT)
        return [_start_vtep(userspace, kernel, _MIXED_PORT)]

    def route(self, end: End, peer: End) -> Sequence[str]:
        """See `tests.bench.tunnels.Tunnel`."""
        return _onlink_route(end, peer) if end.number == 1 else plain_route(end, peer)


def _make_device(end: End, peer: End, port: int) -> None:
    """Make a kernel VXLAN device that knows its one peer."""
    commands = (
        f"ip link add {end.device} address {_mac(end)} type vxlan id {_VNI} "
        f"local {end.underlay_ip} dstport {port} nolearning",
        f"bridge fdb add {_mac(peer)} dev {end.device} dst {peer.underlay_ip} self",
    )
    for command in commands:
        end.host.run(command.split())


def _onlink_route(end: End, peer: End) -> list[str]:
    """The commands for a route through a device with link-layer addresses."""
    far = peer.subnet.network_address
    return [
        f"neighbour add {far} lladdr {_mac(peer)} dev {end.device} nud permanent",
        f"route add {peer.subnet} via {far} dev {end.device} onlink src {end.gateway}",
    ]


def _mac(end: End) -> str:
    return format_mac(vtep_mac(end.subnet))


def _require() -> None:
    if not _is_there():
        raise NotAvailableError(f"there is no {_MODULE} yet")


def _is_there() -> bool:
    return importlib.util.find_spec(_MODULE) is not None


def _start_vtep(end: End, peer: End, port: int) -> int:
    argv = _vtep_argv(end, peer, port)
    return end.host.popen(argv, stdout=subprocess.DEVNULL).pid


def _vtep_argv(end: End, peer: End, port: int) -> list[str]:
    """The command of one VTEP that makes its device, for one peer."""
    return [
        *(sys.executable, "-m", _MODULE),
        *("--device", end.device),
        *("--vni", str(_VNI)),
        *("--local", str(end.underlay_ip)),
        *("--port", str(port)),
        *("--subnet", str(end.subnet)),
        *("--peer", f"{peer.subnet}={peer.underlay_ip}"),
    ]
