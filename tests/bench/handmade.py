"""The peer of the throughput benchmark: two hosts joined by a VXLAN set up by hand with ip(8).

The same underlay as the lab's (its own commands make it), and on every host what an administrator
would type: a VXLAN device without learning, a bridge, one permanent neighbour and FDB entry, one
route; the container hangs on the bridge by a veth.  It has a second address, that the other host
reaches by a plain route on the underlay instead, and further ones for further tunnels
(`tests.bench.tunnels`).  No nftables, so no conntrack; with `masquerade` on, the least that lets
containers reach the world outside, which brings both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.lab.underlay import LabUnderlay

if TYPE_CHECKING:
    from meshnet.lab.commands import Namespace
    from tests.bench.common import Scratch

_MTU_BYTES = 1500
_OVERHEAD_BYTES = 50  # RFC 7348 §5 over IPv4: Ethernet 14, IP 20, UDP 8, VXLAN 8
_HOSTS = (1, 2)


class Handmade:
    """Two hosts, ``h1`` and ``h2``, with one container each, ``c1`` and ``c2``."""

    def __init__(self, spaces: Scratch) -> None:
        self._spaces = spaces
        self._underlay = LabUnderlay(family=4, mtu_bytes=_MTU_BYTES, gateway=True)
        spaces.add("sw", *(f"{kind}{i}" for i in _HOSTS for kind in "hc"))
        commands = self._underlay.switch_commands()
        for i in _HOSTS:
            commands += self._underlay.port_commands(f"h{i}", spaces.name_of(f"h{i}"))
        spaces.ip("sw", commands)
        for i in _HOSTS:
            self._build_host(i, _HOSTS[2 - i])

    def _build_host(self, i: int, peer: int) -> None:
        own = self._underlay.host_ip(i)
        mtu = _MTU_BYTES - _OVERHEAD_BYTES
        self._spaces.ip(
            f"h{i}",
            [
                *self._underlay.host_commands(own),
                f"link add br0 address {_mac(i, 1)} mtu {mtu} type bridge "
                "stp_state 0 mcast_snooping 0",
                f"link add vx0 address {_mac(i, 0)} mtu {mtu} type vxlan id 42 local {own} "
                "dstport 4789 nolearning",
                f"address add 10.43.{i}.1/24 dev br0",
                "link set br0 up",
                "link set vx0 up",
                f"link add c0 mtu {mtu} type veth peer name eth0 address {_mac(i, 2)} mtu {mtu} "
                f"netns {self._spaces.name_of(f'c{i}')}",
                "link set c0 master br0 up",
                f"neighbour add 10.43.{peer}.0 lladdr {_mac(peer, 0)} dev vx0 nud permanent",
                f"route add 10.43.{peer}.0/24 via 10.43.{peer}.0 dev vx0 onlink src 10.43.{i}.1",
                f"address add 10.45.{i}.1/24 dev br0",
                f"route add 10.45.{peer}.0/24 via {self._underlay.host_ip(peer)} dev eth0",
            ],
        )
        remote = str(self._underlay.host_ip(peer))
        host = self.host(i)
        host.run(["bridge", "fdb", "add", _mac(peer, 0), "dev", "vx0", "dst", remote, "self"])
        host.run(["sysctl", "-q", "-w", "net.ipv4.ip_forward=1"])
        self._spaces.ip(
            f"c{i}",
            [
                f"address add 10.43.{i}.2/24 dev eth0",
                f"address add 10.45.{i}.2/24 dev eth0",
                "link set eth0 up",
                f"route add 10.43.0.0/16 via 10.43.{i}.1",
                f"route add 10.45.0.0/16 via 10.45.{i}.1 src 10.45.{i}.2",
            ],
        )

    def add_subnets(self, octet: int, mtu_bytes: int) -> None:
        """Give the hosts a further subnet each, ``10.OCTET.HOST.0/24``, and the containers its .2.

        The containers get it on a further link, that can be set up as a tunnel's endpoints are.

        How the hosts reach each other's is left to the caller.

        Args:
            mtu_bytes: what containers send at most to the other host's.
        """
        for i in _HOSTS:
            mtu, link = _MTU_BYTES - _OVERHEAD_BYTES, self.link_name(octet)
            self._spaces.ip(
                f"h{i}",
                [
                    f"address add 10.{octet}.{i}.1/24 dev br0",
                    f"link add c{octet} mtu {mtu} type veth peer name {link} "
                    f"address {_mac(i, octet)} mtu {mtu} netns {self._spaces.name_of(f'c{i}')}",
                    f"link set c{octet} master br0 up",
                ],
            )
            # Otherwise every link of a container answers ARP for the addresses of all.
            self.container(i).run(["sysctl", "-q", "-w", "net.ipv4.conf.all.arp_ignore=1"])
            self._spaces.ip(
                f"c{i}",
                [
                    f"address add 10.{octet}.{i}.2/24 dev {link}",
                    f"link set {link} up",
                    f"route add 10.{octet}.0.0/16 via 10.{octet}.{i}.1 src 10.{octet}.{i}.2 "
                    f"mtu {mtu_bytes}",
                ],
            )

    @staticmethod
    def link_name(octet: int) -> str:
        """The containers' link of `add_subnets`."""
        return f"eth{octet}"

    def masquerade(self, on: bool) -> None:
        """Give the hosts the one nftables rule that containers need for the outside, or none."""
        for i in _HOSTS:
            rule = (
                "chain postrouting { type nat hook postrouting priority srcnat; "
                f"ip saddr 10.43.{i}.0/24 ip daddr != 10.43.0.0/16 masquerade; }}\n"
            )
            script = "table ip handmade\ndelete table ip handmade\n"
            script += f"table ip handmade {{\n{rule}}}\n" if on else ""
            self.host(i).run(["nft", "-f", "-"], input_text=script)

    def host(self, i: int) -> Namespace:
        """Host 1 or 2."""
        return self._spaces.namespace(f"h{i}")

    def host_ip(self, i: int) -> str:
        """The underlay address of a host."""
        return str(self._underlay.host_ip(i))

    def container(self, i: int) -> Namespace:
        """The container of host 1 or 2."""
        return self._spaces.namespace(f"c{i}")

    def container_ip(self, i: int) -> str:
        """The overlay address of a container."""
        return f"10.43.{i}.2"

    def routed_ip(self, i: int) -> str:
        """The address of a container that is reached without the overlay."""
        return f"10.45.{i}.2"


def _mac(host: int, kind: int) -> str:
    return f"02:43:00:00:{host:02x}:{kind:02x}"
