"""The rules of our nftables table, as text for ``nft -f``.

One table, ``inet meshnet``, is replaced as a whole in one transaction; no other table is touched.
A packet's way through it::

    tunnel packet ── raw ── not tracked

    bridge mnbN  ─┐            ┌─ from a network's link to the same network's ─────── accept
    VXLAN  mnvN  ─┼─► forward ─┼─ from a network, to another network's address ───── drop
    underlay     ─┘            └─ else ───────────────────────────────────────────── go on
                                                            │
                       postrouting: from this host's subnet ┴─ to outside ── masquerade

Pure: the text is made from values that `meshnet.codec` has validated; it never reaches a shell.
"""

from __future__ import annotations

from ipaddress import collapse_addresses
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from meshnet.model import IpAddress, IpNetwork

TABLE = "meshnet"
_FAMILY = {4: "ip", 6: "ip6"}


class FirewallNetwork(NamedTuple):
    """What the rules need to know of one network.

    Attributes:
        links: names of its links on this host: bridge, tunnel devices.
        ports: UDP ports of its tunnels.
        cidrs: the whole network.
        subnets: this host's part of it.
    """

    links: Sequence[str]
    ports: Sequence[int]
    cidrs: Sequence[IpNetwork]
    subnets: Sequence[IpNetwork]


def render_firewall(networks: Sequence[FirewallNetwork], underlay_ip: IpAddress) -> str:
    """The complete table as an ``nft -f`` script that replaces the old one atomically.

    Every rule on a packet's way costs (docs/design/firewall-cost.md), so isolation is there only
    where there are networks to keep apart, and behind one look-up that passes what stays within
    its network.
    """
    sets = "".join(_render_set(version, networks) for version in (4, 6))
    masquerade = "".join(_masquerade(n) for n in networks)
    ports = sorted({port for n in networks for port in n.ports})
    return (
        f"table inet {TABLE}\n"  # exists after this line, so that the next cannot fail
        f"delete table inet {TABLE}\n"
        f"table inet {TABLE} {{\n"
        f"{sets}"
        f"{_isolation(networks) if len(networks) > 1 else ''}"
        f"{_untracked('prerouting', 'daddr', underlay_ip, ports) if ports else ''}"
        f"{_untracked('output', 'saddr', underlay_ip, ports) if ports else ''}"
        "\tchain postrouting {\n"
        "\t\ttype nat hook postrouting priority srcnat; policy accept;\n"
        f"{masquerade}"
        "\t}\n"
        "}\n"
    )


def _isolation(networks: Sequence[FirewallNetwork]) -> str:
    paths = ", ".join(
        f'"{here}" . "{there}"' for n in networks for here in n.links for there in n.links
    )
    rules = "".join(_isolate(n) for n in networks)
    return (
        "\tset paths {\n"
        "\t\ttype ifname . ifname\n"
        f"\t\telements = {{ {paths} }}\n"
        "\t}\n"
        "\tchain isolate {\n"
        f"{rules}"
        "\t}\n"
        "\tchain forward {\n"
        "\t\ttype filter hook forward priority filter; policy accept;\n"
        "\t\tiifname . oifname @paths accept\n"
        "\t\tjump isolate\n"
        "\t}\n"
        "\tchain input {\n"
        "\t\ttype filter hook input priority filter; policy accept;\n"
        "\t\tjump isolate\n"
        "\t}\n"
    )


def _untracked(hook: str, side: str, underlay_ip: IpAddress, ports: Sequence[int]) -> str:
    """Keep tunnel packets out of connection tracking.

    A tunnel's source port is a hash of the inner flow (RFC 7348 §5): each flow between two hosts
    would take an entry of its own, and a busy host's table would be full of them.  Others' packets
    to such a port are tracked, or they could not be masqueraded.
    """
    numbers = _braces(map(str, ports))
    return (
        f"\tchain tunnel_{hook} {{\n"
        f"\t\ttype filter hook {hook} priority raw; policy accept;\n"
        f"\t\t{_FAMILY[underlay_ip.version]} {side} {underlay_ip} udp dport {numbers} notrack\n"
        "\t}\n"
    )


def _render_set(version: int, networks: Sequence[FirewallNetwork]) -> str:
    kind = "ipv4_addr" if version == 4 else "ipv6_addr"
    # Collapsed: the kernel refuses a set, and with it the table, in which two intervals overlap.
    cidrs = collapse_addresses(
        c  # type: ignore[type-var]
        for n in networks
        for c in n.cidrs
        if c.version == version
    )
    members = ", ".join(map(str, cidrs))
    elements = f"\t\telements = {{ {members} }}\n" if members else ""
    return f"\tset networks{version} {{\n\t\ttype {kind}\n\t\tflags interval\n{elements}\t}}\n"


def _isolate(network: FirewallNetwork) -> str:
    """Packets of a network, known by interface or source, may not enter another network."""
    interfaces = _braces(f'"{link}"' for link in network.links)
    return "".join(
        f"\t\tiifname {interfaces} {ip} daddr @networks{c.version} {ip} daddr != {c} "
        "counter drop\n"
        f"\t\t{ip} saddr {c} {ip} daddr @networks{c.version} {ip} daddr != {c} counter drop\n"
        for c in network.cidrs
        for ip in (_FAMILY[c.version],)
    ) + "".join(
        # A network without this IP version has no business with any network of it.
        f"\t\tiifname {interfaces} {_FAMILY[v]} daddr @networks{v} counter drop\n"
        for v in (4, 6)
        if v not in {c.version for c in network.cidrs}
    )


def _masquerade(network: FirewallNetwork) -> str:
    return "".join(
        f"\t\t{ip} saddr {s} {ip} daddr != @networks{s.version} {ip} daddr != {multicast} "
        "masquerade fully-random\n"
        for s in network.subnets
        for ip, multicast in (
            (_FAMILY[s.version], "224.0.0.0/4" if s.version == 4 else "ff00::/8"),
        )
    )


def _braces(items: Iterable[str]) -> str:
    return "{ " + ", ".join(items) + " }"
