"""Networks whose addresses something else has: it keeps them, and the rest of the mesh goes on."""

from __future__ import annotations

import json
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest

from meshnet.codec.networks import encode_network
from meshnet.lab.poll import wait_until
from tests.netns.mesh import (
    Document,
    address_of,
    attach,
    create_network,
    meshnet,
    ping,
    run_client,
    wait_in_sync,
)
from tests.values import make_network

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
PROD, OTHER = ("prod", "--subnet", "10.42.0.0/16"), ("other", "--subnet", "10.43.0.0/16")


def shell(host: LabHost, commands: str) -> None:
    for command in commands.split(";"):
        host.run(command.split())


def network_of(host: LabHost, name: str = "prod") -> Document:
    networks: list[Document] = meshnet(host, "status")["networks"]
    return next((n for n in networks if n["name"] == name), {"errors": [], "in_sync": False})


def wait_for_error(host: LabHost, words: str, name: str = "prod") -> None:
    def said() -> bool:
        network = network_of(host, name)
        return not network["in_sync"] and any(words in error for error in network["errors"])

    wait_until(said, 10, f"{host.name} says {words}")


def wait_for_sync(host: LabHost, name: str) -> None:
    wait_until(lambda: network_of(host, name)["in_sync"], 10, f"{name} in sync on {host.name}")


def has_route(host: LabHost, words: str) -> bool:
    return words in host.run(["ip", "route", "show", "proto", "109"]).stdout


def add_link(host: LabHost, name: str, address: str) -> None:
    """A bridge of somebody else's, up."""
    shell(host, f"ip link add {name} type bridge; ip address add {address} dev {name}; "
                f"ip link set {name} up")  # fmt: skip


