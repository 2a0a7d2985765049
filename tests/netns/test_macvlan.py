"""Mode ``macvlan``: endpoints on the physical network, which here is the lab's switch."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_interface
from typing import TYPE_CHECKING

import pytest

from meshnet.cli.client import Client
from meshnet.errors import AgentUnreachableError, ConflictError
from meshnet.lab.poll import wait_until
from tests.netns.mesh import (
    BRIEFLY,
    Document,
    address_of,
    attach,
    captured,
    meshnet,
    ping,
    wait_in_sync,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from meshnet.lab.host import LabContainer, LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
GATEWAY, GATEWAY6 = "10.255.0.1", "fd00:255::1"
EACH = int(os.environ.get("MESHNET_TEST_ENDPOINTS", "30"))
"""Endpoints of each host that attach at the same instant."""


def create(lab: Lab, *options: str, addresses: str = "10.255.8.1-10.255.8.250") -> Document:
    """Network ``phys`` on the lab's switch, up on all hosts."""
    document: Document = meshnet(
        lab.hosts[0], "network", "create", "phys", "--mode", "macvlan",
        "--subnet", "10.255.0.0/16", "--range", addresses, "--gateway", GATEWAY,
        *(() if "--parent" in options else ("--parent", "eth0")), *options,
    )  # fmt: skip
    return document


def held(lab: Lab) -> dict[str, Document]:
    """What etcd has of the pool, by address."""
    prefix = "/meshnet/v1/addresses/phys/"
    lines = lab.etcd.ctl("get", "--prefix", prefix).splitlines()
    keys, values = lines[::2], lines[1::2]
    return {k.removeprefix(prefix): json.loads(v) for k, v in zip(keys, values, strict=True)}


def own_addresses(container: LabContainer) -> set[str]:
    """The IPv4 addresses that are in a container's namespace."""
    links = json.loads(container.run(["ip", "-j", "-4", "address"]).stdout)
    return {a["local"] for link in links for a in link.get("addr_info", ())}


def test_endpoints_are_machines_on_the_physical_network(make_lab: MakeLab, tmp_path: Path) -> None:
    from scapy.layers.inet import ICMP, IP

    lab = make_lab(2)
    h1, h2 = lab.hosts
    outsider = lab.add_host("h3", agent=False)
    lab.switch.run(["ip", "address", "add", f"{GATEWAY6}/64", "dev", "br0", "nodad"])
    for number, host in enumerate((h1, h2, outsider), 1):
        address = f"fd00:255::1:{number}/64"
        host.run(["ip", "address", "add", address, "dev", "eth0", "nodad"])
    network = create(
        lab, "--subnet", "fd00:255::/64", "--range", "fd00:255::8:1-fd00:255::8:ffff",
        "--gateway", GATEWAY6,
    )  # fmt: skip
    assert network["mtu"] == 1500
    one, two = h1.spawn_container(), h2.spawn_container()
    sibling = h1.spawn_container()
    mine, theirs, third = attach(one, h1, "phys"), attach(two, h2, "phys"), None
    third = attach(sibling, h1, "phys")
    assert mine["address"] == "10.255.8.1/16"
    assert mine["address6"] == "fd00:255::8:1/64"
    assert (mine["gateway"], mine["gateway6"]) == (GATEWAY, GATEWAY6)
    with captured(lab, tmp_path / "wire.pcap", "icmp") as packets:
        for version in (4, 6):
            gateway = GATEWAY if version == 4 else GATEWAY6
            for container, other in ((one, theirs), (two, mine), (sibling, mine), (one, third)):
                assert ping(container, address_of(other, version))
            assert ping(one, gateway)
            assert ping(outsider, address_of(mine, version))
            # A host hears other hosts' endpoints, and not its own: macvlan forbids it.
            assert ping(h2, address_of(mine, version))
            assert not ping(h1, address_of(mine, version), *BRIEFLY)
        assert ping(one, lab.outside_ip)
    sources = {p[IP].src for p in packets if ICMP in p and p[IP].dst == lab.outside_ip}
    assert sources == {address_of(mine)}  # nobody masqueraded
    # Nothing of it is in the hosts' own namespaces.
    assert "mn" not in h1.run(["ip", "-br", "link"]).stdout
    assert "meshnet" not in h1.run(["nft", "list", "tables"]).stdout
    for setting in ("accept_ra", "accept_dad"):
        path = f"/proc/sys/net/ipv6/conf/eth0/{setting}"
        assert one.run(["cat", path]).stdout == "0\n"
    status = wait_in_sync(h1)
    assert (status["networks"][0]["endpoints"], status["set_aside"]) == (2, [])
    # The end of a process frees its addresses, and so does a detach; both are free for others.
    assert {v["endpoint"] for v in held(lab).values()} == {d["id"] for d in (mine, theirs, third)}
    one.end()
    meshnet(h1, "detach", sibling.pid, "--net", "phys")
    assert own_addresses(sibling) == set()
    mine_left = {address_of(theirs), address_of(theirs, 6)}
    wait_until(lambda: held(lab).keys() == mine_left, 10, "the addresses are free")
    again = attach(sibling, h1, "phys", "--ip", third["address"].partition("/")[0])
    assert again["mac"] == third["mac"]
    meshnet(h1, "network", "rm", "phys", status=5)
    # A restart takes over what lives, also by an heir, and frees what does not.
    heir = sibling.popen(["sleep", "infinity"])
    h1.kill_agent()
    h2.kill_agent()
    os.kill(sibling.pid, 9)
    two.end()
    h1.start_agent()
    h2.start_agent()
    (left,) = meshnet(h1, "endpoint", "ls")
    assert (left["id"], left["pid"]) == (again["id"], heir.pid)
    wait_until(lambda: len(held(lab)) == 2, 10, "what a dead process had is free")
    assert ping(outsider, address_of(again))
    assert meshnet(h1, "status")["kernel"]["writes"] == 0


