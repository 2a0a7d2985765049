"""The peer that programming is compared with: the usual way, with ip(8) and bridge(8).

A route that names its own gateway, a neighbour and an FDB entry for each remote host, in three
batches that are made beforehand.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from meshnet.lab.netns import netns_path
from meshnet.state import format_mac
from meshnet.wire.mac import vtep_mac
from tests.bench.common import scratch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DEVICE = "mnv42"
UNDERLAY = IPv4Network("172.16.0.0/12")
OWN_IP = UNDERLAY[1]
_OVERLAY = IPv4Network("10.0.0.0/8")


class Remote(NamedTuple):
    """A remote host: its subnet, and where its VTEP is."""

    subnet: IPv4Network
    underlay_ip: IPv4Address


def remotes(count: int) -> list[Remote]:
    """So many remote hosts, from subnet 10.0.1.0/24 and underlay address 172.16.0.2 on."""
    first = int(_OVERLAY.network_address)
    return [
        Remote(IPv4Network((first + (i << 8), 24)), UNDERLAY[1 + i]) for i in range(1, count + 1)
    ]


def program_by_hand(count: int) -> float:
    """Program so many remote hosts in a fresh namespace; the three batches' time in seconds."""
    with host_namespace() as name, tempfile.TemporaryDirectory() as directory:
        device = (
            f"link add {DEVICE} mtu 1450 type vxlan id 42 local {OWN_IP} dstport 4789 nolearning\n"
            f"link set {DEVICE} up\n"
        )
        routes, neighbours, entries = [], [], []
        for subnet, underlay_ip in remotes(count):
            gateway, mac = subnet.network_address, format_mac(vtep_mac(subnet))
            neighbours.append(f"neighbour add {gateway} lladdr {mac} dev {DEVICE} nud permanent\n")
            entries.append(f"fdb add {mac} dev {DEVICE} dst {underlay_ip} self permanent\n")
            routes.append(f"route add {subnet} via {gateway} dev {DEVICE} onlink\n")
        _batch(name, "ip", Path(directory) / "device", [device])
        return sum(
            _batch(name, program, Path(directory) / "batch", lines)
            for program, lines in (("ip", neighbours), ("bridge", entries), ("ip", routes))
        )


def _batch(name: str, program: str, file: Path, lines: Sequence[str]) -> float:
    file.write_text("".join(lines))
    argv = ["nsenter", f"--net={netns_path(name)}", "--", program, "-batch", str(file)]
    started = time.perf_counter()
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - started


@contextlib.contextmanager
def host_namespace() -> Iterator[str]:
    """A namespace with an underlay link, and nothing else."""
    with scratch() as spaces:
        spaces.add("host")
        spaces.ip(
            "host",
            [
                "link add eth0 type veth peer name wire",
                f"address add {OWN_IP}/{UNDERLAY.prefixlen} dev eth0",
                "link set wire up",
                "link set eth0 up",
            ],
        )
        try:
            yield spaces.name_of("host")
        finally:
            # Wait for it now: in the background it would disturb the next measurement.
            spaces.namespace("host").run(["ip", "link", "del", DEVICE], timeout=120)
