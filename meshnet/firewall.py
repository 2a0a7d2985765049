"""The rules of our nftables table, as text for ``nft -f``.

One table, ``inet meshnet``, is replaced as a whole in one transaction; no other table is touched.
A packet's way through it::

    bridge mnbN  ─┐                                  ┌─ another network's address ── drop
    VXLAN  mnvN  ─┼─► forward: from a network's ... ─┤
    underlay     ─┘    interface or address          └─ else ─────────────────────── go on
                                                            │
                       postrouting: from this host's subnet ┴─ to outside ── masquerade

Pure: the text is made from values that `meshnet.codec` has validated; it never reaches a shell.
"""

from __future__ import annotations

from ipaddress import collapse_addresses
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from meshnet.model import IpNetwork

TABLE = "meshnet"
_FAMILY = {4: "ip", 6: "ip6"}


class FirewallNetwork(NamedTuple):
    """What the rules need to know of one network.

    Attributes:
        links: names of its links on this host: bridge, tunnel device.
        cidrs: the whole network.
        subnets: this host's part of it.
    """

    links: Sequence[str]
    cidrs: Sequence[IpNetwork]
    subnets: Sequence[IpNetwork]


def render_firewall(networks: Sequence[FirewallNetwork]) -> str:
    """The complete table as an ``nft -f`` script that replaces the old one atomically."""
    sets = "".join(_render_set(version, networks) for version in (4, 6))
    forward = "".join(_isolate(n) for n in networks)
    masquerade = "".join(_masquerade(n) for n in networks)
    return (
        f"table inet {TABLE}\n"  # exists after this line, so that the next cannot fail
        f"delete table inet {TABLE}\n"
        f"table inet {TABLE} {{\n"
        f"{sets}"
        "\tchain isolate {\n"
        f"{forward}"
        "\t}\n"
        "\tchain forward {\n"
        "\t\ttype filter hook forward priority filter; policy accept;\n"
        "\t\tjump isolate\n"
        "\t}\n"
        "\tchain input {\n"
        "\t\ttype filter hook input priority filter; policy accept;\n"
        "\t\tjump isolate\n"
        "\t}\n"
        "\tchain postrouting {\n"
        "\t\ttype nat hook postrouting priority srcnat; policy accept;\n"
        f"{masquerade}"
        "\t}\n"
        "}\n"
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
