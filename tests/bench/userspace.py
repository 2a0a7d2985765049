"""The userspace VTEP between the hosts made by hand: with itself, and with the kernel's VXLAN.

    udp            python -m meshnet.vtep ─ python -m meshnet.vtep
    udp native     the same with the engine in C
    kernel ↔ udp   a kernel VXLAN device with `ip` ─ python -m meshnet.vtep

Started, and told of its peer, as the agent does it (`meshnet.kernel.vteps`); and as attached by it,
containers behind a userspace VTEP send no larger super-packets than fit one send.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from meshnet.errors import MeshnetError
from meshnet.kernel.vteps import VtepProcesses
from meshnet.lab.poll import wait_until
from meshnet.state import Member, MemberKey, Vxlan, format_mac
from meshnet.tables import Op, Table
from meshnet.vtep.native import library
from meshnet.wire.mac import vtep_mac
from meshnet.wire.mtu import gso_max_bytes
from tests.bench.native import NotAvailableError
from tests.bench.tunnels import MTU_BYTES, plain_route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.tunnels import End

_VNI = 44
_UDP_PORT, _MIXED_PORT = 8472, 8473  # 4789 is the hand-made VXLAN's on the same hosts
_READY_S = 10.0


class Udp:
    """Two userspace VTEPs.

    Args:
        engine: what carries their packets.
    """

    mtu_bytes = MTU_BYTES

    def __init__(self, name: str = "udp", engine: str = "python", port: int = _UDP_PORT) -> None:
        self.name, self._engine, self._port = name, engine, port

    def start(self, ends: tuple[End, End]) -> Sequence[int]:
        """See `tests.bench.tunnels.Tunnel`."""
        if self._engine == "native":
            try:
                library.build()
            except MeshnetError as exc:
                raise NotAvailableError(str(exc)) from exc
        return [
            _start_vtep(end, peer, self._port, self._engine, offload=True)
            for end, peer in (ends, ends[::-1])
        ]

    def route(self, end: End, peer: End) -> Sequence[str]:
        """See `tests.bench.tunnels.Tunnel`."""
        return plain_route(end, peer)


class Mixed:
    """The kernel's VXLAN on the first host, a userspace VTEP on the second."""

    name = "kernel ↔ udp"
    mtu_bytes = MTU_BYTES

    def start(self, ends: tuple[End, End]) -> Sequence[int]:
        """See `tests.bench.tunnels.Tunnel`."""
        kernel, userspace = ends
        _make_device(kernel, userspace, _MIXED_PORT)
        return [_start_vtep(userspace, kernel, _MIXED_PORT, "python", offload=False)]

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


def _start_vtep(end: End, peer: End, port: int, engine: str, *, offload: bool) -> int:
    """Start one that makes its device, and tell it of its one peer; returns the process's id.

    Args:
        offload: whether the peer takes unfinished checksums.
    """
    vteps = VtepProcesses(end.directory, engine)
    vxlan = Vxlan(_VNI, port, end.underlay_ip.packed)
    argv, log_path = vteps.prepare(end.device, vxlan, vtep_mac(end.subnet), MTU_BYTES)
    with log_path.open("w") as log:
        pid = end.host.popen(argv, stdout=subprocess.DEVNULL, stderr=log).pid
    try:
        wait_until(lambda: vteps.look(end.device) is not None, _READY_S, "the VTEP")
    except TimeoutError as exc:
        raise NotAvailableError(f"meshnet.vtep: {log_path.read_text().strip()[-200:]}") from exc
    subnet = (peer.subnet.network_address.packed, peer.subnet.prefixlen)
    key = MemberKey(end.device, peer.underlay_ip.packed)
    member = Member(vtep_mac(peer.subnet), (subnet,), port, offload)
    vteps.update(end.device, [Op(Table.MEMBER, key, member, exists=False)])
    limit = str(gso_max_bytes(MTU_BYTES))
    end.container.run(["ip", "link", "set", end.container_link, "gso_max_size", limit])
    return pid
