"""A VXLAN network with a fallback: a pair whose port is blocked moves, and only that pair."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.mesh import attach, create_network, lossless, meshnet, ping, wait_in_sync
from tests.netns.test_udp import SUBNETS, TUN, assert_all_reach_all, containers, transfer

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

PORT, FALLBACK_PORT = 4789, 24097
DEADLINE_S = 15
CLIENT = (sys.executable, "-m", "meshnet.cli.main")


def block(host: LabHost, source: LabHost, port: object, *, longer_than: int = 0) -> None:
    """Drop what a host receives at a UDP port from another; in a table of the test's own."""
    family = "ip" if source.underlay_ip.version == 4 else "ip6"
    rules = (
        "table inet blocked {\n"
        "chain input {\n"
        "type filter hook input priority -10\n"
        f"{family} saddr {source.underlay_ip} udp dport {port} udp length > {longer_than} drop\n"
        "}\n}\n"
    )
    host.run(["nft", "-f", "-"], input_text=rules)


def unblock(host: LabHost) -> None:
    host.run(["nft", "delete table inet blocked"])


def paths(host: LabHost) -> dict[str, str]:
    """The way to each other host."""
    return {d["id"]: d["path"]["prod"] for d in meshnet(host, "hosts") if d["path"]}


def all_paths(lab: Lab) -> dict[tuple[str, str], str]:
    return {(host.name, to): way for host in lab.hosts for to, way in paths(host).items()}


def fallen(lab: Lab) -> set[tuple[str, str]]:
    return {pair for pair, way in all_paths(lab).items() if way == "udp"}


def test_a_pair_whose_port_is_blocked_moves_and_no_other(make_lab: MakeLab) -> None:
    lab = make_lab(3)
    h1, h2, h3 = lab.hosts
    create_network(lab, "prod", *SUBNETS, "--fallback", "auto")
    made = containers(lab.hosts, "prod")
    assert_all_reach_all(made)
    assert set(all_paths(lab).values()) == {"vxlan"}
    (c1, _), (_, at2), (c3, at3) = made
    with lossless(c1, at3[4], at3[6]), lossless(c3, at2[4], at2[6]):
        block(h2, h1, PORT)
        began = time.monotonic()
        wait_until(lambda: ping(c1, at2[4], "-c1"), DEADLINE_S, "packets arrive by the fallback")
        print(f"a packet arrives {time.monotonic() - began:.1f} s after the port was blocked")
        wait_until(lambda: fallen(lab) == {("h1", "h2"), ("h2", "h1")}, DEADLINE_S, "both moved")
        for host in (h1, h2):
            (network,) = meshnet(host, "status")["networks"]
            after_s = time.monotonic() - began - network["fallen"][0]["since_s"]
            print(f"{host.name} moved {after_s:.1f} s after the port was blocked")
        assert_all_reach_all(made)
        assert transfer(c1, made[1][0], at2[4]) > 1_000_000
        assert transfer(made[1][0], c1, made[0][1][6]) > 1_000_000
        (network,) = meshnet(h1, "status")["networks"]
        assert [f["host"] for f in network["fallen"]] == ["h2"]
        assert "not answered" in network["fallen"][0]["why"]
        assert network["in_sync"]
        assert network["probes"]["lost"] > 0
        (h2_document,) = [d for d in meshnet(h1, "hosts") if d["id"] == "h2"]
        assert h2_document["path_why"].keys() == {"prod"}
        routes = h1.run(["ip", "route", "show", "proto", "109"]).stdout
        assert routes.count(f"dev {TUN}") == 1
        assert "h2 by udp" in h1.run([*CLIENT, "status"]).stdout
        assert "prod udp (fallback)" in h1.run([*CLIENT, "hosts"]).stdout
        with lossless(c1, at2[4], at2[6]):
            unblock(h2)
            began = time.monotonic()
            wait_until(lambda: not fallen(lab), 40, "both are back")
            back_s = time.monotonic() - began
            print(f"both are back {back_s:.1f} s after it was unblocked")
            assert back_s > 5
            assert_all_reach_all(made)
    assert f"dev {TUN}" not in h1.run(["ip", "route", "show", "proto", "109"]).stdout
    for host in lab.hosts:
        wait_in_sync(host, peers=2)
    network = meshnet(h3, "status")["networks"][0]
    assert network["fallen"] == []
    # Some may be: its first probes may have come before the others had the network.
    assert network["probes"]["lost"] < network["probes"]["sent"] / 10
    assert network["probes"]["rtt_ms"]["max"] < 1000
    print(f"h3's probes: {network['probes']}")


