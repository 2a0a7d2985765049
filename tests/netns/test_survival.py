"""The data path outlives the control plane, and is repaired when somebody breaks it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest

from meshnet.errors import AgentUnreachableError
from meshnet.lab.poll import wait_until
from meshnet.lab.process import process_netns_id
from tests.netns.mesh import (
    Document,
    PingStream,
    address_of,
    attach,
    create_network,
    lossless,
    meshnet,
    ping,
    wait_in_sync,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
SUBNETS = ("--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48")


def alive(host: LabHost) -> dict[str, bool]:
    """Who is alive, as one host sees it."""
    return {d["id"]: d["alive"] for d in meshnet(host, "hosts")}


def is_whole(host: LabHost) -> bool:
    """Whether a host hears the store, and all hosts are alive (not: were when it last heard)."""
    return bool(meshnet(host, "status")["store"]["connected"]) and all(alive(host).values())


def kernel_state(host: LabHost) -> str:
    """All that a restart must not rewrite, as the kernel prints it."""
    commands = (
        "ip nexthop",
        "ip route show proto 109",
        "ip -6 route show proto 109",
        "ip neigh show nud permanent",
        "bridge fdb show dev mnv4097",
        "ip -br addr show dev mnb4097",
        "nft -s list table inet meshnet",
    )
    # The order of tables that are hashes means nothing.
    return "\n".join("\n".join(sorted(host.run(c.split()).stdout.splitlines())) for c in commands)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_agent_ends_and_returns_without_a_packet_lost(make_lab: MakeLab, how: str) -> None:
    lab = make_lab(2)
    create_network(lab, "prod", *SUBNETS)
    h1, h2 = lab.hosts
    one, two = h1.spawn_container(), h2.spawn_container()
    mine, theirs = attach(one, h1, "prod"), attach(two, h2, "prod")
    before = kernel_state(h1)
    with lossless(one, address_of(theirs)), lossless(two, address_of(mine, 6)):
        if how == "kill":
            h1.kill_agent()
        else:
            assert h1.stop_agent() == 0
        assert ping(one, address_of(theirs, 6))
        assert kernel_state(h1) == before
        if how == "stop":
            wait_until(lambda: not alive(h2)["h1"], 5, "h1 is seen stopped")
        monitor = h1.popen(["ip", "monitor", "link", "address", "route", "neigh", "nexthop"])
        h1.start_agent()
        status = wait_in_sync(h1, peers=1)
    assert status["kernel"]["writes"] == 0
    monitor.terminate()
    changes = [line for line in monitor.communicate(timeout=5)[0].splitlines() if "mn" in line]
    # Neighbours that this host resolved itself come and go; permanent ones are ours.
    resolved = re.compile("REACHABLE|STALE|DELAY|PROBE|INCOMPLETE")
    assert [line for line in changes if not resolved.search(line)] == []
    assert kernel_state(h1) == before
    assert meshnet(h1, "endpoint", "ls")[0]["address"] == mine["address"]
    wait_until(lambda: alive(h2)["h1"], 5, "h1 is alive again")


def test_store_outage_of_many_lease_times(make_lab: MakeLab) -> None:
    lab = make_lab(2, agent_args=["--lease-ttl", "2"])
    create_network(lab, "prod", *SUBNETS)
    h1, h2 = lab.hosts
    one, two = h1.spawn_container(), h2.spawn_container()
    attach(one, h1, "prod")
    theirs = attach(two, h2, "prod")
    subnets = {d["id"]: d["subnets"] for d in meshnet(h1, "hosts")}
    with lossless(one, address_of(theirs)):
        lab.etcd.stop()
        wait_until(lambda: not meshnet(h1, "status")["store"]["connected"], 15, "outage noticed")
        # Attaching and detaching need no store.
        late = h1.spawn_container()
        attach(late, h1, "prod")
        assert ping(late, address_of(theirs))
        meshnet(h1, "network", "create", "dev", "--subnet", "10.50.0.0/16", status=8)
        deadline = time.monotonic() + 8
        wait_until(lambda: time.monotonic() > deadline, 10, "four lease times")
        lab.etcd.start()
        lab.etcd.wait_healthy(20)
        for host in lab.hosts:
            wait_until(lambda: is_whole(host), 30, "hosts are connected and alive again")  # noqa: B023
    assert {d["id"]: d["subnets"] for d in meshnet(h2, "hosts")} == subnets
    wait_until(lambda: len(meshnet(h2, "endpoint", "ls")) == 3, 20, "the late endpoint is listed")
    wait_in_sync(h1, peers=1)


def test_host_joins_and_leaves_for_good(make_lab: MakeLab) -> None:
    lab = make_lab(3)
    create_network(lab, "prod", *SUBNETS)
    containers = [host.spawn_container() for host in lab.hosts]
    for container, host in zip(containers, lab.hosts, strict=True):
        attach(container, host, "prod")
    h4 = lab.add_host("h4")
    wait_in_sync(h4, peers=3)
    newcomer = h4.spawn_container()
    endpoint = attach(newcomer, h4, "prod")
    for container in containers:
        assert ping(container, address_of(endpoint, 4))
        assert ping(container, address_of(endpoint, 6))
    h1 = lab.host("h1")
    assert "is alive" in meshnet(h1, "host", "rm", "h4", status=5)
    subnet = meshnet(h4, "hosts")[-1]["subnets"]["prod"]
    assert meshnet(h1, "status")["notes"] == []
    assert h4.stop_agent() == 0
    wait_until(lambda: not alive(h1)["h4"], 5, "h4 is seen stopped")
    (note,) = meshnet(h1, "status")["notes"]
    assert note.startswith("no agent runs on h4")
    assert ping(containers[0], address_of(endpoint))  # stopped is not gone
    forgotten = meshnet(h1, "host", "rm", "h4")["endpoints"]
    assert [e["id"] for e in forgotten] == [endpoint["id"]]
    for host in lab.hosts[:3]:
        wait_until(
            lambda: subnet not in kernel_state(host),  # noqa: B023
            5,
            "objects of h4 are gone",
        )
        assert str(h4.underlay_ip) not in kernel_state(host)
        wait_in_sync(host, peers=2)
    assert "h4" not in alive(h1)
    assert all(e["host"] != "h4" for e in meshnet(h1, "endpoint", "ls"))
    (there,) = (e for e in meshnet(h1, "endpoint", "ls") if e["host"] == "h2")
    said = meshnet(h1, "endpoint", "publish", there["name"], "8080:80", status=4)
    assert f"endpoint {there['name']} is on host h2" in said
    assert "does not exist" in meshnet(h1, "host", "rm", "h4", status=4)


def test_dead_hosts_routes_stay_for_the_grace_period(make_lab: MakeLab) -> None:
    lab = make_lab(2, agent_args=["--lease-ttl", "2", "--grace", "4"])
    create_network(lab, "prod", *SUBNETS)
    h1, h2 = lab.hosts
    subnet = meshnet(h1, "hosts")[1]["subnets"]["prod"]
    h2.kill_agent()
    wait_until(lambda: not alive(h1)["h2"], 10, "the lease ran out")
    assert subnet in kernel_state(h1)
    wait_until(lambda: subnet not in kernel_state(h1), 10, "the grace period ended")
    assert meshnet(h1, "hosts")[1]["subnets"]["prod"] == subnet
    h2.start_agent()
    wait_until(lambda: subnet in kernel_state(h1), 10, "the route is back")


def test_a_host_forgotten_by_mistake_goes_on_where_it_was(make_lab: MakeLab) -> None:
    """Its endpoints still run: it takes the subnet that they are in, not the lowest free one."""
    lab = make_lab(3, agent_args=["--lease-ttl", "2"])
    create_network(lab, "prod", *SUBNETS)
    for host in lab.hosts:
        wait_in_sync(host, peers=2)
    subnets = {d["id"]: d["subnets"]["prod"] for d in meshnet(lab.hosts[0], "hosts")}
    lowest, witness, forgotten = sorted(lab.hosts, key=lambda h: ip_network(subnets[h.name]))
    one, two = witness.spawn_container(), forgotten.spawn_container()
    attach(one, witness, "prod")
    theirs = attach(two, forgotten, "prod")
    forgotten.kill_agent()
    assert lowest.stop_agent() == 0
    wait_until(lambda: not alive(witness)[forgotten.name], 10, "it counts as dead")
    for host in (lowest, forgotten):
        meshnet(witness, "host", "rm", host.name)
    forgotten.start_agent()
    wait_in_sync(witness, peers=1)
    (now,) = (d for d in meshnet(witness, "hosts") if d["id"] == forgotten.name)
    assert now["subnets"]["prod"] == subnets[forgotten.name]
    wait_until(lambda: ping(one, address_of(theirs, 4)), 5, "a ping")
    assert ping(one, address_of(theirs, 6))


DAMAGE = {
    "route": "ip route del {subnet}",
    "route replaced": "ip route replace blackhole {subnet} proto 109",
    "IPv6 route": "ip -6 route del {subnet6}",
    "neighbour": "ip neigh del {vtep} dev mnv4097",
    "FDB entry": "bridge fdb del {mac} dev mnv4097 dst {underlay} self",
    "nexthop": "ip nexthop flush proto 109",
    "VXLAN device": "ip link del mnv4097",
    "VXLAN device down": "ip link set mnv4097 down",
    "bridge address": "ip addr del {gateway} dev mnb4097",
    "bridge": "ip link del mnb4097",
    "nft table": "nft delete table inet meshnet",
    "nft rules": "nft flush ruleset",
    "nft rule added": "nft add rule inet meshnet postrouting counter drop",
    "VTEP MAC": "ip link set mnv4097 address 02:00:00:00:00:01",
    "MTU": "ip link set mnb4097 mtu 1300",
    "endpoint link": "ip link del {link}",
    "endpoint port": "ip link set {link} nomaster",
    "endpoint link down": "ip link set {link} down",
}


def damage_words(host: LabHost, endpoint: Document) -> dict[str, str]:
    """What `DAMAGE`'s commands name: objects for host h2, and an endpoint of this host."""
    hosts = {d["id"]: d for d in meshnet(host, "hosts")}
    subnet = hosts["h2"]["subnets"]["prod"]
    octets = [int(o) for o in subnet.partition("/")[0].split(".")]
    return {
        "subnet": subnet,
        "subnet6": hosts["h2"]["subnets6"]["prod"],
        "vtep": subnet.partition("/")[0],
        "mac": "02:6d:" + ":".join(f"{o:02x}" for o in octets),
        "underlay": hosts["h2"]["underlay_ip"],
        "gateway": f"{endpoint['gateway']}/24",
        "link": f"mne{endpoint['id']}",
    }


