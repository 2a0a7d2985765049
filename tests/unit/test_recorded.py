"""What version 0.1 wrote is read as it was meant: every field, from files made by running it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from meshnet.errors import PolicyRefusedError
from meshnet.model import (
    AddressHolder,
    AddressRange,
    Claim,
    Endpoint,
    EndpointId,
    Host,
    HostId,
    MeshSnapshot,
    Network,
    NetworkName,
    Protocol,
    PublishedPort,
    Vni,
)
from meshnet.modes import Mode
from meshnet.sandbox import NetnsId, ProcessSandbox
from tests.recorded import readers
from tests.recorded.readers import HeldEndpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = "0.1"
BOOT = "01234567-89ab-4cde-8f01-23456789abcd"
H1, H2 = HostId("h1"), HostId("h2")
TCP, UDP = Protocol.TCP, Protocol.UDP
APP_ID = "sha256:0b0466803a18a69c9629a73591f3b5ff9ee87ba9a5f6913d135070d7168c00a3"
OTHER_ID = "sha256:fd715e36fb8a8ac67548076968d59aced26d4607bfbec89c5a09d0802309216d"
LAYER = "aacdea54fa9227f6e06073608b1c15549fed31fb59304c07bba411dfa897257a"
SCRIPT = "trap 'exit 9' TERM; sleep 9999 & wait"


def network(name: str, mode: Mode, vni: int, *subnets: str, **fields: object) -> Network:
    return Network(
        name=NetworkName(name),
        mode=mode,
        vni=Vni(vni),
        subnets=tuple(ip_network(s) for s in subnets),
        **fields,  # type: ignore[arg-type]
    )


NETWORKS = [
    network(
        "prod", Mode.VXLAN, 4097, "10.42.0.0/16", "fd00:42::/48",
        port=4789, host_prefix=24, host_prefix6=64,
    ),
    network(
        "wide", Mode.VXLAN, 5000, "10.43.0.0/16",
        port=8472, host_prefix=26, mtu_bytes=1400, direct_routing=True, fallback=True,
    ),
    network("six", Mode.VXLAN, 4098, "fd00:66::/56", internal=True),
    network("tun", Mode.UDP, 4099, "10.44.0.0/20", port=24099, host_prefix=27),
    network("local", Mode.BRIDGE, 4100, "10.45.0.0/24"),
    network(
        "phys", Mode.MACVLAN, 4101, "10.254.0.0/16", "fd00:254::/64",
        parent="eth1", host_access=True,
        ranges=(
            AddressRange(ip_address("10.254.8.1"), ip_address("10.254.8.250")),
            AddressRange(ip_address("fd00:254::8:1"), ip_address("fd00:254::8:ffff")),
        ),
        gateways=(ip_address("10.254.0.1"), ip_address("fd00:254::1")),
    ),
    network(
        "lan", Mode.UNDERLAY_BRIDGE, 4102, "10.255.0.0/16", parent="eth0",
        ranges=(AddressRange(ip_address("10.255.8.1"), ip_address("10.255.8.250")),),
        gateways=(ip_address("10.255.0.1"),),
    ),
]  # fmt: skip
RESERVATIONS = {
    "prod": {
        "10.42.0.0/24": H1, "fd00:42::/64": H1, "10.42.51.0/24": H2, "fd00:42:0:1::/64": H2,
    },
    "wide": {"10.43.0.0/26": H1, "10.43.95.128/26": H2},
    "six": {"fd00:66::/64": H1, "fd00:66:0:eb::/64": H2},
    "tun": {"10.44.0.0/27": H1, "10.44.4.96/27": H2},
}  # fmt: skip


def endpoint(
    identity: str, where: str, name: str, process: tuple[int, int, int], **fields: object
) -> Endpoint:
    """An endpoint; `process`: pid, start time and namespace."""
    found: dict[str, Any] = {"mtu_bytes": 1450, "default_route": False} | fields
    # What it had was what it wanted, in both IP versions.
    leading = found["gateways"] if found["default_route"] else ()
    found["default_versions"] = tuple(gateway.version for gateway in leading)
    return Endpoint(
        id=EndpointId(identity),
        network=NetworkName(where),
        host=H1,
        name=name,
        sandbox=ProcessSandbox(
            pid=process[0], pid_start_ticks=process[1], netns=NetnsId(0, process[2])
        ),
        **found,
    )


ONE, TWO, THREE = (
    (6938, 426300, 4026532848),
    (6939, 426300, 4026532917),
    (6940, 426301, 4026532986),
)
WEB, MAPPED, MADE = (
    (6994, 426475, 4026533213),
    (7043, 426493, 4026533159),
    (7201, 426629, 4026533386),
)
PROD_GATEWAYS = (ip_address("10.42.0.1"), ip_address("fd00:42::1"))
PHYS_GATEWAYS = (ip_address("10.254.0.1"), ip_address("fd00:254::1"))


def on(ifname: str, mac: str, *addresses: str) -> dict[str, object]:
    return {
        "ifname": ifname,
        "mac": bytes.fromhex(mac),
        "addresses": tuple(ip_interface(a) for a in addresses),
    }


def with_device(of: Endpoint) -> Endpoint:
    """Complete a record as an agent that reads it does: 0.1 did not write a namespace's device."""
    netns = of.sandbox.netns._replace(device=Path("/proc/self/ns/net").stat().st_dev)
    return replace(of, sandbox=replace(of.sandbox, netns=netns))


