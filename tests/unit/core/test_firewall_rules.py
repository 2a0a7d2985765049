"""The text of the tables.  The kernel's contract tests show that nft accepts it."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network

from meshnet.firewall import Firewall, FirewallNetwork, firewall_for
from meshnet.firewall.elements import SETS, endpoint_elements, member
from meshnet.firewall.rules import COUNTERS, Count, render_rules, render_script
from tests.values import make_endpoint

UNDERLAY = ip_address("192.0.2.1")
PROD = FirewallNetwork(
    links=("mnb1", "mnv1"),
    ports=(4789,),
    cidrs=(ip_network("10.42.0.0/16"),),
    subnets=(ip_network("10.42.3.0/24"),),
    vni=1,
)
DUAL = FirewallNetwork(
    links=("mnb2", "mnv2"),
    ports=(4789,),
    cidrs=(ip_network("10.50.0.0/16"), ip_network("fd00:50::/48")),
    subnets=(ip_network("10.50.3.0/24"), ip_network("fd00:50:0:3::/64")),
    vni=2,
)
ALL_LINKS = '{ "mnb1", "mnv1", "mnb2", "mnv2" }'


def chains(*networks: FirewallNetwork) -> dict[str, list[str]]:
    """The rules of each chain."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in render_rules(firewall_for(networks, UNDERLAY)).splitlines():
        match line.split():
            case ["chain", name, "{"]:
                found[name] = []
            case ["set" | "map" | "table", *_]:
                name = ""
            case [_, *_] if name and line.startswith("\t\t"):
                found[name].append(line.strip())
    return found


def test_both_tables_are_replaced_in_one_transaction() -> None:
    text = render_script(render_rules(Firewall((PROD,), UNDERLAY)), {}, {})
    for family in ("inet", "bridge"):
        assert f"table {family} meshnet\ndelete table {family} meshnet\n" in text
    assert text.count("{") == text.count("}")


def test_no_verdict_depends_on_a_map() -> None:
    """The kernel empties a map when its table is replaced, while packets pass."""
    text = render_rules(Firewall((PROD, DUAL), UNDERLAY))
    assert "vmap" not in text
    assert not re.search(r"type .* : verdict", text)


def test_counters_go_on_from_what_they_counted() -> None:
    text = render_script("", {}, {"unpublished": Count(3, 180)})
    assert "table inet meshnet { counter unpublished { packets 3 bytes 180; }; }\n" in text
    assert "table bridge meshnet { counter spoofed_arp { packets 0 bytes 0; }; }\n" in text
    assert text.count("counter") == len(COUNTERS)


def test_every_reason_is_counted_and_every_counter_is_a_reason() -> None:
    internal = DUAL._replace(internal=True)
    text = render_rules(Firewall((PROD, internal), UNDERLAY))
    assert {w for w in COUNTERS if f"counter name {w} drop" in text} == set(COUNTERS)
    assert text.count("counter") == text.count("drop")


def test_the_sets_are_declared_empty_and_loaded_with_what_they_hold() -> None:
    endpoint = make_endpoint(("10.42.3.2/24", "fd00:42::2/64"))
    elements = {**endpoint_elements(endpoint), member(ip_address("192.0.2.2")): b""}
    rules = render_rules(Firewall((PROD,), UNDERLAY))
    assert all(f"{name} {{" in rules for name in SETS)
    text = render_script(rules, elements, {})
    link = '"mne0123456789ab" . 02:65:0a:2a:03:02'
    assert text.endswith(
        f"add element bridge meshnet sources4 {{ {link} . 10.42.3.2 }}\n"
        f"add element bridge meshnet sources6 {{ {link} . fd00:42::2, "
        f"{link} . fe80::65:aff:fe2a:302 }}\n"
        f"add element bridge meshnet targets6 {{ "
        f"{link} . 0xfd000042000000000000000000000002, "
        f"{link} . 0xfe8000000000000000650afffe2a0302 }}\n"
        "add element inet meshnet members4 { 192.0.2.2 }\n"
    )


def test_intervals_never_overlap() -> None:
    within = PROD._replace(cidrs=(ip_network("10.42.7.0/24"),))
    beside = PROD._replace(cidrs=(ip_network("10.43.0.0/16"),))
    (rule,) = chains(within, PROD, PROD, beside)["isolate"]
    assert rule == "ip daddr { 10.42.0.0/15 } jump isolate4"


def test_what_stays_within_its_network_passes_at_one_look_up() -> None:
    assert chains(PROD)["forward"][1] == (
        'iifname . oifname { "mnb1" . "mnb1", "mnb1" . "mnv1", "mnv1" . "mnb1", "mnv1" . "mnv1" } '
        "accept"
    )
    rule = chains(PROD, DUAL)["forward"][1]
    pairs = rule.partition("{ ")[2].partition(" }")[0].split(", ")
    assert len(pairs) == 8
    assert not any("1" in pair and "2" in pair for pair in pairs)


def test_a_single_network_has_no_isolation_to_pay_for() -> None:
    found = chains(PROD)
    assert "isolate" not in found
    assert "jump isolate" not in found["leave"]
    assert not any("isolate" in rule for rule in found["input"])