def test_damage_by_hand_is_mended_by_event(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    create_network(lab, "prod", *SUBNETS)
    h1, h2 = lab.hosts
    one, two = h1.spawn_container(), h2.spawn_container()
    mine, theirs = attach(one, h1, "prod"), attach(two, h2, "prod")
    words = damage_words(h1, mine)
    wait_in_sync(h1, peers=1)
    before = kernel_state(h1)
    for what, command in DAMAGE.items():
        h1.run(command.format(**words).split())
        started = time.monotonic()
        # The whole state is as before (links' indices differ, of which the state has none), long
        # before the next resync.
        wait_until(lambda: is_repaired(h1, before), 5, f"{what} is mended")
        print(f"{what}: mended in {(time.monotonic() - started) * 1000:.0f} ms")
        wait_until(lambda: ping(one, address_of(theirs, 4)), 5, f"a ping after {what}")
        assert ping(one, address_of(theirs, 6)), what
    wait_in_sync(h1, peers=1)


def is_repaired(host: LabHost, before: str) -> bool:
    """Whether a host's kernel state is as before, but for the ids of nexthop objects."""
    try:
        now = kernel_state(host)
    except subprocess.CalledProcessError:
        return False
    return _without_ids(now) == _without_ids(before)


def _without_ids(state: str) -> str:
    return "\n".join(sorted(re.sub(r"\b(nh)?id \d+", "id", state).splitlines()))


def test_underlay_address_gone_and_back(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    create_network(lab, "prod", *SUBNETS)
    h1, h2 = lab.hosts
    one, two = h1.spawn_container(), h2.spawn_container()
    attach(one, h1, "prod")
    theirs = attach(two, h2, "prod")
    before = kernel_state(h1)
    h1.run(["ip", "addr", "del", f"{h1.underlay_ip}/16", "dev", "eth0"])
    wait_until(lambda: "is on no link" in str(meshnet(h1, "status")["errors"]), 5, "it is said")
    assert not meshnet(h1, "status")["networks"][0]["in_sync"]
    h1.run(["ip", "addr", "add", f"{h1.underlay_ip}/16", "dev", "eth0"])
    wait_in_sync(h1, peers=1)
    assert kernel_state(h1) == before
    assert ping(one, address_of(theirs))


def test_second_agent_with_the_same_id_is_refused(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    create_network(lab, "prod", *SUBNETS)
    h1, h2 = lab.hosts
    assert h2.stop_agent() == 0
    command = [
        *["python", "-m", "meshnet_agent", "--etcd", lab.etcd_url, "--host-id", "h1"],
        *["--underlay-ip", str(h2.underlay_ip), "--run-dir", str(h2.run_dir)],
        *["--state-dir", str(h2.state_dir)],
    ]
    done = h2.run(command, check=False)
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"held by an agent at underlay address {h1.underlay_ip}" in done.stderr
    assert alive(h1)["h1"]
    wait_in_sync(h1, peers=1)


def test_process_end_frees_its_endpoint(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    create_network(lab, "prod", *SUBNETS)
    (host,) = lab.hosts
    container = host.spawn_container()
    endpoint = attach(container, host, "prod")
    # Another process of the namespace keeps the endpoint when the first one ends.
    heir = container.popen(["sleep", "100"])
    netns = process_netns_id(container.pid)
    wait_until(lambda: process_netns_id(heir.pid) == netns, 5, "the heir has entered")
    subprocess.run(["kill", "-9", str(container.pid)], check=True)
    wait_until(
        lambda: meshnet(host, "endpoint", "ls")[0]["pid"] != container.pid, 5, "the heir is named"
    )
    assert ping(host, address_of(endpoint))
    heir.kill()
    wait_until(lambda: meshnet(host, "endpoint", "ls") == [], 5, "the endpoint is freed")
    wait_until(lambda: "mne" not in host.run(["ip", "link"]).stdout, 5, "its link is gone")
    assert not list((host.state_dir / "endpoints").glob("*.json"))


def test_endpoints_that_ended_while_the_agent_was_down(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    create_network(lab, "prod", *SUBNETS)
    (host,) = lab.hosts
    stays, goes = host.spawn_container(), host.spawn_container()
    kept = attach(stays, host, "prod")
    attach(goes, host, "prod")
    host.kill_agent()
    goes.end()
    # What a crash in the middle of an attach leaves: a link without a record.
    host.run(["ip", "link", "add", "mne0123456789ab", "type", "veth", "peer", "name", "left"])
    host.start_agent()
    assert [e["id"] for e in meshnet(host, "endpoint", "ls")] == [kept["id"]]
    assert ping(host, address_of(kept))
    assert "mne0123456789ab" not in host.run(["ip", "link"]).stdout
    status = wait_in_sync(host, peers=0)
    assert status["kernel"]["writes"] == 0


def test_pings_are_counted_by_the_test_itself(make_lab: MakeLab) -> None:
    """`PingStream` sees a loss: the tests above can fail."""
    lab = make_lab(2, start_agents=False)
    h1, h2 = lab.hosts
    stream = PingStream(h1, str(h2.underlay_ip))
    assert ping(h1, str(h2.underlay_ip))
    h2.run(["ip", "link", "set", "eth0", "down"])
    assert not ping(h1, str(h2.underlay_ip))
    sent, lost = stream.stop()
    assert lost > 50
    assert sent > lost


def test_wiped_store_changes_nothing(make_lab: MakeLab) -> None:
    """An etcd that has lost its data says that all networks are gone; no agent believes it."""
    lab = make_lab(2, agent_args=["--lease-ttl", "2"])
    create_network(lab, "prod", *SUBNETS)
    h1, h2 = lab.hosts
    one, two = h1.spawn_container(), h2.spawn_container()
    attach(one, h1, "prod")
    theirs = attach(two, h2, "prod")
    before = [kernel_state(h) for h in lab.hosts]
    with lossless(one, address_of(theirs)):
        lab.etcd.kill()
        shutil.rmtree(lab.base_dir / "etcd" / "data")
        lab.etcd.start()
        lab.etcd.wait_healthy(20)
        for host in lab.hosts:
            wait_until(
                lambda: "etcd is empty" in str(meshnet(host, "status")["store"]["error"]),  # noqa: B023
                30,
                "the empty store is refused",
            )
            assert not meshnet(host, "status")["store"]["connected"]
        # Nothing was written to it, and an agent that starts now does not believe it, either.
        assert lab.etcd.ctl("get", "--prefix", "/meshnet/", "--keys-only") == ""
        h1.kill_agent()
        with pytest.raises(AgentUnreachableError, match="etcd is empty"):
            h1.start_agent()
        assert [kernel_state(h) for h in lab.hosts] == before
    # A mesh that somebody else made there is not this host's mesh, either.
    lab.etcd.ctl("put", "/meshnet/v1/mesh-id", "other")
    with pytest.raises(AgentUnreachableError, match="etcd holds mesh other"):
        h1.start_agent()
    # The operator's word: this host joins that one.
    (h1.state_dir / "mesh.json").unlink()
    h1.start_agent()
    assert meshnet(h1, "network", "ls") == []


def test_store_restored_from_an_older_copy_is_refused(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    (host,) = lab.hosts
    data = lab.base_dir / "etcd" / "data"
    lab.etcd.stop()
    shutil.copytree(data, lab.base_dir / "copy")
    lab.etcd.start()
    lab.etcd.wait_healthy(20)
    wait_until(lambda: is_whole(host), 30, "the agent is back")
    create_network(lab, "prod", *SUBNETS)
    before = kernel_state(host)
    lab.etcd.stop()
    shutil.rmtree(data)
    (lab.base_dir / "copy").rename(data)
    lab.etcd.start()
    lab.etcd.wait_healthy(20)
    wait_until(
        lambda: "restored from an older copy" in str(meshnet(host, "status")["store"]["error"]),
        30,
        "the older store is refused",
    )
    assert kernel_state(host) == before
    assert meshnet(host, "network", "ls")[0]["name"] == "prod"


def test_a_host_with_endpoints_keeps_its_id(make_lab: MakeLab) -> None:
    """The default is the hostname, which may change under an agent that is started again."""
    lab = make_lab(2)
    h1, h2 = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    one, two = h1.spawn_container(), h2.spawn_container()
    address = address_of(attach(one, h1, "prod"))
    attach(two, h2, "prod")
    with lossless(two, address):
        h1.stop_agent()
        with pytest.raises(AgentUnreachableError, match="start it with --host-id h1"):
            h1.start_agent(["--host-id", "renamed"])
        assert {h["id"] for h in meshnet(h2, "hosts")} == {"h1", "h2"}
        h1.start_agent()
    one.end()
    wait_until(lambda: len(meshnet(h1, "endpoint", "ls")) == 1, 10, "the endpoint is freed")
    h1.stop_agent()
    h1.start_agent(["--host-id", "renamed"])  # nothing is attached: it may be another


def test_two_agents_in_one_place(make_lab: MakeLab, tmp_path: Path) -> None:
    """One namespace, one run directory, one state directory: one agent."""
    lab = make_lab(2)
    h1, h2 = lab.hosts
    assert h2.stop_agent() == 0
    base = ["python", "-m", "meshnet_agent", "--etcd", lab.etcd_url, "--host-id", "other"]
    for host, run_dir, state_dir, words in (
        (h1, tmp_path / "run", tmp_path / "state", "manages this network namespace"),
        (h2, h1.run_dir, tmp_path / "state", "run directory"),
        (h2, tmp_path / "run", h1.state_dir, "state directory"),
    ):
        options = ["--underlay-ip", str(host.underlay_ip)]
        options += ["--run-dir", str(run_dir), "--state-dir", str(state_dir)]
        done = host.run([*base, *options], check=False)
        assert done.returncode == 5
        assert words in done.stderr
    assert h1.is_agent_running()