ENDPOINTS = [
    endpoint(
        "044c3d401dd7", "phys", "mapped.phys", MAPPED,
        **on("eth2", "02650afe0805", "10.254.8.5/16", "fd00:254::8:4/64"),
        gateways=PHYS_GATEWAYS, mtu_bytes=1500, parent="eth1",
    ),
    endpoint(
        "2e0a61c130a5", "prod", "shop", ONE,
        **on("eth0", "02650a2a004d", "10.42.0.77/24", "fd00:42::2/64"),
        gateways=PROD_GATEWAYS, default_route=True,
        published=(
            PublishedPort(TCP, 9080, 80),
            PublishedPort(UDP, 9053, 53, ip_address("10.255.1.1")),
        ),
    ),
    endpoint(
        "333e69ca6f94", "prod", "made", MADE,
        **on("eth0", "02650a2a0003", "10.42.0.3/24", "fd00:42::4/64"),
        gateways=PROD_GATEWAYS, default_route=True,
    ),
    endpoint(
        "41f27ca7026c", "six", "six", THREE, **on("eth0", "026500000002", "fd00:66::2/64"),
        gateways=(ip_address("fd00:66::1"),),
    ),
    endpoint(
        "4f04e8570967", "wide", "mapped", MAPPED, **on("eth0", "02650a2b0003", "10.43.0.3/26"),
        gateways=(ip_address("10.43.0.1"),), mtu_bytes=1400, default_route=True,
    ),
    endpoint(
        "520b8b96a881", "lan", "printer", TWO, **on("eth0", "02650aff0801", "10.255.8.1/16"),
        gateways=(ip_address("10.255.0.1"),), mtu_bytes=1500, default_route=True,
    ),
    endpoint(
        "6511f62fbca9", "prod", "web", WEB,
        **on("eth0", "02650a2a0002", "10.42.0.2/24", "fd00:42::3/64"),
        gateways=PROD_GATEWAYS, default_route=True,
        published=(
            PublishedPort(TCP, 8080, 80),
            PublishedPort(UDP, 5353, 53, ip_address("127.0.0.1")),
        ),
    ),
    endpoint(
        "8e5a3b3f8c2c", "wide", "pid6938-8e5a", ONE, **on("wide0", "02650a2b0002", "10.43.0.2/26"),
        gateways=(ip_address("10.43.0.1"),), mtu_bytes=1400,
    ),
    endpoint(
        "950b504099ee", "phys", "shop.phys", ONE,
        **on("phys0", "02650afe0804", "10.254.8.4/16", "fd00:254::8:3/64"),
        gateways=PHYS_GATEWAYS, mtu_bytes=1500, parent="eth1",
    ),
    endpoint(
        "c61bb24eac3d", "lan", "mapped.lan", MAPPED, **on("eth3", "02650aff0802", "10.255.8.2/16"),
        gateways=(ip_address("10.255.0.1"),), mtu_bytes=1500,
    ),
    endpoint(
        "c6e2ead78961", "six", "mapped.six", MAPPED, **on("eth1", "026500000003", "fd00:66::3/64"),
        gateways=(ip_address("fd00:66::1"),),
    ),
    endpoint(
        "f667050bca61", "local", "web.local", WEB, **on("eth1", "02650a2d0003", "10.45.0.3/24"),
        gateways=(ip_address("10.45.0.1"),), mtu_bytes=1500,
    ),
]  # fmt: skip
DRAFT = endpoint(
    "6c580984dba0", "tun", "drafted", THREE, **on("eth1", "02650a2c0002", "10.44.0.2/27"),
    gateways=(ip_address("10.44.0.1"),), default_route=True,
    published=(PublishedPort(TCP, 9100, 100),),
)  # fmt: skip


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """The recorded state directory; what cannot be read is logged, and nothing may be."""
    readers.place_state(VERSION, tmp_path)
    with structlog.testing.capture_logs() as logs:
        yield tmp_path
    assert logs == []


