"""The lab's underlay: its addresses, and the ip(8) commands that build it.

The switch is a namespace with a Linux bridge.  A veth connects each host and each member of etcd to
it; the far end is their ``eth0``:

    mnlab-h1           mnlab-sw                          mnlab-etcd
    eth0 ───────────── h1 ┐                 ┌ etcd ───── eth0
    mnlab-h2              ├ br0 ────────────┤
    eth0 ───────────── h2 ┘ (the gateway)   └ lo: an address that stands for the Internet

Both ends of a veth are made inside their namespaces, so that nothing appears in the caller's.
Pure: imports no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal

from meshnet.errors import PoolExhaustedError, UsageError
from meshnet.lab.netns import BRIDGE

Family = Literal[4, 6]

# Fixed, because a bridge otherwise takes the lowest MAC of its ports: adding one would change the
# gateway's MAC while the hosts' neighbour entries have the old one.
_GATEWAY_MAC = "02:00:0a:ff:00:01"
ETCD_PORT = 2379
ETCD_PEER_PORT = 2380
# Above the gateway and etcd: h1 is 10.255.1.1, or fd00:255::1:1.  The last index stays in the /16.
_FIRST_HOST = {4: 0x100, 6: 0x1_0000}
_LAST_INDEX = 0xF000
_MTU_BYTES = {4: range(576, 65536), 6: range(1280, 65536)}  # RFC 791 §3.1, RFC 8200 §5


@dataclass(frozen=True, slots=True)
class LabUnderlay:
    """The addressing plan of a lab.

    Attributes:
        family: 4 or 6; hosts and etcd have addresses of this family only.
        mtu_bytes: MTU of every underlay link.
        gateway: whether hosts have a default route to the switch.
    """

    family: Family = 4
    mtu_bytes: int = 1500
    gateway: bool = True

    def __post_init__(self) -> None:
        if self.family not in (4, 6):
            raise UsageError(f"underlay family {self.family}: use 4 or 6")
        allowed = _MTU_BYTES[self.family]
        if self.mtu_bytes not in allowed:
            raise UsageError(
                f"underlay MTU {self.mtu_bytes}: use {allowed.start} to {allowed.stop - 1} "
                f"for IPv{self.family}"
            )

    @property
    def network(self) -> IPv4Network | IPv6Network:
        """The underlay's prefix, on-link for all hosts."""
        if self.family == 4:
            return IPv4Network("10.255.0.0/16")
        return IPv6Network("fd00:255::/64")

    @property
    def gateway_ip(self) -> IPv4Address | IPv6Address:
        """The switch's own address, on its bridge."""
        return self.network[1]

    def etcd_ip(self, member: int = 0) -> IPv4Address | IPv6Address:
        """The address that a member of etcd listens on; the first is member 0."""
        return self.network[2 + member]

    @property
    def outside_ip(self) -> IPv4Address | IPv6Address:
        """An address beyond the gateway that answers: it stands for the Internet."""
        if self.family == 4:
            return IPv4Address("203.0.113.1")
        return IPv6Address("2001:db8::1")

    def etcd_url(self, member: int = 0, port: int = ETCD_PORT) -> str:
        """URL of a member of etcd, for clients, or with `ETCD_PEER_PORT` for other members."""
        address = self.etcd_ip(member)
        host = f"[{address}]" if self.family == 6 else str(address)
        return f"http://{host}:{port}"

    def host_ip(self, index: int) -> IPv4Address | IPv6Address:
        """Return the address of host number `index`, from 1.

        Raises:
            PoolExhaustedError: the underlay has no address for it.
        """
        if not 1 <= index <= _LAST_INDEX:
            raise PoolExhaustedError(
                f"underlay {self.network} has no address for host number {index}: "
                f"use 1 to {_LAST_INDEX}"
            )
        return self.network[_FIRST_HOST[self.family] + index]

    def switch_commands(self) -> list[str]:
        """Commands for the switch's namespace: the bridge, without ports."""
        return [
            "link set lo up",
            # No multicast snooping: there is no querier here, so the bridge would forget group
            # members and drop neighbour discovery.
            f"link add {BRIDGE} address {_GATEWAY_MAC} mtu {self.mtu_bytes} type bridge "
            "stp_state 0 mcast_snooping 0",
            f"link set {BRIDGE} up",
            self._address_command(self.gateway_ip, self.network.prefixlen, BRIDGE),
            self._address_command(self.outside_ip, self.outside_ip.max_prefixlen, "lo"),
        ]

    def port_commands(self, port: str, netns: str) -> list[str]:
        """Commands for the switch's namespace: a port, with ``eth0`` at its far end in `netns`."""
        mtu = f"mtu {self.mtu_bytes}"
        return [
            f"link add {port} {mtu} type veth peer name eth0 {mtu} netns {netns}",
            f"link set {port} master {BRIDGE} up",
        ]

    def host_commands(self, address: IPv4Address | IPv6Address) -> list[str]:
        """Commands for a host's (or etcd's) namespace: its addresses and routes."""
        commands = [
            "link set lo up",
            self._address_command(address, self.network.prefixlen, "eth0"),
            "link set eth0 up",
        ]
        if self.gateway:
            # Not "default": a line of a batch cannot have the -6 that would say which family's.
            everything = "0.0.0.0/0" if self.family == 4 else "::/0"
            commands.append(f"route add {everything} via {self.gateway_ip} dev eth0")
        return commands

    def _address_command(
        self, address: IPv4Address | IPv6Address, prefix_length: int, link: str
    ) -> str:
        # nodad: duplicate address detection (RFC 4862 §5.4) keeps an address unusable for a second.
        nodad = " nodad" if address.version == 6 else ""
        return f"address add {address}/{prefix_length} dev {link}{nodad}"


DEFAULT_UNDERLAY = LabUnderlay()
