"""What the client refuses: each with its exit status and one line, and nothing is changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.mesh import (
    address_of,
    attach,
    create_network,
    meshnet,
    ping,
    run_client,
    wait_in_sync,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from meshnet.lab.commands import Namespace
    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root


@pytest.fixture
def host(make_lab: MakeLab) -> Iterator[LabHost]:
    """One host with network ``prod``; afterwards it must be in sync."""
    lab = make_lab(1)
    create_network(lab, "prod", "--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48")
    yield lab.host("h1")
    wait_in_sync(lab.host("h1"))


def namespace_of(container: Namespace) -> str:
    """All that an attach changes in a namespace."""
    commands = ("ip -j addr", "ip -j route", "ip -6 -j route")
    return "\n".join(container.run(c.split()).stdout for c in commands)


def test_networks(host: LabHost) -> None:
    before = meshnet(host, "network", "ls")

    def refused(status: int, words: str, *arguments: str) -> None:
        assert words in meshnet(host, "network", "create", *arguments, status=status)
        assert meshnet(host, "network", "ls") == before

    refused(5, "overlaps 10.42.0.0/16 of network prod", "dev", "--subnet", "10.42.7.0/24")
    refused(5, "overlaps fd00:42::/48", "dev", "--subnet", "fd00:42:0:9::/64")
    refused(5, "network prod exists", "prod", "--subnet", "10.50.0.0/16")
    refused(
        5, "VNI 4097 belongs to network prod", "dev", "--subnet", "10.9.0.0/16", "--vni", "4097"
    )
    refused(9, "underlay address of host h1", "dev", "--subnet", "10.255.0.0/16")
    refused(2, "give a CIDR", "dev", "--subnet", "10.42.0.1/16")
    refused(2, "give a CIDR", "dev", "--subnet", "banana")
    refused(2, "another meaning in meshnet run", "none", "--subnet", "10.9.0.0/16")
    refused(2, "has no --port", "dev", "--subnet", "10.9.0.0/16", "--mode", "bridge", "--port", "4")
    macvlan = ("dev", "--subnet", "10.9.0.0/16", "--mode", "macvlan", "--parent")
    refused(2, "'longer-than-a-link' is not a link name", *macvlan, "longer-than-a-link")
    refused(2, "ends before it begins", *macvlan, "eth0", "--range", "10.9.0.9-10.9.0.3")
    refused(2, "has a scope", "dev", "--subnet", "fd00:77::%x/48")
    refused(2, "does not fit", "dev", "--subnet", "10.50.0.0/16", "--host-prefix", "12")
    refused(2, "give one IPv4 CIDR", "dev", "--subnet", "10.5.0.0/16", "--subnet", "10.6.0.0/16")
    refused(2, "VNI", "dev", "--subnet", "10.50.0.0/16", "--vni", "16777216")
    refused(2, "MTU 100", "dev", "--subnet", "10.50.0.0/16", "--mtu", "100")
    refused(2, "network name", "../dev", "--subnet", "10.50.0.0/16")
    refused(2, "--parent", "dev", "--subnet", "10.50.0.0/16", "--mode", "macvlan")
    refused(2, "required: --subnet", "dev")
    refused(2, "invalid choice", "dev", "--subnet", "10.50.0.0/16", "--mode", "gre")
    refused(2, "invalid int", "dev", "--subnet", "10.50.0.0/16", "--vni", "x")
    assert "nothere" in meshnet(host, "network", "rm", "nothere", status=4)
    assert "nothere" in meshnet(host, "network", "inspect", "nothere", status=4)
    assert "is empty" in meshnet(host, "network", "rm", "", status=2)


def test_endpoints(host: LabHost) -> None:
    container, other = host.spawn_container(), host.spawn_container()
    empty = namespace_of(other)

    def refused(status: int, words: str, pid: int, *options: str, net: str = "prod") -> None:
        before = meshnet(host, "endpoint", "ls")
        message = meshnet(host, "attach", pid, "--net", net, *options, status=status)
        assert words in message
        assert meshnet(host, "endpoint", "ls") == before
        assert namespace_of(other) == empty

    refused(4, "process 4194000 does not exist", 4194000)
    refused(2, "pid", 0)
    refused(4, "network nothere", other.pid, net="nothere")
    refused(9, "own network namespace", host.agent_pid)
    refused(9, "own network namespace", os.getpid())  # the machine's, which no agent here manages
    mine = attach(container, host, "prod", "--name", "web")
    refused(5, "already attached to network prod", container.pid)
    refused(5, "is taken", other.pid, "--ip", address_of(mine))
    refused(5, "is taken", other.pid, "--ip", address_of(mine, 6))
    refused(5, "name web is taken", other.pid, "--name", "web")
    refused(2, "outside", other.pid, "--ip", "10.43.0.1")
    refused(2, "network, gateway or broadcast", other.pid, "--ip", mine["gateway"])
    refused(2, "not an IP address", other.pid, "--ip", "10.42")
    refused(2, "not an IP address", other.pid, "--ip", "fd00:42::7%x")
    refused(2, "interface name", other.pid, "--ifname", "a/b")
    other.run(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"])
    empty = namespace_of(other)
    refused(5, "already has a link eth0", other.pid)
    other.run(["ip", "link", "del", "eth0"])
    assert "has no endpoint" in meshnet(host, "detach", other.pid, "--net", "prod", status=4)
    assert "has 1 endpoints" in meshnet(host, "network", "rm", "prod", status=5)
    assert ping(host, address_of(mine))


def test_zombie_is_no_process(host: LabHost) -> None:
    child = subprocess.Popen(["true"])
    wait_until(lambda: "Z" in _state(child.pid), 5, "the zombie")
    assert (
        "does not exist" in meshnet(host, "attach", child.pid, "--net", "prod", status=4)
        or child.wait()
    )
    child.wait()


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_attach_and_detach_leave_no_trace(host: LabHost) -> None:
    container = host.spawn_container()
    before = namespace_of(container)
    document = attach(container, host, "prod", "--ifname", "net0", "--name", "web")
    assert document["ifname"] == "net0"
    assert document["pid"] == container.pid
    link = json.loads(container.run(["ip", "-j", "addr", "show", "net0"]).stdout)[0]
    assert link["mtu"] == document["mtu"]
    assert link["address"] == document["mac"]
    assert {
        f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["scope"] == "global"
    } == {
        document["address"],
        document["address6"],
    }
    assert f"default via {document['gateway']} dev net0" in container.run(["ip", "route"]).stdout
    assert f"default via {document['gateway6']}" in container.run(["ip", "-6", "route"]).stdout
    assert container.run(["cat", "/proc/sys/net/ipv6/conf/net0/accept_ra"]).stdout == "0\n"
    meshnet(host, "detach", container.pid, "--net", "prod")
    assert namespace_of(container) == before
    again = attach(container, host, "prod")
    assert again["address"] != document["address"]  # a freed address rests
    assert (
        attach(host.spawn_container(), host, "prod", "--ip", address_of(document))["address"]
        == (document["address"])
    )


def test_second_network_does_not_steal_the_default_route(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    create_network(lab, "dev", "--subnet", "10.43.0.0/16")
    h1, h2 = lab.hosts
    container = h1.spawn_container()
    first = attach(container, h1, "prod")
    second = attach(container, h1, "dev", "--ifname", "eth1")
    assert (first["default_route"], second["default_route"]) == (True, False)
    routes = container.run(["ip", "route"]).stdout
    assert routes.count("default") == 1
    assert f"10.43.0.0/16 via {second['gateway']} dev eth1" in routes
    peers = [attach(h2.spawn_container(), h2, name) for name in ("prod", "dev")]
    for peer in peers:
        assert ping(container, address_of(peer))
    meshnet(h1, "detach", container.pid, "--net", "dev")
    assert "eth1" not in container.run(["ip", "link"]).stdout
    assert ping(container, address_of(peers[0]))
    lonely = h1.spawn_container()
    third = attach(lonely, h1, "prod", "--no-default-route")
    assert third["default_route"] is False
    assert "default" not in lonely.run(["ip", "route"]).stdout
    assert ping(lonely, address_of(peers[0]))


def test_each_ip_version_has_its_own_default_route(make_lab: MakeLab) -> None:
    """And when the network that has one goes, it moves to the next that wanted it."""
    lab = make_lab(1)
    h1 = lab.host("h1")
    for name, *cidrs in (
        ("four", "10.42.0.0/16"),
        ("dual", "10.43.0.0/16", "fd00:43::/48"),
        ("late", "10.44.0.0/16", "fd00:44::/48"),
        ("shy", "10.45.0.0/16", "fd00:45::/48"),
    ):
        create_network(lab, name, *[option for cidr in cidrs for option in ("--subnet", cidr)])
    container = h1.spawn_container()

    def defaults() -> tuple[str, str]:
        found = [container.run(["ip", v, "route", "show", "default"]).stdout for v in ("-4", "-6")]
        assert all(text.count("default") <= 1 for text in found)
        four, six = (text.partition(" dev ")[2].split(" ")[0].strip() for text in found)
        return four, six

    def join(name: str, *options: str) -> list[int]:
        document = attach(container, h1, name, "--ifname", name, *options)
        assert document["default_route"] == bool(document["default_versions"])
        versions: list[int] = document["default_versions"]
        return versions

    assert join("shy", "--no-default-route") == []
    assert join("four") == [4]
    assert join("dual", "--publish", "8080:80") == [6]
    assert join("late") == []
    assert defaults() == ("four", "dual")
    meshnet(h1, "detach", container.pid, "--net", "four")
    assert defaults() == ("dual", "dual")
    h1.kill_agent()  # what is on disk says so, too
    h1.start_agent()
    ends = {e["network"]: e["default_versions"] for e in meshnet(h1, "endpoint", "ls")}
    assert ends == {"shy": [], "dual": [4, 6], "late": []}
    # Answers of its published port leave by it now, and need no masquerading.
    assert "10.43." not in h1.run(["nft", "list", "set", "inet", "meshnet", "no_default4"]).stdout
    meshnet(h1, "detach", container.pid, "--net", "dual")
    assert defaults() == ("late", "late")
    assert ping(container, lab.outside_ip)
    meshnet(h1, "detach", container.pid, "--net", "late")
    assert defaults() == ("", "")


def test_full_pools(make_lab: MakeLab) -> None:
    lab = make_lab(3)
    # Two host subnets for three hosts, with two addresses each beside the gateway: /30 has one.
    meshnet(
        lab.host("h1"), "network", "create", "tiny", "--subnet", "10.9.0.0/28", "--host-prefix", 29
    )
    owned = {h.name: _subnet_of(h, "tiny") for h in lab.hosts}
    with_subnet = [h for h in lab.hosts if owned[h.name]]
    assert len(with_subnet) == 2
    (without,) = [h for h in lab.hosts if not owned[h.name]]
    container = without.spawn_container()
    message = meshnet(without, "attach", container.pid, "--net", "tiny", status=6)
    assert "all 2 subnets of /29 in 10.9.0.0/28 are reserved" in message
    assert any("are reserved" in e for e in meshnet(without, "status")["networks"][0]["errors"])
    host = with_subnet[0]
    addresses = {attach(host.spawn_container(), host, "tiny")["address"] for _ in range(5)}
    assert len(addresses) == 5
    message = meshnet(host, "attach", host.spawn_container().pid, "--net", "tiny", status=6)
    assert "all 5 addresses" in message


def _subnet_of(host: LabHost, network: str) -> str | None:
    def settled() -> list[str | None] | None:
        status = meshnet(host, "status")["networks"]
        own = next(d for d in meshnet(host, "hosts") if d["id"] == host.name)
        subnet = own["subnets"].get(network)
        return [subnet] if status and (subnet or status[0]["errors"]) else None

    return (wait_until(settled, 10, f"{host.name} has settled") or [None])[0]


def test_garbage_in_the_store(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    h1, h2 = lab.hosts
    one, two = h1.spawn_container(), h2.spawn_container()
    attach(one, h1, "prod")
    theirs = attach(two, h2, "prod")
    root = "/meshnet/v1/mesh/"
    garbage = {
        f"{root}networks/prod": "{",
        f"{root}networks/evil": '{"v":1,"name":"; rm -rf /"}',
        f"{root}hosts/h2": '{"v":9}',
        f"{root}hosts/x": "\x01\x02",
        f"{root}subnets/prod/10.42.0.0-8": '{"v":1,"host":"h2"}',
        f"{root}nonsense": "1",
    }
    for key, value in garbage.items():
        lab.etcd.ctl("put", key, value)
    for host in lab.hosts:
        wait_until(
            lambda: len(meshnet(host, "status")["bad_values"]) >= len(garbage) - 1,  # noqa: B023
            5,
            "bad values are named",
        )
        keys = {b["key"] for b in meshnet(host, "status")["bad_values"]}
        assert keys >= garbage.keys() - {f"{root}subnets/prod/10.42.0.0-8"}
    assert ping(one, address_of(theirs))
    # What was known stays in force; put right, all is well again.
    assert meshnet(h1, "network", "ls")[0]["name"] == "prod"
    lab.etcd.ctl("del", f"{root}nonsense")
    wait_until(
        lambda: f"{root}nonsense" not in str(meshnet(h1, "status")["bad_values"]), 5, "it is gone"
    )


def test_a_restart_with_an_unreadable_network_deletes_nothing(make_lab: MakeLab) -> None:
    """A newer agent's format, say: what it stands for may exist."""
    lab = make_lab(2)
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    h1, h2 = lab.hosts
    one, two = h1.spawn_container(), h2.spawn_container()
    attach(one, h1, "prod")
    theirs = attach(two, h2, "prod")
    key = "/meshnet/v1/mesh/networks/prod"
    value = lab.etcd.ctl("get", "--print-value-only", key).strip()
    lab.etcd.ctl("put", key, '{"v":2}')
    h1.kill_agent()
    h1.start_agent()
    wait_until(lambda: key in str(meshnet(h1, "status")["errors"]), 5, "the hole is named")
    lab.etcd.ctl("put", "/meshnet/v1/mesh/nonsense", "1")  # any other change
    wait_until(lambda: "nonsense" in str(meshnet(h1, "status")["bad_values"]), 5, "it is seen")
    assert ping(one, address_of(theirs))
    assert len(meshnet(h1, "endpoint", "ls")) == 2
    lab.etcd.ctl("put", key, value)
    wait_in_sync(h1, peers=1)
    assert ping(one, address_of(theirs))


