"""Hosts that start while etcd is silent: from what they had on disk, and whole when it answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from meshnet.codec.checksum import with_checksum
from meshnet.lab.poll import wait_until
from meshnet.system.files import write_whole
from tests.netns.mesh import address_of, attach, create_network, meshnet, wait_in_sync

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
_SAVED_S = 15
"""Within which what is known of the mesh is on disk."""


def saved(host: LabHost) -> dict[str, Any]:
    """What a host's file says; {}: there is none yet."""
    file = snapshot_file(host)
    return json.loads(file.read_bytes()) if file.exists() else {}


def snapshot_file(host: LabHost) -> Path:
    """The file in a host's state directory."""
    return host.state_dir / "snapshot.json"


def wait_saved(lab: Lab, revision: int) -> None:
    """Wait until every host has this revision on disk."""
    for host in lab.hosts:

        def has_it(host: LabHost = host) -> bool:
            return bool(saved(host).get("revision", 0) >= revision)

        wait_until(has_it, _SAVED_S, f"{host.name} has saved revision {revision}")


def revision_of(host: LabHost) -> int:
    """The store's revision, as a host knows it."""
    return int(meshnet(host, "status")["store"]["revision"])


def wait_connected(host: LabHost) -> None:
    """Wait until a host follows etcd again, and has its lease."""
    wait_until(lambda: meshnet(host, "status")["store"]["connected"], 40, "etcd is followed again")


def reboot(lab: Lab, name: str) -> LabHost:
    """What a power cut does to a host, and its next start."""
    lab.remove_host(name, keep_state=True)
    return lab.add_host(name)


@pytest.mark.parametrize("silence", ["stopped", "frozen"])
def test_a_reboot_during_an_outage(make_lab: MakeLab, silence: str) -> None:
    """The host forwards and attaches; when etcd answers, it is a member with the same subnets."""
    lab = make_lab(3)
    h1 = lab.hosts[0]
    create_network(lab, "prod", "--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48")
    there = attach(h1.spawn_container(), h1, "prod")
    subnets = {h["id"]: h["subnets"] for h in meshnet(h1, "hosts")}
    wait_saved(lab, revision_of(h1))
    lab.etcd.pause() if silence == "frozen" else lab.etcd.stop()
    try:
        h3 = reboot(lab, "h3")
        store = meshnet(h3, "status")["store"]
        assert store["connected"] is False
        assert store["from_disk_s"] >= 0
        container = h3.spawn_container()
        here = attach(container, h3, "prod")
        for version in (4, 6):
            container.run(["ping", "-c1", "-W5", address_of(there, version)])
        assert "etcd" in meshnet(h3, "network", "create", "x", "--subnet", "10.9.0.0/16", status=8)
    finally:
        lab.etcd.resume() if silence == "frozen" else lab.etcd.start()
    wait_connected(h3)
    assert meshnet(h3, "status")["store"]["from_disk_s"] is None
    wait_in_sync(h3, peers=2)
    assert {h["id"]: h["subnets"] for h in meshnet(h1, "hosts")} == subnets
    listed = {e["id"] for e in meshnet(h1, "endpoint", "ls")}
    wait_until(
        lambda: here["id"] in {e["id"] for e in meshnet(h1, "endpoint", "ls")},
        *(20, f"what was attached meanwhile is published (was: {listed})"),
    )
    container.run(["ping", "-c1", "-W5", address_of(there)])


def test_what_changed_during_the_outage_counts(make_lab: MakeLab) -> None:
    """A restart from an old file deletes nothing; then etcd's word counts: hosts came and went."""
    lab = make_lab(3)
    h1, _, h3 = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    create_network(lab, "old", "--subnet", "10.43.0.0/16")
    wait_saved(lab, revision_of(h1))
    h3.kill_agent()
    meshnet(h1, "network", "rm", "old")
    meshnet(h1, "network", "create", "new", "--subnet", "10.44.0.0/16")
    lab.etcd.stop()
    h3.start_agent()
    h3.wait_agent_ready()
    assert {n["name"] for n in meshnet(h3, "status")["networks"]} == {"prod", "old"}
    container = h3.spawn_container()
    attach(container, h3, "old")
    lab.etcd.start()
    wait_until(
        lambda: {n["name"] for n in meshnet(h3, "status")["networks"]} == {"prod", "new"},
        *(40, "the networks are those of etcd"),
    )
    wait_in_sync(h3, peers=2)
    assert meshnet(h3, "endpoint", "ls") == [], "its network is gone"


def test_endpoints_of_a_network_that_the_file_lacks_live_on(make_lab: MakeLab) -> None:
    """A file from before the network was created must not free what is attached to it."""
    lab = make_lab(2)
    h1, h2 = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    wait_saved(lab, revision_of(h1))
    old = snapshot_file(h2).read_bytes()
    create_network(lab, "new", "--subnet", "10.44.0.0/16")
    there = attach(h1.spawn_container(), h1, "new")
    container = h2.spawn_container()
    attach(container, h2, "new")
    h2.kill_agent()
    lab.etcd.stop()
    write_whole(snapshot_file(h2), old)
    h2.start_agent()
    h2.wait_agent_ready()
    ping = ["ping", "-c1", "-W5", address_of(there)]
    container.run(ping)
    lab.etcd.start()
    wait_connected(h2)
    wait_in_sync(h2, peers=1)
    container.run(ping)
    assert len([e for e in meshnet(h2, "endpoint", "ls") if e["host"] == "h2"]) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "other mesh", "other host"])
def test_a_file_that_cannot_be_used(make_lab: MakeLab, damage: str) -> None:
    """The start is as without one: it needs etcd, and says so."""
    lab = make_lab(1)
    (host,) = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    wait_saved(lab, revision_of(host))
    host.stop_agent()
    file = snapshot_file(host)
    raw = file.read_bytes()
    document = json.loads(raw)
    del document["crc32"]
    file.write_bytes(
        {
            "cut": raw[: len(raw) // 2],
            "flipped": raw.replace(b"10.42", b"10.47", 1),
            "other mesh": with_checksum(json.dumps(document | {"mesh": "another"}).encode()),
            "other host": with_checksum(json.dumps(document | {"host": "h9"}).encode()),
        }[damage]
    )
    lab.etcd.stop()
    host.start_agent(wait=False)
    wait_until(lambda: not host.is_agent_running(), 20, "the agent ended, for etcd is silent")
    lab.etcd.start()
    host.start_agent()
    host.wait_agent_ready()
    assert [n["name"] for n in meshnet(host, "status")["networks"]] == ["prod"]
