"""Userspace VTEPs with agents: networks of mode ``udp``, and hosts without VXLAN."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from meshnet.vtep.native import library
from meshnet.wire import mtu
from tests.netns.mesh import (
    address_of,
    attach,
    create_network,
    lossless,
    meshnet,
    ping,
    wait_in_sync,
)
from tests.netns.vteps import going_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.host import LabContainer, LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

SUBNETS = ("--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48")
TUN = "mnu4097"
_LARGEST = {4: 1450 - 28, 6: 1450 - 48}


def vtep_pid(host: LabHost) -> int | None:
    """The process that serves the TUN; None: one is just writing that it does."""
    text = (host.run_dir / "vtep" / TUN / "lock").read_text()
    return int(json.loads(text)["pid"]) if text else None


def containers(hosts: list[LabHost], network: str) -> list[tuple[LabContainer, dict[int, str]]]:
    """A container on each host, with its addresses by IP version."""
    found = []
    for host in hosts:
        container = host.spawn_container()
        document = attach(container, host, network)
        found.append((container, {v: address_of(document, v) for v in (4, 6)}))
    return found


def assert_all_reach_all(made: list[tuple[LabContainer, dict[int, str]]]) -> None:
    for source, _ in made:
        for target, addresses in made:
            if target is source:
                continue
            for version, address in addresses.items():
                assert ping(source, address), f"{address} is not reached"
                largest = ("-M", "do", "-s", str(_LARGEST[version]))
                assert ping(source, address, *largest), f"{address}: the largest packet"


def gso_max_bytes(container: LabContainer) -> int:
    """The largest super-packet that its link to the network takes."""
    (link,) = json.loads(container.run(["ip", "-d", "-j", "link", "show", "dev", "eth0"]).stdout)
    return int(link["gso_max_size"])


def transfer(source: LabContainer, target: LabContainer, address: str) -> int:
    """Bytes of a second of TCP."""
    server = target.popen(["iperf3", "-s", "-1", "--logfile", "/dev/null"])
    try:
        wait_until(lambda: ":5201" in target.run(["ss", "-ltn"]).stdout, 5, "iperf3 listens")
        argv = ["iperf3", "-c", address, "-t", "1", "-J"]
        document = json.loads(source.run(argv, timeout=20).stdout)
    finally:
        server.terminate()
        server.wait(timeout=5)
    return int(document["end"]["sum_received"]["bytes"])


def test_a_userspace_host_in_a_vxlan_network(make_lab: MakeLab) -> None:
    lab = make_lab(3)
    h1, h2, _ = lab.hosts
    h2.stop_agent()
    h2.start_agent(["--vxlan", "userspace"])
    create_network(lab, "prod", *SUBNETS)
    made = containers(lab.hosts, "prod")
    assert_all_reach_all(made)
    expected = [mtu.DEFAULT_GSO_MAX_BYTES, mtu.gso_max_bytes(1450), mtu.DEFAULT_GSO_MAX_BYTES]
    assert [gso_max_bytes(container) for container, _ in made] == expected
    for one, other in ((0, 1), (1, 0), (0, 2)):
        assert transfer(made[one][0], made[other][0], made[other][1][4]) > 1_000_000
    shown = {d["id"]: d["datapath"]["prod"] for d in meshnet(h1, "hosts")}
    assert shown == {"h1": "kernel", "h2": "userspace", "h3": "kernel"}
    assert "mnv4097" not in h2.run(["ip", "-br", "link"]).stdout


def test_a_udp_network(make_lab: MakeLab) -> None:
    lab = make_lab(3, agent_args=["--lease-ttl", "3"])
    create_network(lab, "prod", *SUBNETS, "--mode", "udp")
    made = containers(lab.hosts, "prod")
    assert_all_reach_all(made)
    assert {gso_max_bytes(container) for container, _ in made} == {mtu.gso_max_bytes(1450)}
    assert transfer(made[0][0], made[1][0], made[1][1][6]) > 1_000_000
    h1, _, h3 = lab.hosts
    shown = {d["id"]: d["datapath"]["prod"] for d in meshnet(h1, "hosts")}
    assert set(shown.values()) == {"userspace"}
    counted = meshnet(h1, "network", "inspect", "prod")["vtep"]
    assert counted["totals"]["tx_packets"] > 0
    assert {peer["host"] for peer in counted["peers"]} == {"h2", "h3"}
    # A host that is gone is not a member any longer.
    h3.kill_agent()
    wait_until(lambda: not meshnet(h1, "hosts")[2]["alive"], 30, "the lease of h3 ran out")
    meshnet(h1, "host", "rm", "h3")
    wait_in_sync(h1, peers=1)
    counted = meshnet(h1, "network", "inspect", "prod")["vtep"]
    assert {peer["host"] for peer in counted["peers"]} == {"h2"}


def test_a_network_that_goes_takes_its_process_along(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    create_network(lab, "prod", *SUBNETS, "--mode", "udp")
    pids = [vtep_pid(host) for host in lab.hosts]
    meshnet(lab.hosts[0], "network", "rm", "prod")

    def are_gone() -> bool:
        links = [host.run(["ip", "-br", "link"]).stdout for host in lab.hosts]
        return not any(TUN in found for found in links) and not any(
            os.path.exists(f"/proc/{pid}") for pid in pids
        )

    wait_until(are_gone, 10, "neither TUN nor process")


@pytest.mark.parametrize(("how", "engine"), [("kill", "native"), ("stop", "python")])
def test_the_data_path_outlives_the_agent(make_lab: MakeLab, how: str, engine: str) -> None:
    library.build()
    lab = make_lab(2, agent_args=["--vtep-engine", engine])
    create_network(lab, "prod", *SUBNETS, "--mode", "udp")
    (one, mine), (two, theirs) = containers(lab.hosts, "prod")
    h1 = lab.hosts[0]
    assert ping(one, theirs[4])
    pid = vtep_pid(h1)
    bulk = going_on(one, two, theirs[4])
    with lossless(one, theirs[4]), lossless(two, mine[6]), bulk:
        if how == "kill":
            h1.kill_agent()
        else:
            assert h1.stop_agent() == 0
        assert ping(one, theirs[6])
        h1.start_agent()
        status = wait_in_sync(h1, peers=1)
    assert vtep_pid(h1) == pid
    assert status["kernel"]["writes"] == 0


def test_another_engine_is_another_process(make_lab: MakeLab) -> None:
    library.build()
    lab = make_lab(1, agent_args=["--vtep-engine", "python"])
    create_network(lab, "prod", *SUBNETS, "--mode", "udp")
    h1 = lab.hosts[0]
    pid = vtep_pid(h1)
    h1.kill_agent()
    h1.start_agent(["--vtep-engine", "native"])
    wait_in_sync(h1)
    assert vtep_pid(h1) != pid
    assert b"native" in Path(f"/proc/{vtep_pid(h1)}/cmdline").read_bytes().split(b"\0")


def test_auto_takes_the_engine_in_c_and_leaves_what_runs(make_lab: MakeLab) -> None:
    """An upgrade that brings the engine in C interrupts no Python process."""
    library.build()
    lab = make_lab(1, agent_args=["--vtep-engine", "python"])
    create_network(lab, "prod", *SUBNETS, "--mode", "udp")
    h1 = lab.hosts[0]
    pid = vtep_pid(h1)
    h1.kill_agent()
    h1.start_agent(["--vtep-engine", "auto"])
    status = wait_in_sync(h1)
    assert status["host"]["vtep_engine"] == "native"
    assert (vtep_pid(h1), status["kernel"]["writes"]) == (pid, 0)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: vtep_pid(h1) not in (None, pid), 10, "another process serves the TUN")
    assert b"native" in Path(f"/proc/{vtep_pid(h1)}/cmdline").read_bytes().split(b"\0")


def test_a_process_that_is_killed_is_back_at_once(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    create_network(lab, "prod", *SUBNETS, "--mode", "udp")
    (one, _), (_, theirs) = containers(lab.hosts, "prod")
    assert ping(one, theirs[4])
    h1 = lab.hosts[0]
    pid = vtep_pid(h1)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    wait_until(lambda: vtep_pid(h1) not in (None, pid), 10, "another process")
    wait_until(lambda: ping(one, theirs[4]), 10, "packets arrive again")
    print(f"back after {time.monotonic() - began:.2f} s")
    wait_in_sync(h1, peers=1)


def test_networks_that_want_one_port(make_lab: MakeLab) -> None:
    lab = make_lab(1, agent_args=["--vxlan", "userspace"])
    h1 = lab.hosts[0]
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    meshnet(h1, "network", "create", "back", "--subnet", "10.43.0.0/16")
    errors = {n["name"]: n["errors"] for n in meshnet(h1, "status")["networks"]}
    assert errors["prod"] == []
    assert "4789" in errors["back"][0]
    assert "--port" in errors["back"][0]
    meshnet(h1, "network", "rm", "back")
    meshnet(h1, "network", "create", "back", "--subnet", "10.43.0.0/16", "--port", "4790")
    wait_in_sync(h1)