# --- etcd ----------------------------------------------------------------------------------------


async def test_the_mesh() -> None:
    keys, revision = readers.etcd_keys(VERSION)
    assert revision == 58
    mesh = await readers.read_mesh(await readers.store_of(keys))
    assert list(mesh.networks.values()) == NETWORKS  # the oldest first
    reservations = {
        name: {str(subnet): host for subnet, host in owners.items()}
        for name, owners in mesh.reservations.items()
    }
    assert reservations == RESERVATIONS
    assert mesh == MeshSnapshot(
        revision=mesh.revision,
        networks={n.name: n for n in NETWORKS},
        hosts={
            H1: Host(id=H1, underlay_ip=ip_address("10.255.1.1")),
            H2: Host(id=H2, underlay_ip=ip_address("10.255.1.2")),
        },
        alive={
            H1: Claim(instance="6a4066df374a231e", underlay_ip=ip_address("10.255.1.1")),
            H2: Claim(instance="094c59643f0b3a7e", underlay_ip=ip_address("10.255.1.2")),
        },
        reservations=mesh.reservations,
        bad_values={},
        holes=frozenset(),
    )


async def test_published_endpoints_are_those_on_disk() -> None:
    keys, _ = readers.etcd_keys(VERSION)
    with structlog.testing.capture_logs() as logs:
        found = await readers.read_endpoints(await readers.store_of(keys))
    assert logs == []
    by_id = {e.id: e for e in found}
    far = by_id.pop(EndpointId("1c39ff584fe6"))
    assert (far.host, far.network, far.name) == ("h2", "prod", "far")
    assert far.addresses == (ip_interface("10.42.51.2/24"), ip_interface("fd00:42:0:1::2/64"))
    # The draft had been recorded and published; its file was renamed when that was over.
    assert by_id == {e.id: e for e in (*ENDPOINTS, DRAFT)}


async def test_pools() -> None:
    keys, _ = readers.etcd_keys(VERSION)
    store = await readers.store_of(keys)
    by_name = {n.name: n for n in NETWORKS}
    phys = await readers.read_pool(store, by_name[NetworkName("phys")])
    outsider = AddressHolder(HostId(""), held_by=bytes.fromhex("120a452dac94"))
    shop, mapped = AddressHolder(H1, "950b504099ee"), AddressHolder(H1, "044c3d401dd7")
    assert phys.bad_values == {}
    assert {str(address): holder for address, holder in phys.holders.items()} == {
        "10.254.8.1": AddressHolder(H2),
        "10.254.8.2": AddressHolder(H1),
        "10.254.8.3": outsider,
        "10.254.8.4": shop,
        "10.254.8.5": mapped,
        "fd00:254::8:1": AddressHolder(H2),
        "fd00:254::8:2": AddressHolder(H1),
        "fd00:254::8:3": shop,
        "fd00:254::8:4": mapped,
    }
    lan = await readers.read_pool(store, by_name[NetworkName("lan")])
    assert lan.bad_values == {}
    assert {str(address): holder for address, holder in lan.holders.items()} == {
        "10.255.8.1": AddressHolder(H1, "520b8b96a881"),
        "10.255.8.2": AddressHolder(H1, "c61bb24eac3d"),
    }


# --- the state directory -------------------------------------------------------------------------


def test_the_instance_and_the_endpoints(state: Path) -> None:
    disk = readers.read_disk(state)
    assert disk.instance == "6a4066df374a231e"
    assert disk.endpoints == list(map(with_device, ENDPOINTS))
    assert disk.drafts == [with_device(DRAFT)]
    assert disk.unreadable == {"07f28eefefb5"}  # set aside by the version that wrote it


async def test_the_mesh_that_the_host_belongs_to(state: Path) -> None:
    keys, _ = readers.etcd_keys(VERSION)
    await readers.check_identity(state, await readers.store_of(keys))
    with pytest.raises(PolicyRefusedError, match="this host belongs to mesh 8865316436719fb6"):
        await readers.check_identity(state, await readers.store_of([]))
    with pytest.raises(PolicyRefusedError, match="is at revision 2 and was at 28"):
        await readers.check_identity(state, await readers.store_of(keys[:1]))