def test_a_network_is_not_created_where_addresses_are_in_use(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    h1 = lab.host("h1")
    etcd = lab.underlay.etcd_ip()
    add_link(h1, "docker0", "172.30.5.1/24")
    add_link(h1, "wg0", "192.168.77.1/32")
    shell(h1, "ip route add 172.31.7.0/24 dev wg0 metric 50; "
              "ip route add 0.0.0.0/1 dev wg0 metric 60; "
              "ip route add 10.96.0.0/12 via 10.255.0.1; ip route del 0.0.0.0/1; "
              "ip -6 address add fd00:77::1/64 dev docker0 nodad")  # fmt: skip

    def refused(words: str, *cidrs: str, mode: str = "vxlan") -> None:
        options = [option for cidr in cidrs for option in ("--subnet", cidr)]
        message = meshnet(h1, "network", "create", "new", "--mode", mode, *options, status=9)
        assert words in message
        assert "choose another --subnet" in message
        assert meshnet(h1, "network", "ls") == []

    refused(f"contains {etcd}, an address of etcd", "10.255.0.0/24")
    refused("overlaps 10.255.0.0/16, the subnet of link eth0", "10.255.77.0/24", mode="bridge")
    refused("overlaps 10.255.0.0/16, the subnet of link eth0", "10.255.64.0/18", mode="udp")
    refused("172.30.5.1, an address of link docker0", "172.30.0.0/16")
    refused("overlaps 172.30.5.0/24, the subnet of link docker0", "172.30.5.128/25", mode="bridge")
    refused("172.31.7.0/24, to which this host has a route over link wg0", "172.31.0.0/16")
    refused("10.96.0.0/12, to which this host has a route over link eth0", "10.96.0.0/12")
    refused("fd00:77::1, an address of link docker0", "10.42.0.0/16", "fd00:77::/48")
    meshnet(h1, "network", "create", *PROD)
    # Behind a gateway there need not be anything.
    meshnet(h1, "network", "create", "inside", "--subnet", "10.97.0.0/16")
    # Networks are told apart from all else.
    message = meshnet(h1, "network", "create", "new", "--subnet", "10.42.0.0/16", status=5)
    assert "overlaps 10.42.0.0/16 of network prod" in message


def test_a_network_that_has_etcd_in_it_is_refused_and_can_be_removed(make_lab: MakeLab) -> None:
    """An older agent created it; it once cut every host off etcd."""
    lab = make_lab(2)
    create_network(lab, *OTHER)
    h1, h2 = lab.hosts
    one, two = h1.spawn_container(), h2.spawn_container()
    attach(one, h1, "other")
    theirs = attach(two, h2, "other")
    for mode in ("vxlan", "udp", "bridge"):
        network = make_network("bad", ("10.255.0.0/16",), 5000, port=5000)
        document = json.loads(encode_network(network)) | {"mode": mode}
        lab.etcd.ctl("put", "/meshnet/v1/mesh/networks/bad", json.dumps(document))
        for host in lab.hosts:
            wait_for_error(host, "an address of etcd", "bad")
            assert meshnet(host, "status")["store"]["connected"]
            assert not has_route(host, "10.255")
            wait_for_sync(host, "other")
        assert ping(one, address_of(theirs))
        message = meshnet(h1, "attach", h1.spawn_container().pid, "--net", "bad", status=5)
        assert "an address of etcd" in message
        meshnet(h2, "network", "rm", "bad")
        for host in lab.hosts:
            wait_in_sync(host, peers=1)


def test_links_and_routes_that_come_later(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    for network in (PROD, OTHER):
        create_network(lab, *network)
    h1, h2 = lab.hosts
    containers = [h1.spawn_container(), h2.spawn_container()]
    ends = {}
    for name in ("prod", "other"):
        attach(containers[0], h1, name, "--ifname", name)
        ends[name] = attach(containers[1], h2, name, "--ifname", name)

    def works(name: str, *options: str) -> bool:
        return ping(containers[0], address_of(ends[name]), *options)

    assert works("prod")
    own, theirs = (ip_network(h["subnets"]["prod"]) for h in meshnet(h1, "hosts"))
    # Hosts that reserve at the same instant may get any subnet.
    third = next(n for n in (3, 4, 5) if not {f"10.42.{n}.0/24"} & {str(own), str(theirs)})
    # In this host's own subnet, in another's, on a VPN, and for the whole network.
    changes = {
        f"ip address add {own[129]}/25 dev dummy": "an address of link dummy",
        f"ip address add {theirs[129]}/25 dev dummy": "host h2 is not reached from here",
        f"ip route add 10.42.{third}.0/24 dev dummy metric 50": "has a route over link dummy",
        "ip route add 10.42.0.0/16 dev dummy metric 50": "has a route over link dummy",
        "ip route add blackhole 10.42.0.0/16 metric 50": "has a route to nowhere",
        f"ip route add default via 10.42.{third}.1 dev dummy onlink metric 7": "a gateway on link",
    }
    for change, words in changes.items():
        shell(h1, "ip link add dummy type bridge; ip link set dummy up")
        shell(h1, change)
        wait_for_error(h1, words)
        assert "File exists" not in str(network_of(h1))
        assert not has_route(h1, str(theirs))
        wait_for_sync(h1, "other")
        assert works("other")
        if "blackhole" in change:
            shell(h1, "ip route del blackhole 10.42.0.0/16 metric 50")
        # Routes that go with their link go without a word from the kernel.
        shell(h1, "ip link del dummy")
        wait_in_sync(h1, peers=1)
        assert works("prod")


def test_a_host_reserves_no_subnet_of_its_own_links(make_lab: MakeLab) -> None:
    lab = make_lab(2, start_agents=False)
    h1, h2 = lab.hosts
    h1.start_agent()
    meshnet(h1, "network", "create", *PROD)
    add_link(h2, "virbr0", "10.42.1.1/24")
    h2.start_agent()
    for host in lab.hosts:
        wait_in_sync(host, peers=1)
    subnets = [h["subnets"]["prod"] for h in meshnet(h1, "hosts")]
    assert subnets == ["10.42.0.0/24", "10.42.2.0/24"]  # one after the other, so in order
    one, two = h1.spawn_container(), h2.spawn_container()
    attach(one, h1, "prod")
    assert ping(one, address_of(attach(two, h2, "prod")))
    assert "virbr0" in h2.run(["ip", "route", "get", "10.42.1.77"]).stdout


@pytest.mark.parametrize("mode", ["vxlan", "udp"])
def test_a_host_joins_with_an_address_in_a_network(make_lab: MakeLab, mode: str) -> None:
    """It has no part in that network; the others go on, and reach it on another network."""
    lab = make_lab(3, start_agents=False)
    h1, h2, h3 = lab.hosts
    for host in (h1, h2):
        host.start_agent()
    for name, *options in (PROD, OTHER):
        meshnet(h1, "network", "create", name, "--mode", mode, *options)
    for host in (h1, h2):
        wait_in_sync(host, peers=1)
    one, two, three = (host.spawn_container() for host in lab.hosts)
    attach(one, h1, "prod", "--ifname", "prod")
    theirs = attach(two, h2, "prod")
    mtu = meshnet(h1, "network", "inspect", "prod")["mtu"]
    owned = {h["subnets"]["prod"] for h in meshnet(h1, "hosts") if h["subnets"]}
    stranger = next(f"10.42.{n}.9" for n in range(7, 10) if f"10.42.{n}.0/24" not in owned)
    # The underlay's router leads to it.
    lab.switch.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
    lab.switch.run(["ip", "route", "add", f"{stranger}/32", "dev", "br0"])
    h3.run(["ip", "address", "del", "10.255.1.3/16", "dev", "eth0"])
    for address in (f"{stranger}/32", "10.255.1.3/16"):
        h3.run(["ip", "address", "add", address, "dev", "eth0"])
    h3.run(["ip", "route", "add", "default", "via", "10.255.0.1"])
    h3.start_agent(by_link=True)
    wait_for_error(h3, f"contains {stranger}, an address of link eth0")
    for host in (h1, h2):
        wait_for_error(host, f"{stranger}, the underlay address of host h3")
        assert not has_route(host, "10.42.0.0/16")
        assert "dev eth0" in host.run(["ip", "route", "get", stranger]).stdout
        assert meshnet(host, "network", "inspect", "prod")["mtu"] == mtu
        wait_for_sync(host, "other")
    assert ping(one, address_of(theirs), "-s", str(mtu - 28), "-M", "do")
    attach(one, h1, "other", "--ifname", "other")
    wait_for_sync(h3, "other")
    assert ping(one, address_of(attach(three, h3, "other")))
    h3.stop_agent()
    meshnet(h1, "host", "rm", "h3")
    for host in (h1, h2):
        wait_in_sync(host, peers=1)
        assert has_route(host, "10.42.0.0/16")


def test_a_network_is_up_when_its_tunnel_is(make_lab: MakeLab) -> None:
    """The bridge alone was enough once, and nobody was warned."""
    lab = make_lab(2)
    h1 = lab.host("h1")
    shell(h1, "ip link add vx type vxlan id 4097 dstport 4789 dev eth0; ip link set vx up")
    created = meshnet(h1, "network", "create", *PROD)
    assert "is not up on this host: the kernel refused" in created["error"]
    assert "mnv4097" in created["error"]
    container = h1.spawn_container()
    message = meshnet(h1, "attach", container.pid, "--net", "prod", status=5)
    assert "mnv4097" in message
    shell(h1, "ip link del vx")
    wait_in_sync(h1, peers=1, deadline_s=40)
    assert "warning" not in attach(container, h1, "prod")
    (theirs,) = (h["subnets"]["prod"] for h in meshnet(h1, "hosts") if h["id"] == "h2")
    # A routing daemon's, with the metric of ours: the kernel has one or the other.
    add_link(h1, "dummy", "192.168.9.1/24")
    shell(h1, f"ip route replace {theirs} dev dummy proto bird")
    wait_for_error(h1, theirs)
    warned = attach(h1.spawn_container(), h1, "prod")["warning"]
    assert warned.startswith("network prod does not work wholly on this host:")
    assert theirs in warned
    done = run_client(h1, "attach", h1.spawn_container().pid, "--net", "prod")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "meshnet: warning: network prod" in done.stderr
    shell(h1, "ip link del dummy")
    wait_in_sync(h1, peers=1, deadline_s=40)
    assert "warning" not in attach(h1.spawn_container(), h1, "prod")