def test_small_mtu(make_lab: MakeLab) -> None:
    """Below 1280 bytes the kernel has no IPv6 on a link, nor settings for it."""
    lab = make_lab(2)
    create_network(lab, "slim", "--subnet", "10.42.0.0/16", "--mtu", "1000")
    h1, h2 = lab.hosts
    one, two = h1.spawn_container(), h2.spawn_container()
    attach(one, h1, "slim")
    assert ping(one, address_of(attach(two, h2, "slim")), "-s", "972", "-M", "do")


def test_unpublished_endpoint_is_published_again(make_lab: MakeLab) -> None:
    """A host that was removed while it was only paused takes back all that it had."""
    lab = make_lab(2, agent_args=["--lease-ttl", "2"])
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    h1, h2 = lab.hosts
    attach(h2.spawn_container(), h2, "prod")
    wait_until(lambda: len(meshnet(h1, "endpoint", "ls")) == 1, 5, "it is listed")
    subnets = meshnet(h1, "hosts")[1]["subnets"]
    os.kill(h2.agent_pid, signal.SIGSTOP)
    wait_until(lambda: not meshnet(h1, "hosts")[1]["alive"], 10, "h2 counts as dead")
    alive, dead = meshnet(h1, "hosts")
    assert alive["dead_s"] is None
    assert 0 <= dead["dead_s"] < 60
    assert "no, for " in run_client(h1, "hosts").stdout
    meshnet(h1, "host", "rm", "h2")
    assert meshnet(h1, "endpoint", "ls") == []
    os.kill(h2.agent_pid, signal.SIGCONT)
    wait_until(lambda: len(meshnet(h1, "endpoint", "ls")) == 1, 20, "it is listed again")
    wait_until(lambda: meshnet(h1, "hosts")[1]["subnets"] == subnets, 10, "its subnet is back")
    wait_until(lambda: "has 1 endpoints" in meshnet(h1, "network", "rm", "prod", status=5), 5, "it")