def test_a_running_container_with_all_its_options(state: Path) -> None:
    web = readers.read_containers(state)["web"]
    fields = {name: getattr(web, name) for name in web.__slots__}
    options = {name: getattr(web.options, name) for name in web.options.__slots__}
    assert options == {
        "image": "app:1",
        "rootfs": None,
        "command": (),
        "entrypoint": None,
        "name": "web",
        "networks": ("prod", "local"),
        "publish": ("8080:80", "127.0.0.1:5353:53/udp"),
        "hostname": "www",
        "env": ("COLOUR=blue",),
        "volumes": ("named:/data", "/srv/mine:/mine:ro"),
        "tmpfs": ("/scratch:size=1m",),
        "user": "web",
        "workdir": "/srv",
        "init": True,
        "tty": False,
        "interactive": False,
        "rm": False,
        "restart": "always",
        "cpus": 0.5,
        "cpu_shares": 512,
        "cpuset_cpus": "0",
        "memory_bytes": 64 << 20,
        "memory_swap_bytes": 128 << 20,
        "memory_reservation_bytes": 32 << 20,
        "shm_size_bytes": 16 << 20,
        "ulimits": ("nofile=1024:2048",),
        "devices": ("/dev/null:/dev/nothing:rw",),
        "sysctls": ("net.ipv4.ip_unprivileged_port_start=0",),
        "group_add": ("log",),
        "add_hosts": ("db:10.0.0.5",),
        "dns": ("192.0.2.53",),
        "labels": ("tier=front", "plain"),
        "log_max_bytes": 1 << 20,
        "pids_limit": 100,
        "blkio_weight": None,
        "cap_add": ("NET_ADMIN",),
        "cap_drop": ("MKNOD",),
        "privileged": False,
        "read_only": True,
        "pid": None,
        "ipc": None,
        "uts": None,
        "userns": "host",
        "stop_signal": "SIGINT",
        "stop_timeout_s": 3,
    }
    points = [(p.name, p.destination, p.read_only, p.anonymous) for p in fields.pop("mount_points")]
    assert points == [
        ("named", "/data", False, False),
        ("22eb376b71005ae1138b1e4b952e292a", "/var/cache", False, True),
    ]
    processes = [fields.pop("process"), fields.pop("shim")]
    assert [(p.pid, p.start_ticks, p.boot_id) for p in processes] == [
        (6994, 426475, BOOT),
        (6983, 426474, BOOT),
    ]
    # How a record holds its endpoints is its own business; these are freed with it.
    assert readers.endpoints_of(web) == [
        HeldEndpoint("6511f62fbca9", "prod", 6994),
        HeldEndpoint("f667050bca61", "local", 6994),
    ]
    for name in ("options", "endpoints", "v"):
        del fields[name]
    assert fields == {
        "id": "2eff43975229",
        "name": "web",
        "created_s": 1796103030.552814,
        "args": ("sh", "-c", SCRIPT),
        "lowerdirs": (f"/var/lib/meshnet/images/layers/{LAYER}/diff",),
        "image_id": APP_ID,
        "env": ("PATH=/bin", "SHAPE=round"),
        "user": "web",
        "workdir": "/srv",
        "stop_signal": "SIGINT",
        "ids": None,
        "state": "running",
        "started_s": 1796103030.6720884,
        "finished_s": None,
        "exit_code": None,
        "error": None,
        "restarts": 0,
        "stopped": False,
    }
    assert (web.hostname, web.shares_network) == ("www", False)


