"""The skeleton of our nftables tables: chains, rules, counters and named sets, as text.

Two tables, ``inet meshnet`` and ``bridge meshnet``, are replaced as a whole in one transaction; no
other table is touched.  A packet's way through them::

    endpoint ── bridge prerouting ── not its own MAC, address, ARP or neighbour ──────── drop
                      │
    bridge mnbN  ─┐   ▼        ┌─ from a network's link to the same network's ────────── accept
    VXLAN  mnvN  ─┼─► forward ─┼─ from a network ─► leave: tunnel port, other network ── drop
    elsewhere    ─┘            │                  cannot be masqueraded ──────────────── drop
                               └─ to a network ──► enter: neither answer nor published ─ drop
                                                              │
                        postrouting: from this host's subnet ─┴─ to outside ── masquerade

    tunnel packet ── raw: not tracked ── input: of an endpoint, or not of a member ───── drop
    for 127.0.0.0/8, by a link ── raw ────────────────────────────────────────────────── drop

Rules name only what changes with the networks.  What comes and goes more often (endpoints,
published ports and members) is in named sets (`meshnet.firewall.elements`), which `render_rules`
declares empty.  A rule that drops counts in a counter of `COUNTERS`.

Every rule on a packet's path costs (docs/design/firewall-cost.md): a packet that stays within its
network passes the forward chain at the first look-up.

Only this module turns the values of `meshnet.firewall` into rules, and only
`meshnet.kernel.drivers` calls it.

Pure: the text is made from values that `meshnet.codec` has validated; it never reaches a shell.
"""

from __future__ import annotations

from ipaddress import collapse_addresses
from typing import TYPE_CHECKING, NamedTuple

from meshnet.firewall import elements
from meshnet.firewall.elements import SETS, TABLE, render_elements
from meshnet.wire.icmp import ICMPV6

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from meshnet.firewall import Firewall, FirewallNetwork
    from meshnet.model import IpAddress, IpNetwork
    from meshnet.state import ElementKey

FAMILIES = ("inet", "bridge")
"""Families of our tables.  Two, because the hooks of ``inet`` see neither ARP nor frames from one
port of a bridge to another."""

COUNTERS = {
    "spoofed_ipv4": "bridge",
    "spoofed_ipv6": "bridge",
    "spoofed_arp": "bridge",
    "spoofed_neighbour": "bridge",
    "router_advertisement": "bridge",
    "ethertype": "bridge",
    "tunnel_not_a_member": "inet",
    "tunnel_from_endpoint": "inet",
    "other_network": "inet",
    "internal": "inet",
    "unpublished": "inet",
    "untranslatable": "inet",
    "loopback": "inet",
}
"""Why packets are dropped (docs/firewall.md), and the family of the table that counts them."""

_FAMILY = {4: "ip", 6: "ip6"}
_NFPROTO = {4: "ipv4", 6: "ipv6"}
_LOOPBACK = "127.0.0.0/8"
_MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}


class Count(NamedTuple):
    """What a counter counted."""

    packets: int
    size_bytes: int


def render_rules(firewall: Firewall) -> str:
    """The text of both tables, with empty sets."""
    return _inet(firewall.networks, firewall.underlay_ip) + _bridge()


def render_script(rules: str, held: Mapping[ElementKey, bytes], counts: Mapping[str, Count]) -> str:
    """The script with which ``nft -f`` replaces both tables in one transaction.

    Args:
        rules: the skeleton (`render_rules`).
        held: the elements of its sets: with the rules, so that there is no moment without them.
        counts: what the counters have counted, to go on from; a missing one starts from zero.
    """
    text = ""
    for family in FAMILIES:
        # The first line makes the table if it is missing, so that the second cannot fail.
        text += f"table {family} {TABLE}\ndelete table {family} {TABLE}\n"
    for name, family in COUNTERS.items():
        count = counts.get(name, Count(0, 0))
        text += (
            f"table {family} {TABLE} {{ counter {name} {{ "
            f"packets {count.packets} bytes {count.size_bytes}; }}; }}\n"
        )
    return text + rules + render_elements(held)