def test_an_agent_that_goes_moves_nobody(make_lab: MakeLab) -> None:
    lab = make_lab(3)
    h1, h2, _ = lab.hosts
    create_network(lab, "prod", *SUBNETS, "--fallback", "auto")
    made = containers(lab.hosts, "prod")
    (c1, at1), (c2, at2), (c3, at3) = made
    block(h2, h1, PORT)
    pair = {("h1", "h2"), ("h2", "h1")}
    wait_until(lambda: fallen(lab) == pair, DEADLINE_S, "both moved")
    with lossless(c1, at2[4], at3[4]), lossless(c2, at1[6]), lossless(c3, at1[4]):
        h1.kill_agent()
        time.sleep(7)  # longer than it takes to find a way dead
        assert set(paths(h2).items()) == {("h1", "udp"), ("h3", "vxlan")}
        assert set(paths(lab.hosts[2]).values()) == {"vxlan"}
        h1.start_agent()
        status = wait_in_sync(h1, peers=2)
        assert status["kernel"]["writes"] == 0
        assert fallen(lab) == pair
        time.sleep(5)
        assert fallen(lab) == pair
        assert meshnet(h1, "status")["kernel"]["writes"] == 0


@pytest.mark.parametrize("family", [4, 6])
def test_a_way_that_loses_large_packets_is_left(make_lab: MakeLab, family: int) -> None:
    lab = make_lab(2, underlay_family=family)
    h1, h2 = lab.hosts
    create_network(lab, "prod", *SUBNETS, "--fallback", "auto")
    (c1, _), (c2, at2) = containers(lab.hosts, "prod")
    mtu = int(json.loads(c1.run(["ip", "-j", "link", "show", "eth0"]).stdout)[0]["mtu"])
    largest = ("-M", "do", "-s", str(mtu - 28))
    assert ping(c1, at2[4], *largest)
    block(h2, h1, PORT, longer_than=1000)
    assert not ping(c1, at2[4], *largest)
    wait_until(lambda: ("h1", "h2") in fallen(lab), DEADLINE_S, "h1 moved")
    assert "full MTU" in meshnet(h1, "status")["networks"][0]["fallen"][0]["why"]
    assert ping(c1, at2[4], *largest)
    assert transfer(c1, c2, at2[6]) > 1_000_000
    # Small packets reach h2 by VXLAN, so what h2 sends arrives.
    assert fallen(lab) == {("h1", "h2")}


def test_nobody_moves_to_a_fallback_that_is_dead_too(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    h1, h2 = lab.hosts
    create_network(lab, "prod", *SUBNETS, "--fallback", "auto")
    (c1, _), (_, at2) = containers(lab.hosts, "prod")
    assert ping(c1, at2[4])
    block(h2, h1, f"{{ {PORT}, {FALLBACK_PORT} }}")
    time.sleep(8)
    assert set(all_paths(lab).values()) == {"vxlan"}
    unblock(h2)
    wait_until(lambda: ping(c1, at2[4]), DEADLINE_S, "packets arrive again")
    assert set(all_paths(lab).values()) == {"vxlan"}


def test_a_userspace_host_and_direct_routes_beside_a_fallback(make_lab: MakeLab) -> None:
    lab = make_lab(3)
    h1, _, h3 = lab.hosts
    h3.stop_agent()
    h3.start_agent(["--vxlan", "userspace"])
    create_network(lab, "prod", *SUBNETS, "--fallback", "auto")
    made = containers(lab.hosts, "prod")
    assert_all_reach_all(made)
    time.sleep(6)
    assert paths(h1) == {"h2": "vxlan", "h3": "vxlan"}
    assert paths(h3) == {"h1": "udp", "h2": "udp"}
    assert meshnet(h3, "status")["networks"][0]["fallen"] == []
    (counted,) = meshnet(h1, "network", "inspect", "prod")["vtep"]["peers"]
    assert counted["host"] == "h2"
    meshnet(
        h1, "network", "create", "back", "--subnet", "10.43.0.0/16", "--fallback", "auto",
        "--direct-routing", "--vni", 5000,
    )  # fmt: skip
    wait_in_sync(h1, peers=2)
    attach(h1.spawn_container(), h1, "back")
    assert {d["path"].get("back") for d in meshnet(h1, "hosts") if d["path"]} == {"direct"}
    message = meshnet(
        h1, "network", "create", "bad", "--subnet", "10.44.0.0/16", "--mode", "udp",
        "--fallback", "auto", status=2,
    )  # fmt: skip
    assert "no fallback" in message