def test_addresses_that_cannot_be_had(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    h1, h2 = lab.hosts
    outsider = lab.add_host("h3", agent=False)
    outsider.run(["ip", "address", "add", "10.255.8.1/16", "dev", "eth0"])
    (link,) = json.loads(outsider.run(["ip", "-j", "link", "show", "eth0"]).stdout)
    create(lab, addresses="10.255.8.1-10.255.8.3")
    one, two, three = h1.spawn_container(), h2.spawn_container(), h1.spawn_container()
    # A machine outside the mesh has the first address: it is set aside and reported.
    mine = attach(one, h1, "phys")
    assert mine["address"] == "10.255.8.2/16"
    aside = [{"network": "phys", "address": "10.255.8.1", "mac": link["address"]}]
    assert meshnet(h1, "status")["set_aside"] == aside
    assert held(lab)["10.255.8.1"] == {"v": 1, "host": "", "held_by": link["address"]}
    assert "10.255.8.1" in h1.run(["meshnet", "status"]).stdout
    refused = meshnet(h2, "attach", two.pid, "--net", "phys", "--ip", "10.255.8.1", status=5)
    assert link["address"] in refused
    refused = meshnet(h2, "attach", two.pid, "--net", "phys", "--ip", "10.255.8.2", status=5)
    assert "host h1" in refused
    attach(two, h2, "phys", "--ip", "10.255.8.3")
    assert "range" in meshnet(h1, "attach", three.pid, "--net", "phys", status=6)
    assert own_addresses(three) == set()
    # Routers and hosts keep theirs, also within a range.
    meshnet(h1, "attach", three.pid, "--net", "phys", "--ip", "10.255.9.9", status=2)
    # A host that is gone for good holds none.
    h2.stop_agent()
    wait_until(lambda: not _is_alive(h1, "h2"), 5, "h2 is seen stopped")
    meshnet(h1, "host", "rm", "h2")
    assert held(lab).keys() == {"10.255.8.1", "10.255.8.2"}
    # Its containers still run: the wire says so.
    assert "range" in meshnet(h1, "attach", three.pid, "--net", "phys", status=6)
    assert len(meshnet(h1, "status")["set_aside"]) == 2


def _is_alive(host: LabHost, name: str) -> bool:
    return any(d["alive"] for d in meshnet(host, "hosts") if d["id"] == name)


def test_while_etcd_is_down(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    (h1,) = lab.hosts
    create(lab)
    one, two = h1.spawn_container(), h1.spawn_container()
    attach(one, h1, "phys")
    lab.etcd.stop()
    meshnet(h1, "attach", two.pid, "--net", "phys", status=8)
    meshnet(h1, "detach", one.pid, "--net", "phys")
    assert own_addresses(one) == own_addresses(two) == set()
    lab.etcd.start()
    lab.etcd.wait_healthy(20)
    wait_until(lambda: held(lab) == {}, 30, "the address is free")
    endpoint = attach(two, h1, "phys")
    # An agent that is killed when the link is made and not yet recorded undoes that.
    h1.kill_agent()
    record = h1.state_dir / "endpoints" / f"{endpoint['id']}.json"
    record.rename(record.with_suffix(".draft"))
    h1.start_agent()
    assert own_addresses(two) == set()
    assert list(record.parent.iterdir()) == []
    wait_until(lambda: held(lab) == {}, 10, "the address is free")


def test_two_hosts_attach_many_at_the_same_instant(make_lab: MakeLab) -> None:
    """No address is given twice or lost, and an interrupted attach leaves nothing."""
    lab = make_lab(2)
    h1 = lab.hosts[0]
    create(lab, addresses="10.255.8.1-10.255.11.250")
    for host in lab.hosts:
        wait_in_sync(host)
    containers = _containers(lab)
    done = _attach_at_once(containers)
    assert len(done) == 2 * EACH
    _check(lab, containers, done)
    # One process twice: one of them waits for nothing.
    twice = h1.spawn_container()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(_attach_by_api, h1, twice) for _ in range(2)]
        errors = [answer.exception() for answer in answers]
    assert [type(e) for e in errors if e is not None] == [ConflictError]
    done += [answer.result() for answer in answers if answer.exception() is None]
    containers.append((h1, twice))
    more = _containers(lab)
    done += _attach_at_once(more, kill=h1)
    h1.start_agent()
    listed = _check(lab, [*containers, *more], done)
    # What was cut short can be done again.
    for container in [c for host, c in more if host.name == h1.name and c.pid not in listed][:1]:
        attach(container, h1, "phys")


def _containers(lab: Lab) -> list[tuple[LabHost, LabContainer]]:
    return [(host, host.spawn_container()) for host in lab.hosts for _ in range(EACH)]


def _attach_by_api(host: LabHost, container: LabContainer) -> Document:
    body = {"pid": container.pid, "network": "phys"}
    document: Document = Client(str(host.socket_path)).post("attach", body=body)
    return document


def _attach_at_once(
    containers: Sequence[tuple[LabHost, LabContainer]], kill: LabHost | None = None
) -> list[Document]:
    """Attach all, and kill a host's agent when it has attached one; what was answered."""
    first = threading.Event()

    def attach_one(item: tuple[LabHost, LabContainer]) -> Document | None:
        host, container = item
        try:
            document = _attach_by_api(host, container)
        except AgentUnreachableError:
            return None  # it was killed
        if kill is not None and host.name == kill.name:
            first.set()
        return document

    with ThreadPoolExecutor(len(containers)) as pool:
        answers = [pool.submit(attach_one, item) for item in containers]
        if kill is not None:
            first.wait(60)
            kill.kill_agent()
        return [d for answer in answers if (d := answer.result()) is not None]


def _check(
    lab: Lab, containers: Sequence[tuple[LabHost, LabContainer]], done: Sequence[Document]
) -> dict[int, Document]:
    """Agents, etcd and containers say the same; returns the endpoints by process."""
    listed = {d["pid"]: d for host in lab.hosts for d in meshnet(host, "endpoint", "ls")}
    assert {d["id"] for d in done} <= {d["id"] for d in listed.values()}
    addresses = {d["id"]: str(ip_interface(d["address"]).ip) for d in listed.values()}
    assert len(set(addresses.values())) == len(addresses)
    wait_until(
        lambda: {v["endpoint"]: k for k, v in held(lab).items()} == addresses,
        10,
        "etcd has what endpoints have",
    )
    for _, container in containers:
        document = listed.get(container.pid)
        assert own_addresses(container) == ({addresses[document["id"]]} if document else set())
    return listed


def test_a_host_reaches_its_own_endpoints(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    h1, h2 = lab.hosts
    create(lab, "--host-access", "--mtu", "1400")
    one, two = h1.spawn_container(), h2.spawn_container()
    mine, theirs = attach(one, h1, "phys"), attach(two, h2, "phys")
    wait_until(lambda: ping(h1, address_of(mine)), 10, "a host reaches its own endpoint")
    assert ping(h1, address_of(theirs))
    shims = {v["host"]: k for k, v in held(lab).items() if "endpoint" not in v}
    assert shims.keys() == {"h1", "h2"}
    assert ping(one, shims["h1"])
    assert ping(two, shims["h1"])
    status = wait_in_sync(h1)
    # It is made again, and a restart leaves it as it is.
    h1.run(["ip", "link", "del", "mns4097"])
    wait_until(lambda: ping(h1, address_of(mine)), 10, "the shim is back")
    h1.kill_agent()
    h1.start_agent()
    status = wait_in_sync(h1)
    assert status["kernel"]["writes"] == 0
    meshnet(h1, "detach", one.pid, "--net", "phys")
    route = ["ip", "route", "show", "proto", "109"]
    wait_until(lambda: h1.run(route).stdout == "", 10, "the route to the endpoint is gone")
    meshnet(h2, "detach", two.pid, "--net", "phys")
    wait_until(lambda: meshnet(h1, "endpoint", "ls") == [], 10, "nobody has an endpoint")
    meshnet(h1, "network", "rm", "phys")
    assert held(lab) == {}
    for host in lab.hosts:
        wait_until(lambda: "mns" not in host.run(["ip", "link"]).stdout, 10, "the shim is gone")  # noqa: B023


def looks_of(container: LabContainer) -> list[tuple[str, int, bool, set[str]]]:
    """MAC, MTU, state and addresses of a container's links."""
    links = json.loads(container.run(["ip", "-j", "address"]).stdout)
    return [
        (ln["address"], ln["mtu"], "UP" in ln["flags"], {a["local"] for a in ln["addr_info"]})
        for ln in links
    ]


def make_parent(host: LabHost) -> None:
    host.run(["ip", "link", "add", "phys0", "mtu", "1300", "type", "veth", "peer", "far0"])
    for link in ("far0", "phys0"):
        host.run(["ip", "link", "set", link, "up"])


def test_the_parent_comes_and_goes(make_lab: MakeLab) -> None:
    lab = make_lab(1, agent_args=["--resync", "1"])
    (h1,) = lab.hosts
    create(lab, "--parent", "phys0")
    container = h1.spawn_container()
    assert "phys0" in meshnet(h1, "attach", container.pid, "--net", "phys", status=5)
    assert "phys0" in str(meshnet(h1, "status")["networks"][0]["errors"])
    make_parent(h1)
    wait_in_sync(h1)
    endpoint = attach(container, h1, "phys")
    assert endpoint["mtu"] == 1300
    # The parent takes its macvlans along; they come back when it does, as they were.
    before = looks_of(container)
    h1.run(["ip", "link", "del", "phys0"])
    wait_until(lambda: "is gone" in str(meshnet(h1, "status")["networks"]), 10, "it is said")
    make_parent(h1)

    wait_until(lambda: looks_of(container) == before, 10, "the endpoint is back")
    wait_in_sync(h1)
    # And so it does when somebody in the container removes it.
    container.run(["ip", "link", "del", "eth0"])
    wait_until(lambda: looks_of(container) == before, 10, "the endpoint is back")
    assert held(lab) == {
        "10.255.8.1": {"v": 1, "host": "h1", "endpoint": endpoint["id"]},
    }