def _inet(networks: Sequence[FirewallNetwork], underlay_ip: IpAddress) -> str:
    links = [link for n in networks for link in n.links]
    ports = sorted({port for n in networks for port in n.ports})
    text = f"table inet {TABLE} {{\n" + _declare("inet")
    if links:
        text += _raw(ports, underlay_ip)
        text += _tunnel(networks, links, ports, underlay_ip)
        text += _isolate(networks)
        text += _forward(networks, links, ports)
        text += _nat(networks)
    return text + "}\n"


def _declare(family: str) -> str:
    return "".join(s.declare(name) for name, s in SETS.items() if s.family == family)


def _raw(ports: Sequence[int], underlay_ip: IpAddress) -> str:
    """Before connection tracking and translation: what to drop, and what not to track.

    Nothing that comes by a link is for a loopback address.  The kernel would drop such packets when
    it routes them, but `_nat` has translated them to what is published there by then; and it does
    not where ``route_localnet`` is on, as on our bridges, for answers to what came from 127.0.0.1.
    (Those arrive here with the address that the question was masqueraded with.)  A VRF gives its
    own local packets back by itself, so that is let be.  Packets for ::1 the kernel drops before
    any rule, with the same exception (``ip6_rcv_core`` in net/ipv6/ip6_input.c).

    A tunnel's source port is a hash of the inner flow (RFC 7348 §5), so each inner flow would take
    an entry, and fill a busy host's table.  Packets to such a port from or to other addresses are
    tracked: otherwise they could not be masqueraded.
    """
    ip, numbers = _FAMILY[underlay_ip.version], _braces(map(str, ports))
    prerouting = [f'ip daddr {_LOOPBACK} iifname != "lo" jump loopback']
    output = []
    if ports:
        prerouting.append(f"{ip} daddr {underlay_ip} udp dport {numbers} notrack")
        output.append(f"{ip} saddr {underlay_ip} udp dport {numbers} notrack")
    return (
        # Not one rule with !=: that is never true for a link without a kind, such as a real one.
        _chain("loopback", ['meta iifkind "vrf" accept', _drop("loopback")])
        + _chain("raw_prerouting", prerouting, "filter hook prerouting priority raw")
        + _chain("raw_output", output, "filter hook output priority raw")
    )


def _tunnel(
    networks: Sequence[FirewallNetwork],
    links: Sequence[str],
    ports: Sequence[int],
    underlay_ip: IpAddress,
) -> str:
    """Input: tunnel packets to any address of the host, since the kernel's VTEPs listen at all.

    Those of members pass at once.  Those of other VNIs are somebody else's, and are left alone.
    """
    ip, vnis = _FAMILY[underlay_ip.version], sorted({n.vni for n in networks if n.ports})
    rules, tunnel = [], []
    if ports:
        rules.append(f"udp dport {_braces(map(str, ports))} jump tunnel")
        members = elements.MEMBERS[underlay_ip.version]
        tunnel = [
            f"{ip} saddr @{members} iifname != {_quoted(links)} accept",
            f"iifname {_quoted(links)} {_drop('tunnel_from_endpoint')}",
            # The VNI: 8 bytes of UDP header, 4 of VXLAN's flags, then its 24 bits (RFC 7348 §5).
            f"meta nfproto {_NFPROTO[underlay_ip.version]} @th,96,24 {_braces(map(str, vnis))} "
            f"{_drop('tunnel_not_a_member')}",
        ]
    if len(networks) > 1:
        rules.append(f"iifname {_quoted(links)} jump isolate")
        for network in networks:
            rules += _isolate_peers(network, networks) if network.direct else ()
    return _chain("tunnel", tunnel) + _chain("input", rules, "filter hook input priority filter")


def _isolate(networks: Sequence[FirewallNetwork]) -> str:
    """Packets from a network may enter only that network, and not reach even another's gateway.

    A packet to an address outside all networks passes after one look-up.
    """
    if len(networks) < 2:
        return ""
    chains, isolate = "", []
    for version, cidrs in _cidrs(networks).items():
        ip = _FAMILY[version]
        rules = []
        for network in networks:
            own = [c for c in network.cidrs if c.version == version]
            but = f" {ip} daddr != {_braces(map(str, own))}" if own else ""
            rules.append(f"iifname {_quoted(network.links)}{but} {_drop('other_network')}")
        chains += _chain(f"isolate{version}", rules)
        isolate.append(f"{ip} daddr {_braces(map(str, cidrs))} jump isolate{version}")
    return chains + _chain("isolate", isolate)


