"""Userspace tunnels to compare with: a relay of our own, and what Debian has.

relay         ``relay.c``: one packet a system call, as flannel's udp backend
fastd         Debian's fastd, method ``null``: authenticated peers, packets in the clear
wireguard-go  Debian's wireguard-go: encrypts, so it does more for a packet than the others
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from tests.bench.native import compile_program, find
from tests.bench.tunnels import MTU_BYTES, plain_route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.tunnels import End

_FASTD_PORT, _WIREGUARD_PORT = 10_000, 51_820
_WIREGUARD_OVERHEAD_BYTES = 60  # over IPv4: IP 20, UDP 8, WireGuard 32
_UNDERLAY_MTU_BYTES = 1500
_WIREGUARD_DIR = Path("/var/run/wireguard")  # one for the machine: hence device names unique on it


class Relay:
    """The C relay.

    Args:
        name: of the path.
        port: on both hosts.
        receive_buffer_bytes: None: the kernel's default, which flannel's has.
    """

    mtu_bytes = MTU_BYTES

    def __init__(
        self, name: str = "relay", port: int = 8285, receive_buffer_bytes: int | None = None
    ) -> None:
        self.name, self._port = name, port
        self._more = [] if receive_buffer_bytes is None else [str(receive_buffer_bytes)]

    def start(self, ends: tuple[End, End]) -> Sequence[int]:
        """See `tests.bench.tunnels.Tunnel`."""
        program = str(compile_program("relay", ends[0].directory))
        pids = []
        for end, peer in (ends, ends[::-1]):
            addresses = [str(end.underlay_ip), str(peer.underlay_ip)]
            argv = [program, end.device, *addresses, str(self._port), *self._more]
            pids.append(end.host.popen(argv, stdout=subprocess.DEVNULL).pid)
        return pids

    def route(self, end: End, peer: End) -> Sequence[str]:
        """See `tests.bench.tunnels.Tunnel`."""
        return plain_route(end, peer)


class Fastd:
    """Debian's fastd, without encryption."""

    name = "fastd"
    mtu_bytes = MTU_BYTES

    def start(self, ends: tuple[End, End]) -> Sequence[int]:
        """See `tests.bench.tunnels.Tunnel`."""
        program = find("fastd")
        keys = [_fastd_keys(program), _fastd_keys(program)]
        pids = []
        for i in (0, 1):
            end, peer, own, other = ends[i], ends[1 - i], keys[i], keys[1 - i]
            config = end.directory / f"fastd{end.number}.conf"
            config.write_text(
                f'log level error;\nmode tun;\ninterface "{end.device}";\nmtu {self.mtu_bytes};\n'
                f'method "null";\nbind {end.underlay_ip}:{_FASTD_PORT};\nsecret "{own[0]}";\n'
                f'peer "peer" {{\n  key "{other[1]}";\n'
                f"  remote {peer.underlay_ip} port {_FASTD_PORT};\n}}\n"
            )
            argv = [program, "--config", str(config)]
            pids.append(end.host.popen(argv, stdout=subprocess.DEVNULL).pid)
        return pids

    def route(self, end: End, peer: End) -> Sequence[str]:
        """See `tests.bench.tunnels.Tunnel`."""
        return plain_route(end, peer)


class WireguardGo:
    """Debian's wireguard-go, set up with wg(8)."""

    name = "wireguard-go"
    mtu_bytes = _UNDERLAY_MTU_BYTES - _WIREGUARD_OVERHEAD_BYTES

    def start(self, ends: tuple[End, End]) -> Sequence[int]:
        """See `tests.bench.tunnels.Tunnel`."""
        program, wg = find("wireguard-go"), find("wg")
        pids = []
        for end in ends:
            argv = [program, "--foreground", end.device]
            child = end.host.popen(argv, stdout=subprocess.DEVNULL, env={"LOG_LEVEL": "silent"})
            pids.append(child.pid)
        keys = [_wireguard_keys(wg), _wireguard_keys(wg)]
        for i in (0, 1):
            end, peer, own, other = ends[i], ends[1 - i], keys[i], keys[1 - i]
            control = _WIREGUARD_DIR / f"{end.device}.sock"
            wait_until(control.exists, 10, f"wireguard-go's {control}")
            command = (
                f"{wg} set {end.device} listen-port {_WIREGUARD_PORT} private-key /dev/stdin "
                f"peer {other[1]} allowed-ips {peer.subnet} "
                f"endpoint {peer.underlay_ip}:{_WIREGUARD_PORT}"
            )
            end.host.run(command.split(), input_text=own[0])
        return pids

    def route(self, end: End, peer: End) -> Sequence[str]:
        """See `tests.bench.tunnels.Tunnel`."""
        return plain_route(end, peer)


def _fastd_keys(program: str) -> tuple[str, str]:
    """A new secret key and its public one."""
    done = subprocess.run(
        [program, "--generate-key"], capture_output=True, text=True, timeout=10, check=True
    )
    secret, public = re.findall(r"\b[0-9a-f]{64}\b", done.stdout)
    return secret, public


def _wireguard_keys(wg: str) -> tuple[str, str]:
    """A new private key and its public one."""

    def run(what: str, given: str) -> str:
        done = subprocess.run(
            [wg, what], input=given, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    private = run("genkey", "")
    return private, run("pubkey", private)