def test_containers_in_every_state(state: Path) -> None:
    found = readers.read_containers(state)
    assert {name: (r.id, r.state, r.exit_code) for name, r in found.items()} == {
        "side": ("0a91083eae78", "running", None),
        "web": ("2eff43975229", "running", None),
        "plain": ("4acc4078ac11", "running", None),
        "halted": ("74f55cbe6ee1", "exited", 9),
        "mapped": ("80f6f02a02a8", "running", None),
        "brief": ("880fc2ef72e0", "running", None),
        "made": ("907311413a4a", "created", None),
        "job": ("d6403a5e1c02", "exited", 3),
    }
    held = {name: readers.endpoints_of(record) for name, record in found.items() if name != "web"}
    assert {name: endpoints for name, endpoints in held.items() if endpoints} == {
        "mapped": [
            HeldEndpoint("4f04e8570967", "wide", 7043),
            HeldEndpoint("c6e2ead78961", "six", 7043),
            HeldEndpoint("044c3d401dd7", "phys", 7043),
            HeldEndpoint("c61bb24eac3d", "lan", 7043),
        ],
        "made": [HeldEndpoint("333e69ca6f94", "prod", 7201)],
    }
    mapped, plain, brief = found["mapped"], found["plain"], found["brief"]
    assert mapped.ids is not None
    assert (mapped.ids.first, mapped.ids.size) == (2147483648, 65536)
    assert (mapped.options.userns, mapped.options.tty, mapped.options.interactive) == (
        "auto", True, True,
    )  # fmt: skip
    assert (mapped.options.entrypoint, mapped.args) == ("sleep", ("sleep", "9999"))
    assert (plain.image_id, plain.options.rootfs, plain.lowerdirs) == (
        None, "/srv/rootfs", ("/srv/rootfs",),
    )  # fmt: skip
    assert (plain.options.privileged, plain.shares_network) == (True, True)
    assert (brief.options.rm, brief.options.pid, brief.options.uts) == (True, "host", "host")
    assert found["side"].options.networks == ("container:web",)
    assert (found["side"].options.ipc, found["side"].shares_network) == ("container:web", True)
    job, halted = found["job"], found["halted"]
    assert (job.options.restart, job.restarts, job.stopped) == ("on-failure:1", 1, False)
    assert (job.started_s, job.finished_s) == (1796103031.7240329, 1796103031.7465744)
    assert (halted.options.restart, halted.stopped, halted.process) == ("always", True, None)
    made = found["made"]
    assert made.shim is not None
    assert (made.started_s, made.shim.pid) == (None, 7189)


def test_the_journal_of_a_takeover(state: Path) -> None:
    (journal,) = readers.read_journals(state)
    assert journal is not None
    assert (journal.bridge, journal.parent, journal.stage) == ("mnp4102", "eth0", "confirmed")
    assert (journal.generation, journal.boot) == (0, BOOT)
    assert {
        kind: list(map(str, records)) for kind, records in journal.contents._asdict().items()
    } == {
        "addresses": ["address 10.255.1.1/16", "address fe80::482a:14ff:fedd:4333/64"],
        "neighbours": [
            "neighbour 10.255.0.2",
            "neighbour fe80::c4b0:dff:fe9d:9a2d",
            "neighbour fe80::aff:feff:1",
            "neighbour fe80::ac35:b8ff:fe04:bf24",
            "neighbour fe80::f48c:28ff:fe01:2010",
        ],
        "nexthops": ["nexthop object 1828716546"],
        "routes": [
            "route default of table 254",
            "route 10.255.0.0/16 of table 254",
            "route fe80::/64 of table 254",
        ],
    }
    (address, _) = journal.contents.addresses
    assert address.header == bytes.fromhex("0210000000000000")
    assert address.attrs[:2] == ((1, b"\x0a\xff\x01\x01"), (2, b"\x0a\xff\x01\x01"))


def test_what_the_firewall_was_loaded_from(state: Path) -> None:
    text, digest = readers.read_firewall_memory(state)
    assert text.startswith("table inet meshnet {\n\tset members4 {\n")
    assert "masquerade" in text
    assert text.endswith('\t\tiifname "mne*" counter name ethertype drop\n\t}\n}\n')
    assert digest == "1915104e022a24464859b921557b4611a231a80809e677610cf2594c889b6886"


def test_images(state: Path) -> None:
    app, other = readers.read_images(state)
    assert (app.id, app.names) == (APP_ID, ("docker.io/library/app:1",))
    assert (other.id, other.names) == (OTHER_ID, ("docker.io/library/other:2",))
    assert (app.layers, app.size_bytes) == ((f"sha256:{LAYER}",), 1982351)
    assert set(app.containers) == {
        "0a91083eae78", "2eff43975229", "74f55cbe6ee1", "80f6f02a02a8", "880fc2ef72e0",
        "907311413a4a", "d6403a5e1c02",
    }  # fmt: skip
    assert other.containers == ()
    config = app.document.config
    assert config is not None
    assert (config.entrypoint, config.cmd) == (("sh", "-c"), (SCRIPT,))
    assert (config.env, config.labels) == (("PATH=/bin", "SHAPE=round"), {"maker": "us"})
    assert (set(config.volumes or ()), config.stop_signal) == ({"/var/cache"}, "SIGTERM")
    assert app.manifest.size == 422


def test_volumes(state: Path) -> None:
    found = {v.name: (v.anonymous, v.created_s) for v in readers.read_volumes(state)}
    assert len(found) == 8
    assert found["named"] == (False, 1796103030.5894265)
    assert found["22eb376b71005ae1138b1e4b952e292a"] == (True, 1796103030.5919993)
    assert [name for name, (anonymous, _) in found.items() if not anonymous] == ["named"]
