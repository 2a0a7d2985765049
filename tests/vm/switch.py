"""The wire between machines: a namespace with a bridge, a tap for each machine, and etcd."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from meshnet.lab.netns import enter_argv, ip_batch, netns_path

if TYPE_CHECKING:
    from typing import Self

GATEWAY = "192.0.2.254"
GATEWAY6 = "fd00:2::fe"
_BRIDGE = "br0"


class Switch:
    """A namespace of its own; a context manager.

    Attributes:
        netns: its name.
        prefix: argv that runs a command in it.
    """

    def __init__(self, netns: str, ports: int) -> None:
        self.netns = netns
        self.prefix = enter_argv(netns_path(netns))
        self._ports = ports

    def __enter__(self) -> Self:
        ip_batch([f"netns add {self.netns}"])
        lines = [
            "link set lo up",
            f"link add {_BRIDGE} type bridge",
            f"address add {GATEWAY}/24 dev {_BRIDGE}",
            f"address add {GATEWAY6}/64 dev {_BRIDGE} nodad",
            f"link set {_BRIDGE} up",
        ]
        for number in range(1, self._ports + 1):
            lines += [
                f"tuntap add {port_of(number)} mode tap vnet_hdr",
                f"link set {port_of(number)} master {_BRIDGE} up",
            ]
        ip_batch(lines, netns=self.netns)
        return self

    def __exit__(self, *_error: object) -> None:
        ip_batch([f"netns del {self.netns}"])

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command at the gateway."""
        argv = (*self.prefix, *argv)
        return subprocess.run(argv, capture_output=True, text=True, check=check)


def port_of(number: int) -> str:
    """Name of a machine's tap."""
    return f"tap{number}"
