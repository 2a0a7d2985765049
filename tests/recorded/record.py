"""Records what this version writes, to test that later versions read it.

    python -m tests.recorded.record tests/recorded/VERSION

Runs two hosts, makes one of nearly everything that a mesh and a host can have, kills the agent of
h1, and then copies its disk and etcd.  Needs root, as the tests on labs do.

Copied files are as the agent wrote them, except for what belongs to this machine: the lab's
directories are ``/var/lib/meshnet`` and ``/srv``, and the boot has a fixed id.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshnet.cli.client import Client
from meshnet.codec.checksum import with_checksum
from meshnet.lab.poll import wait_until
from meshnet.lab.topology import Lab
from tests.images import Member, directory
from tests.netns.containers import FOREVER, busybox_layer, load_image, make_rootfs, started
from tests.netns.mesh import attach, meshnet, wait_in_sync
from tests.recorded.readers import SERVICE_DIR, STATE_DIR

if TYPE_CHECKING:
    from meshnet.lab.host import LabHost

BOOT_ID = "01234567-89ab-4cde-8f01-23456789abcd"
"""Replaces this machine's boot id."""
LARGEST_BYTES = 8192
"""The largest file that is copied: blobs of layers are larger, configs and manifests are not."""
KEPT = (
    "instance",
    "mesh.json",
    "firewall.json",
    "endpoints/*",
    "takeover/*.json",
    "containers/*/container.json",
    "containers/*/exits/*",
    "containers/*/log",
    "volumes/*/volume.json",
    "images/oci-layout",
    "images/index.json",
    "images/blobs/sha256/*",
    "images/layers/*/layer.json",
    "images/holds/*/*",
)
NETWORKS = (
    ("prod", "--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48"),
    (
        *("wide", "--subnet", "10.43.0.0/16", "--host-prefix", "26", "--fallback", "auto"),
        *("--vni", "5000", "--port", "8472", "--mtu", "1400", "--direct-routing"),
    ),
    ("six", "--subnet", "fd00:66::/56", "--internal"),
    ("tun", "--mode", "udp", "--subnet", "10.44.0.0/20", "--host-prefix", "27"),
    ("local", "--mode", "bridge", "--subnet", "10.45.0.0/24"),
    (
        *("phys", "--mode", "macvlan", "--parent", "eth1", "--host-access"),
        *("--subnet", "10.254.0.0/16", "--range", "10.254.8.1-10.254.8.250"),
        *("--subnet", "fd00:254::/64", "--range", "fd00:254::8:1-fd00:254::8:ffff"),
        *("--gateway", "10.254.0.1", "--gateway", "fd00:254::1"),
    ),
    (
        *("lan", "--mode", "underlay-bridge", "--parent", "eth0", "--subnet", "10.255.0.0/16"),
        *("--range", "10.255.8.1-10.255.8.250", "--gateway", "10.255.0.1"),
    ),
)
WEB = (
    *("--name", "web", "--hostname", "www", "--net", "prod", "--net", "local"),
    *("-p", "8080:80", "-p", "127.0.0.1:5353:53/udp", "--restart", "always"),
    *("-e", "COLOUR=blue", "-l", "tier=front", "-l", "plain", "-u", "web", "-w", "/srv"),
    *("-v", "named:/data", "-v", "/srv/mine:/mine:ro", "--tmpfs", "/scratch:size=1m"),
    *("--cpus", "0.5", "--cpu-shares", "512", "--memory", "64m", "--memory-swap", "128m"),
    *("--memory-reservation", "32m", "--shm-size", "16m", "--pids-limit", "100"),
    *("--cpuset-cpus", "0"),
    *("--ulimit", "nofile=1024:2048", "--device", "/dev/null:/dev/nothing:rw"),
    *("--sysctl", "net.ipv4.ip_unprivileged_port_start=0", "--group-add", "log"),
    *("--add-host", "db:10.0.0.5", "--dns", "192.0.2.53", "--log-max-size", "1m"),
    *("--cap-add", "NET_ADMIN", "--cap-drop", "MKNOD", "--read-only", "--init"),
    *("--stop-signal", "SIGINT", "--stop-timeout", "3"),
)