def test_networks_are_kept_apart() -> None:
    found = chains(PROD, DUAL)
    assert found["isolate"] == [
        "ip daddr { 10.42.0.0/16, 10.50.0.0/16 } jump isolate4",
        "ip6 daddr { fd00:50::/48 } jump isolate6",
    ]
    prod, dual = 'iifname { "mnb1", "mnv1" }', 'iifname { "mnb2", "mnv2" }'
    drop = "counter name other_network drop"
    assert found["isolate4"] == [
        f"{prod} ip daddr != {{ 10.42.0.0/16 }} {drop}",
        f"{dual} ip daddr != {{ 10.50.0.0/16 }} {drop}",
    ]
    # Nor may an IPv4 network's containers reach another's IPv6 addresses.
    assert found["isolate6"] == [
        f"{prod} {drop}",
        f"{dual} ip6 daddr != {{ fd00:50::/48 }} {drop}",
    ]
    # Both through the host and into it.
    assert found["leave"][-1] == "jump isolate"
    assert f"iifname {ALL_LINKS} jump isolate" in found["input"]


def test_peers_without_a_tunnel_are_known_by_their_source() -> None:
    found = chains(PROD._replace(direct=True), DUAL)
    assert found["enter"][-2] == (
        f'iifname != {ALL_LINKS} oifname {{ "mnb1", "mnv1" }} ip saddr 10.42.0.0/16 accept'
    )
    assert found["input"][-1] == (
        "ip saddr 10.42.0.0/16 ip daddr { 10.50.0.0/16 } counter name other_network drop"
    )


def test_only_answers_and_what_is_published_enter() -> None:
    assert chains(PROD)["enter"] == [
        "ct state established,related accept",
        "ct status dnat accept",
        "counter name unpublished drop",
    ]


def test_an_internal_network_has_no_way_in_or_out() -> None:
    found = chains(PROD._replace(internal=True), DUAL)
    assert found["forward"][2:4] == [
        'iifname { "mnb1", "mnv1" } counter name internal drop',
        'oifname { "mnb1", "mnv1" } counter name internal drop',
    ]
    assert not any("10.42.3.0/24 }" in rule for rule in found["postrouting"])


def test_tunnel_packets() -> None:
    found = chains(PROD, DUAL._replace(ports=(4790,)))
    assert "ip daddr 192.0.2.1 udp dport { 4789, 4790 } notrack" in found["raw_prerouting"]
    assert "ip saddr 192.0.2.1 udp dport { 4789, 4790 } notrack" in found["raw_output"]
    assert found["input"][1] == "udp dport { 4789, 4790 } jump tunnel"
    assert found["tunnel"] == [
        f"ip saddr @members4 iifname != {ALL_LINKS} accept",
        f"iifname {ALL_LINKS} counter name tunnel_from_endpoint drop",
        "meta nfproto ipv4 @th,96,24 { 1, 2 } counter name tunnel_not_a_member drop",
    ]
    assert found["leave"][0] == ("udp dport { 4789, 4790 } counter name tunnel_from_endpoint drop")


def test_tunnel_packets_of_an_ipv6_underlay() -> None:
    text = render_rules(Firewall((PROD,), ip_address("2001:db8::1")))
    assert 'ip6 saddr @members6 iifname != { "mnb1", "mnv1" } accept' in text
    assert "meta nfproto ipv6 @th,96,24 { 1 } counter name tunnel_not_a_member drop" in text
    assert "ip6 daddr 2001:db8::1 udp dport { 4789 } notrack" in text
    assert "@members4 " not in text


def test_only_what_leaves_the_networks_is_masqueraded() -> None:
    rules = chains(PROD, DUAL)["postrouting"]
    for family, subnets, cidrs, multicast in (
        ("ip", "10.42.3.0/24, 10.50.3.0/24", "10.42.0.0/16, 10.50.0.0/16", "224.0.0.0/4"),
        ("ip6", "fd00:50:0:3::/64", "fd00:50::/48", "ff00::/8"),
    ):
        assert (
            f"{family} saddr {{ {subnets} }} {family} daddr != {{ {cidrs} }} "
            f"{family} daddr != {multicast} masquerade fully-random"
        ) in rules
    assert sum("masquerade" in rule for rule in rules) == 2


def test_what_would_be_masqueraded_and_cannot_be_is_dropped() -> None:
    found = chains(PROD, DUAL)
    wanted = [rule.removesuffix(" masquerade fully-random") for rule in found["postrouting"][2:]]
    assert [rule for rule in found["leave"] if "untranslatable" in rule] == [
        f"ct state invalid,untracked {rule} counter name untranslatable drop" for rule in wanted
    ]


def test_a_network_without_links_has_its_endpoints_checked_and_nothing_else() -> None:
    assert render_rules(firewall_for([FirewallNetwork(vni=9), PROD], UNDERLAY)) == render_rules(
        Firewall((PROD,), UNDERLAY)
    )
    assert {name for name in chains(FirewallNetwork(vni=9)) if not name.startswith("from_")} == {
        "prerouting"
    }
