"""A host that ran version 0.1 is started again after a reboot, by this one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.containers import FOREVER, is_clean, leftovers, make_rootfs
from tests.netns.mesh import Document, meshnet, ping, wait_in_sync
from tests.recorded import readers
from tests.recorded.record import add_second_link

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
VERSION = "0.1"
H1_SUBNETS = {
    "prod": "10.42.0.0/24",
    "wide": "10.43.0.0/26",
    "six": "fd00:66::/64",
    "tun": "10.44.0.0/27",
}
MODES = {
    "prod": "vxlan",
    "wide": "vxlan",
    "six": "vxlan",
    "tun": "udp",
    "local": "bridge",
    "phys": "macvlan",
    "lan": "underlay-bridge",
}


def _fill_etcd(lab: Lab) -> None:
    """Put the recorded keys into the lab's etcd, which then is at least at their revision."""
    keys, revision = readers.etcd_keys(VERSION)
    for number in range(max(0, revision - len(keys))):
        lab.etcd.ctl("put", "/passed", str(number))
    for key, value, leased in keys:
        options = ("--lease", lab.etcd.ctl("lease", "grant", "3600").split()[1]) if leased else ()
        lab.etcd.ctl("put", key, value, *options)


def _fill_state(host: LabHost, service: Path) -> None:
    """Put the recorded state directory under a host, and make again what was too large for it."""
    replaced = {readers.STATE_DIR: host.state_dir, readers.SERVICE_DIR: service}
    readers.place_state(VERSION, host.state_dir, replaced)
    for layer in (host.state_dir / "images" / "layers").iterdir():
        (layer / "diff").mkdir()
        make_rootfs(layer / "diff")
        for name in ("srv", "data"):
            (layer / "diff" / name).mkdir()
    for volume in (host.state_dir / "volumes").iterdir():
        (volume / "data").mkdir()
    (host.state_dir / "volumes" / "named" / "data" / "seed").write_text("kept\n")


def _keys(lab: Lab, prefix: str) -> list[str]:
    found = lab.etcd.ctl("get", "--prefix", "--keys-only", f"/meshnet/v1/{prefix}").split()
    return [key.removeprefix(f"/meshnet/v1/{prefix}") for key in found]


def _containers(host: LabHost) -> dict[str, Document]:
    return {d["name"]: d for d in meshnet(host, "ps", "-a")}


def _states(host: LabHost) -> dict[str, tuple[str, int | None]]:
    return {name: (d["state"], d["exit_code"]) for name, d in _containers(host).items()}


def test_a_host_of_version_0_1_goes_on(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(2, start_agents=False)
    add_second_link(lab)
    h1, _ = lab.hosts
    (tmp_path / "rootfs").mkdir()
    make_rootfs(tmp_path / "rootfs")
    (tmp_path / "mine").mkdir()
    _fill_etcd(lab)
    _fill_state(h1, tmp_path)
    recorded = {str(f): f.read_bytes() for f in h1.state_dir.rglob("*.bad")}
    h1.start_agent()

    # What the mesh is: every network works, and this host keeps what is its own.
    status = wait_in_sync(h1)
    assert status["bad_values"] == []
    assert {n["name"]: n["mode"] for n in meshnet(h1, "network", "ls")} == MODES
    hosts = {d["id"]: d for d in meshnet(h1, "hosts")}
    assert hosts["h1"]["subnets"] == H1_SUBNETS
    assert hosts["h1"]["subnets6"] == {"prod": "fd00:42::/64"}
    assert hosts["h2"]["subnets"]["prod"] == "10.42.51.0/24"
    assert [hosts[h]["alive"] for h in ("h1", "h2")] == [True, True]
    assert (h1.state_dir / "instance").read_text() == "6a4066df374a231e"
    remembered = json.loads((h1.state_dir / "mesh.json").read_bytes())
    assert remembered["id"] == "8865316436719fb6"
    assert {str(f): f.read_bytes() for f in h1.state_dir.rglob("*.bad")} == recorded

    # Containers: their processes are gone, and what is to run always runs again.
    states = {
        "web": ("running", None),
        "side": ("exited", 255),
        "plain": ("exited", 255),
        "mapped": ("exited", 255),
        "made": ("exited", 255),
        "job": ("exited", 3),
        "halted": ("exited", 9),
    }  # one with --rm is gone
    wait_until(lambda: _states(h1) == states, 20, "containers are as after a reboot")
    web = _containers(h1)["web"]
    assert web["restarts"] == 1
    assert {e["network"]: (e["name"], e["published"]) for e in web["endpoints"]} == {
        "prod": ("web", ["8080:80/tcp", "127.0.0.1:5353:53/udp"]),
        "local": ("web.local", []),
    }
    details: dict[str, Any] = meshnet(h1, "inspect", "web")
    assert details["options"]["command"] == []
    assert (details["command"], details["labels"]) == (["sh", "-c", FOREVER], _LABELS)
    assert ping(h1, web["endpoints"][0]["address"].partition("/")[0])

    # Endpoints of processes that are gone are freed: on disk, in etcd, and in pools.
    ids = {e["id"] for e in web["endpoints"]}
    wait_until(
        lambda: {key.split("/")[-1] for key in _keys(lab, "endpoints/") if "/h1/" in key} == ids,
        20,
        "etcd has the endpoints that there are",
    )
    assert {f.stem for f in (h1.state_dir / "endpoints").glob("*.json")} == ids
    assert list((h1.state_dir / "endpoints").glob("*.draft")) == []
    assert [e["name"] for e in meshnet(h1, "endpoint", "ls") if e["host"] == "h2"] == ["far"]
    hosts_own = {"phys/10.254.8.1", "phys/10.254.8.2", "phys/fd00:254::8:1", "phys/fd00:254::8:2"}
    wait_until(
        lambda: set(_keys(lab, "addresses/")) == {*hosts_own, "phys/10.254.8.3"},
        20,
        "addresses are free, but for the hosts' own and one that is set aside",
    )

    # Images and volumes, and a container that starts again over both, with the ids that it had.
    assert [i["names"] for i in meshnet(h1, "image", "ls")] == [
        ["docker.io/library/app:1"],
        ["docker.io/library/other:2"],
    ]
    named = next(v for v in meshnet(h1, "volume", "ls") if v["name"] == "named")
    assert (named["containers"], named["anonymous"]) == (["web"], False)
    assert meshnet(h1, "start", "mapped")["state"] == "running"
    mapped = meshnet(h1, "inspect", "mapped")
    assert mapped["ids"] == {"first": 2147483648, "size": 65536}
    assert [e["network"] for e in mapped["endpoints"]] == ["wide", "six", "phys", "lan"]
    assert mapped["endpoints"][2]["address"] == "10.254.8.4/16"

    # The mesh can be changed as before.
    assert meshnet(h1, "network", "create", "new", "--subnet", "10.77.0.0/16")["vni"] == 4103
    wait_until(
        lambda: "new" in {n["name"] for n in wait_in_sync(h1)["networks"]}, 10, "the new network"
    )
    for name in _containers(h1):
        meshnet(h1, "rm", "-f", name)
    assert is_clean(h1), leftovers(h1)


_LABELS = {"tier": "front", "plain": ""}