def add_second_link(lab: Lab) -> None:
    """Give each host ``eth1``, on another physical network, for mode macvlan."""
    switch = lab.switch
    switch.run(["ip", "link", "add", "br1", "type", "bridge", "mcast_snooping", "0"])
    switch.run(["ip", "address", "add", "10.254.0.1/16", "dev", "br1"])
    switch.run(["ip", "link", "set", "br1", "up"])
    for number, host in enumerate(lab.hosts, 1):
        port = f"{host.name}-1"
        switch.run(
            ["ip", "link", "add", port, "type", "veth", "peer", "name", "eth1", "netns", host.netns]
        )
        switch.run(["ip", "link", "set", port, "master", "br1", "up"])
        address = f"10.254.1.{number}/16"
        host.run(["ip", "address", "add", address, "dev", "eth1"])
        host.run(["ip", "address", "add", f"fd00:254::1:{number}/64", "dev", "eth1", "nodad"])
        host.run(["ip", "link", "set", "eth1", "up"])


def record(target: Path) -> None:
    """Make everything, and copy it into a new directory."""
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as text:
        service = Path(text)
        (service / "mine").mkdir()
        (service / "rootfs").mkdir()
        make_rootfs(service / "rootfs")
        with Lab("recorded", hosts=2) as lab:
            add_second_link(lab)
            h1 = lab.host("h1")
            try:
                _make_networks(lab)
                _attach_processes(lab, h1)
                _run_containers(h1, service)
                _damage(h1)
                h1.kill_agent()
                _make_draft(h1)
                copy_state(h1.state_dir, target / "state", service)
                write_etcd(lab, target / "etcd.json")
            finally:
                if not h1.is_agent_running():
                    h1.start_agent()
                for document in meshnet(h1, "ps", "-a"):
                    meshnet(h1, "rm", "-f", document["name"])


def _make_networks(lab: Lab) -> None:
    h1 = lab.hosts[0]
    for words in NETWORKS:
        meshnet(h1, "network", "create", *words)

    def is_up() -> bool:
        return all(n["in_sync"] for host in lab.hosts for n in wait_in_sync(host)["networks"])

    wait_until(is_up, 30, "all networks are up")


def _attach_processes(lab: Lab, h1: LabHost) -> None:
    """Processes on networks of every mode, one of them on three."""
    # Both hosts have an address of the pool.  A machine outside the mesh has the next one, which is
    # therefore set aside.
    lab.switch.run(["ip", "address", "add", "10.254.8.3/32", "dev", "br1"])
    one, two, three = (h1.spawn_container() for _ in range(3))
    (own,) = (host["subnets"]["prod"] for host in meshnet(h1, "hosts") if host["id"] == "h1")
    attach(
        one, h1, "prod", "--name", "shop", "--ip", ip_network(own)[77],
        "--publish", "9080:80", "--publish", f"{h1.underlay_ip}:9053:53/udp",
    )  # fmt: skip
    attach(one, h1, "wide", "--ifname", "wide0", "--no-default-route")
    attach(one, h1, "phys", "--ifname", "phys0", "--no-default-route", "--name", "shop.phys")
    attach(two, h1, "lan", "--name", "printer")
    attach(three, h1, "six", "--name", "six")
    attach(three, h1, "tun", "--name", "drafted", "--ifname", "eth1", "--publish", "9100:100")
    attach(three, h1, "local", "--name", "damaged", "--ifname", "eth2")
    attach(lab.host("h2").spawn_container(), lab.host("h2"), "prod", "--name", "far")