def test_agent_settings(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(1, start_agents=False)
    host = lab.host("h1")

    def refused(status: int, words: str, *options: str, **env: str) -> None:
        command = [
            *["python", "-m", "meshnet_agent", "--run-dir", str(tmp_path / "run")],
            *["--state-dir", str(tmp_path / "state"), *options],
        ]
        done = host.run(command, check=False, env=env)
        assert done.returncode == status, done.stderr
        assert words in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr

    etcd, address = ("--etcd", lab.etcd_url), ("--underlay-ip", str(host.underlay_ip))
    config = tmp_path / "agent.toml"
    config.write_text("lease-tll = 15\n")
    refused(2, "unknown key 'lease-tll'", *etcd, *address, "--config", str(config))
    refused(2, "MESHNET_LEASE_TLL is unknown", *etcd, *address, MESHNET_LEASE_TLL="15")
    refused(2, "lease-ttl is 'soon'", *etcd, *address, "--lease-ttl", "soon")
    refused(2, "neither is given", *etcd)
    refused(4, "is on no link", *etcd, "--underlay-ip", "192.0.2.7")
    refused(4, "link nope", *etcd, "--underlay-dev", "nope")
    refused(8, "etcd", "--etcd", "http://10.255.0.9:2379", *address)
    assert not (tmp_path / "run" / "agent.sock").exists()
    assert "mn" not in host.run(["ip", "-br", "link"]).stdout
    assert host.run(["nft", "list", "tables"]).stdout == ""


def test_no_agent(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(1, start_agents=False)
    host = lab.host("h1")
    assert "no agent answers" in meshnet(host, "status", status=3)
    assert "no agent answers" in meshnet(host, "--socket", tmp_path / "x", "hosts", status=3)


def test_remove_network_leaves_nothing(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    before = [
        h.run(["ip", "-br", "addr"]).stdout + h.run(["ip", "route"]).stdout for h in lab.hosts
    ]
    create_network(lab, "prod", "--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48")
    h1, h2 = lab.hosts
    container = h2.spawn_container()
    attach(container, h2, "prod")
    wait_until(lambda: meshnet(h1, "endpoint", "ls"), 5, "the endpoint is listed")
    assert "on h2" in meshnet(h1, "network", "rm", "prod", status=5)
    meshnet(h2, "detach", container.pid, "--net", "prod")
    wait_until(lambda: meshnet(h1, "endpoint", "ls") == [], 5, "the endpoint is unlisted")
    meshnet(h1, "network", "rm", "prod")
    for host, state in zip(lab.hosts, before, strict=True):
        wait_until(lambda: "mn" not in host.run(["ip", "-br", "link"]).stdout, 5, "links are gone")  # noqa: B023
        wait_until(lambda: host.run(["nft", "list", "tables"]).stdout == "", 5, "table is gone")  # noqa: B023
        assert host.run(["ip", "-br", "addr"]).stdout + host.run(["ip", "route"]).stdout == state
        assert host.run(["ip", "nexthop"]).stdout == ""
        assert "proto 109" not in host.run(["ip", "-6", "route"]).stdout
    assert meshnet(h1, "network", "ls") == []
