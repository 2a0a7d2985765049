"""The nftables text; that nft takes it is seen by the contract tests of the kernel."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from meshnet.firewall import FirewallNetwork, render_firewall

UNDERLAY = ip_address("192.0.2.1")
PROD = FirewallNetwork(
    ("mnb1", "mnv1"), (4789,), (ip_network("10.42.0.0/16"),), (ip_network("10.42.3.0/24"),)
)
DUAL = FirewallNetwork(
    ("mnb2", "mnv2"),
    (4789,),
    (ip_network("10.50.0.0/16"), ip_network("fd00:50::/48")),
    (ip_network("10.50.3.0/24"), ip_network("fd00:50:0:3::/64")),
)


def lines(*networks: FirewallNetwork) -> list[str]:
    return [line.strip() for line in render_firewall(networks, UNDERLAY).splitlines()]


def test_the_table_is_replaced_in_one_transaction() -> None:
    text = render_firewall([PROD], UNDERLAY)
    assert text.startswith("table inet meshnet\ndelete table inet meshnet\ntable inet meshnet {\n")
    assert text.count("{") == text.count("}")
    assert text.endswith("}\n")


def test_the_sets_hold_all_networks() -> None:
    found = lines(PROD, DUAL)
    assert "elements = { 10.42.0.0/16, 10.50.0.0/16 }" in found
    assert "elements = { fd00:50::/48 }" in found
    assert sum(line.startswith("elements") for line in lines(PROD)) == 1


def test_intervals_never_overlap() -> None:
    within = PROD._replace(cidrs=(ip_network("10.42.7.0/24"),))
    beside = PROD._replace(cidrs=(ip_network("10.43.0.0/16"),))
    assert "elements = { 10.42.0.0/15 }" in lines(within, PROD, PROD, beside)


def test_a_single_network_has_no_isolation_to_pay_for() -> None:
    assert not any("drop" in line or "hook forward" in line for line in lines(PROD))


def test_what_stays_within_its_network_passes_at_one_look_up() -> None:
    found = lines(PROD, DUAL)
    assert found.index("iifname . oifname @paths accept") < found.index("jump isolate")
    elements = next(line for line in found if line.startswith("elements") and "mnb" in line)
    pairs = elements.removeprefix("elements = { ").removesuffix(" }").split(", ")
    assert '"mnb1" . "mnv1"' in pairs
    assert len(pairs) == 8
    assert not any("1" in pair and "2" in pair for pair in pairs)


def test_tunnel_packets_are_not_tracked() -> None:
    found = lines(PROD, DUAL._replace(ports=(4790,)))
    assert "ip daddr 192.0.2.1 udp dport { 4789, 4790 } notrack" in found
    assert "ip saddr 192.0.2.1 udp dport { 4789, 4790 } notrack" in found


def test_networks_are_kept_apart_by_interface_and_by_source() -> None:
    found = lines(PROD, DUAL)
    assert (
        'iifname { "mnb1", "mnv1" } ip daddr @networks4 ip daddr != 10.42.0.0/16 counter drop'
        in found
    )
    assert (
        "ip saddr 10.42.0.0/16 ip daddr @networks4 ip daddr != 10.42.0.0/16 counter drop" in found
    )
    # Nor may an IPv4 network's containers reach another's IPv6 addresses.
    assert 'iifname { "mnb1", "mnv1" } ip6 daddr @networks6 counter drop' in found
    assert 'iifname { "mnb2", "mnv2" } ip6 daddr @networks6 counter drop' not in found
    # Both through the host and into it.
    assert found.count("jump isolate") == 2


def test_only_what_leaves_the_networks_is_masqueraded() -> None:
    found = lines(DUAL)
    for family, subnet, version, multicast in (
        ("ip", "10.50.3.0/24", 4, "224.0.0.0/4"),
        ("ip6", "fd00:50:0:3::/64", 6, "ff00::/8"),
    ):
        assert (
            f"{family} saddr {subnet} {family} daddr != @networks{version} "
            f"{family} daddr != {multicast} masquerade fully-random"
        ) in found
    assert sum("masquerade" in line for line in found) == 2


def test_the_text_depends_on_nothing_else() -> None:
    assert render_firewall([PROD, DUAL], UNDERLAY) == render_firewall((PROD, DUAL), UNDERLAY)