def _run_containers(h1: LabHost, service: Path) -> None:
    """Containers in every state, with options of every kind."""
    rootfs = service / "rootfs"
    layer = busybox_layer(rootfs, directory("srv"), directory("data"), Member("data/seed"))
    load_image(
        h1, service / "image.tar", "app:1", layer,
        Entrypoint=["sh", "-c"], Cmd=[FOREVER], Env=["PATH=/bin", "SHAPE=round"],
        Volumes={"/var/cache": {}}, Labels={"maker": "us"}, StopSignal="SIGTERM",
    )  # fmt: skip
    load_image(h1, service / "other.tar", "other:2", busybox_layer(rootfs), Cmd=["true"])
    web = [word.replace("/srv/mine", str(service / "mine")) for word in WEB]
    started(h1, *web, "app:1")
    started(h1, "--name", "side", "--net", "container:web", "--ipc", "container:web", "app:1")
    started(
        h1, "--name", "mapped", "--userns", "auto", "-t", "-i", "--entrypoint", "sleep",
        "--net", "wide", "--net", "six", "--net", "phys", "--net", "lan", "app:1", "9999",
    )  # fmt: skip
    started(
        h1, "--name", "plain", "--net", "host", "--privileged", "--rootfs", rootfs, "sleep", "9999"
    )
    started(h1, "--name", "brief", "--rm", "--pid", "host", "--uts", "host", "app:1")
    started(
        h1, "--name", "job", "--net", "tun", "--restart", "on-failure:1", "app:1",
        "echo done; exit 3",
    )  # fmt: skip
    meshnet(h1, "wait", "job")
    started(h1, "--name", "halted", "--restart", "always", "--net", "phys", "app:1")
    meshnet(h1, "stop", "halted")
    body: dict[str, Any] = {"image": "app:1", "name": "made", "networks": ["prod"]}
    Client(str(h1.socket_path)).post("containers", body=body)


def _damage(h1: LabHost) -> None:
    """Change one bit of a record for the agent to find."""
    assert h1.stop_agent() == 0
    file = _endpoint_file(h1, "damaged")
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"local"', b'"locam"', 1))
    h1.start_agent()
    assert file.with_suffix(".bad").exists()


def _make_draft(h1: LabHost) -> None:
    """Leave what an agent leaves that is killed between connecting and recording an endpoint."""
    file = _endpoint_file(h1, "drafted")
    file.rename(file.with_suffix(".draft"))


def _endpoint_file(host: LabHost, name: str) -> Path:
    files = (host.state_dir / "endpoints").glob("*.json")
    return next(f for f in files if json.loads(f.read_bytes())["name"] == name)


def copy_state(state_dir: Path, target: Path, service: Path) -> None:
    """Copy the small files of a state directory, less what belongs to this machine."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for file in sorted(path for pattern in KEPT for path in state_dir.glob(pattern)):
        if not file.is_file() or (file.stat().st_size > LARGEST_BYTES and file.suffix != ".json"):
            continue
        content = file.read_bytes()
        cleaned = content
        for ours, theirs in (
            (str(state_dir), STATE_DIR),
            (str(service), SERVICE_DIR),
            (boot_id, BOOT_ID),
        ):
            cleaned = cleaned.replace(ours.encode(), theirs.encode())
        if cleaned != content and b',"crc32":"' in cleaned:
            cleaned = with_checksum(cleaned.rpartition(b',"crc32":"')[0] + b"}")
        copy = target / file.relative_to(state_dir)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(cleaned)


def write_etcd(lab: Lab, target: Path) -> None:
    """Write all keys to a file, in the order in which they were last written."""
    answer = json.loads(lab.etcd.ctl("get", "--prefix", "/", "-w", "json"))
    items = [
        {
            "key": base64.b64decode(kv["key"]).decode(),
            "value": base64.b64decode(kv["value"]).decode(),
            "mod_revision": kv["mod_revision"],
            "leased": kv.get("lease", 0) != 0,
        }
        for kv in sorted(answer["kvs"], key=lambda kv: (kv["mod_revision"], kv["key"]))
    ]
    document = {"revision": answer["header"]["revision"], "keys": items}
    target.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