def _isolate_peers(network: FirewallNetwork, networks: Sequence[FirewallNetwork]) -> Iterable[str]:
    """With direct routing, packets of a network may arrive by the underlay: only sources tell."""
    for version, cidrs in _cidrs([n for n in networks if n is not network]).items():
        for cidr in network.cidrs:
            if cidr.version == version:
                ip = _FAMILY[version]
                yield (
                    f"{ip} saddr {cidr} {ip} daddr {_braces(map(str, cidrs))} "
                    f"{_drop('other_network')}"
                )


def _forward(
    networks: Sequence[FirewallNetwork], links: Sequence[str], ports: Sequence[int]
) -> str:
    """Forward: isolation, and nothing in that is not published.

    ``ct status dnat`` marks the packets of published ports, in both directions.

    A tunnel packet that an endpoint makes would be masqueraded and reach other hosts with this
    host's address, a member's: so it may not leave.  One that stays within its network is harmless.

    What connection tracking calls invalid (a FIN or RST of no connection), or leaves alone, is not
    translated: it would leave the host with its endpoint's own address.
    """
    internal = _quoted([link for n in networks if n.internal for link in n.links])
    paths = _braces(
        f'"{here}" . "{there}"' for n in networks for here in n.links for there in n.links
    )
    forward = [f"iifname . oifname {paths} accept"]
    if any(n.internal for n in networks):
        forward += [f"{side} {internal} {_drop('internal')}" for side in ("iifname", "oifname")]
    forward += [f"iifname {_quoted(links)} jump leave", f"oifname {_quoted(links)} jump enter"]
    leave = []
    if ports:
        leave.append(f"udp dport {_braces(map(str, ports))} {_drop('tunnel_from_endpoint')}")
    leave.append("ct status dnat accept")
    leave += [
        f"ct state invalid,untracked {outward} {_drop('untranslatable')}"
        for outward in _outward(networks)
    ]
    if len(networks) > 1:
        leave.append("jump isolate")
    enter = ["ct state established,related accept", "ct status dnat accept"]
    enter += [
        f"iifname != {_quoted(links)} oifname {_quoted(n.links)} {_FAMILY[c.version]} saddr {c} "
        "accept"
        for n in networks
        if n.direct
        for c in n.cidrs
    ]
    enter.append(_drop("unpublished"))
    return (
        _chain("leave", leave)
        + _chain("enter", enter)
        + _chain("forward", forward, "filter hook forward priority filter")
    )


def _nat(networks: Sequence[FirewallNetwork]) -> str:
    """Published ports, and masquerading.

    Packets that leave the networks are masqueraded, and so are packets to a published port whose
    answers would otherwise not come back by this host.

    Nothing is published at ::1: Linux accepts no answer to ::1 on a link other than loopback
    (``rt6_need_strict`` in net/ipv6/route.c).
    """
    publish = [
        f"{which} fib daddr type local dnat {ip} to {key}meta l4proto . th dport "
        f"map @{names[version]}"
        for version, ip, which in ((4, "ip", "meta nfproto ipv4"), (6, "ip6", "ip6 daddr != ::1"))
        for names, key in ((elements.PUBLISHED_AT, f"{ip} daddr . "), (elements.PUBLISHED, ""))
    ]
    # An answer to 127.0.0.1 would not leave the endpoint's own namespace.
    answer = [f"ip saddr {_LOOPBACK} masquerade fully-random"]
    masquerade = ["ct status dnat jump answer"]
    for version, ip in _FAMILY.items():
        subnets = [s for n in networks for s in n.subnets if s.version == version]
        if subnets:
            # From an endpoint to a published port of its own bridge: the answer would go straight
            # from port to port, untranslated.
            answer += [f"{ip} saddr {s} {ip} daddr {s} masquerade fully-random" for s in subnets]
            answer.append(f"{ip} daddr @{elements.NO_DEFAULT[version]} masquerade fully-random")
    masquerade += [f"{outward} masquerade fully-random" for outward in _outward(networks)]
    return (
        _chain("nat_prerouting", publish, "nat hook prerouting priority dstnat")
        # In numbers: not every nft takes the name dstnat in output.
        + _chain("nat_output", publish, "nat hook output priority -100")
        + _chain("answer", answer)
        + _chain("postrouting", masquerade, "nat hook postrouting priority srcnat")
    )


def _outward(networks: Sequence[FirewallNetwork]) -> Iterator[str]:
    """Matches of what leaves this host's subnets for the outside, by IP version."""
    for version, cidrs in _cidrs(networks).items():
        ip = _FAMILY[version]
        subnets = [s for n in networks if not n.internal for s in n.subnets if s.version == version]
        if subnets:
            yield (
                f"{ip} saddr {_braces(map(str, subnets))} "
                f"{ip} daddr != {_braces(map(str, cidrs))} {ip} daddr != {_MULTICAST[version]}"
            )


def _bridge() -> str:
    """What an endpoint may send: only from its own MAC and addresses, and only about these.

    Most frames are IPv4 of honest endpoints: the first rule lets them through.  Duplicate address
    detection (RFC 4862 §5.4.2) sends from the unspecified address and asks for the endpoint's own.
    """
    ipv4, ipv6, target = (
        f"iifname . ether saddr . {what}" for what in ("ip saddr", "ip6 saddr", "@th,64,128")
    )
    return (
        f"table bridge {TABLE} {{\n"
        + _declare("bridge")
        + _chain("from_ipv4", [_drop("spoofed_ipv4")])
        + _chain(
            "from_arp",
            [
                "iifname . ether saddr . arp saddr ip @sources4 "
                "iifname . arp saddr ether . arp saddr ip @sources4 accept",
                _drop("spoofed_arp"),
            ],
        )
        + _chain(
            "from_ipv6",
            [
                # By number: nft looks names of protocols up in /etc/protocols, and refuses the
                # whole script on a small host that lacks the file.
                f"meta l4proto {ICMPV6} jump from_icmpv6",
                f"{ipv6} @sources6 accept",
                _drop("spoofed_ipv6"),
            ],
        )
        + _chain(
            "from_icmpv6",
            [
                "icmpv6 type { nd-router-advert, nd-redirect } " + _drop("router_advertisement"),
                f"icmpv6 type nd-neighbor-advert {target} != @targets6 "
                + _drop("spoofed_neighbour"),
                f"ip6 saddr :: icmpv6 type nd-neighbor-solicit {target} @targets6 accept",
            ],
        )
        + _chain(
            "prerouting",
            [
                f"ether type ip {ipv4} @sources4 accept",
                # Not a verdict map: when the table is replaced, the kernel empties the old map at
                # once, and a packet still on its way through the old rules would be dropped.
                'iifname "mne*" ether type ip goto from_ipv4',
                'iifname "mne*" ether type ip6 goto from_ipv6',
                'iifname "mne*" ether type arp goto from_arp',
                f'iifname "mne*" {_drop("ethertype")}',
            ],
            "filter hook prerouting priority dstnat",
        )
        + "}\n"
    )


def _cidrs(networks: Sequence[FirewallNetwork]) -> dict[int, list[IpNetwork]]:
    """All CIDRs by IP version, without versions that have none.

    Collapsed, because the kernel refuses a set with overlapping intervals, and the table with it.
    """
    found = {}
    for version in (4, 6):
        cidrs = [c for n in networks for c in n.cidrs if c.version == version]
        if cidrs:
            found[version] = list(collapse_addresses(cidrs))  # type: ignore[type-var]
    return found


def _chain(name: str, rules: Sequence[str], hook: str = "") -> str:
    """A chain; one without rules is left out."""
    if not rules:
        return ""
    base = f"\t\ttype {hook}; policy accept;\n" if hook else ""
    return f"\tchain {name} {{\n{base}" + "".join(f"\t\t{rule}\n" for rule in rules) + "\t}\n"


def _drop(reason: str) -> str:
    return f"counter name {reason} drop"


def _quoted(links: Iterable[str]) -> str:
    return _braces(f'"{link}"' for link in links)


def _braces(items: Iterable[str]) -> str:
    return "{ " + ", ".join(items) + " }"
