"""The OCI configuration: Docker's defaults, and what each option changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.errors import UsageError
from meshnet.runtime.spec.config import (
    CAPABILITIES,
    DEFAULT_CAPABILITIES,
    Surroundings,
    capabilities,
    make_spec,
    merge_env,
)
from meshnet.runtime.spec.id_ranges import IdRange
from meshnet.runtime.spec.options import ContainerOptions, Volume
from meshnet.runtime.spec.users import User

OPTIONS = ContainerOptions(rootfs="/r", command=("true",))
ALL = frozenset(CAPABILITIES)
OWN = {"network": "", "pid": "", "ipc": "", "uts": ""}
AROUND = Surroundings(
    args=("true",), user=User(), hostname="box", rootfs="/m", cgroup="/meshnet/x",
    namespaces=OWN, files={"/etc/hosts": "/s/hosts"}, seccomp={"defaultAction": "SCMP_ACT_ERRNO"},
)  # fmt: skip


def spec(around: Surroundings = AROUND, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    return make_spec(replace(OPTIONS, **fields), around)


def test_defaults_are_dockers() -> None:
    made = spec()
    # docker run IMAGE grep Cap /proc/self/status: 00000000a80425fb
    mask = sum(1 << CAPABILITIES.index(c) for c in made["process"]["capabilities"]["bounding"])
    assert mask == 0xA80425FB
    assert made["process"]["noNewPrivileges"] is True
    assert made["linux"]["seccomp"] == AROUND.seccomp
    assert "/proc/kcore" in made["linux"]["maskedPaths"]
    assert "/proc/sys" in made["linux"]["readonlyPaths"]
    kinds = {n["type"] for n in made["linux"]["namespaces"]}
    assert kinds == {"mount", "cgroup", "network", "pid", "ipc", "uts"}
    assert [m["destination"] for m in made["mounts"]] == [
        "/proc", "/dev", "/dev/pts", "/sys", "/sys/fs/cgroup", "/dev/mqueue", "/dev/shm",
        "/etc/hosts",
    ]  # fmt: skip
    assert made["linux"]["resources"]["devices"][0] == {"allow": False, "access": "rwm"}
    assert made["root"] == {"path": "/m", "readonly": False}
    assert made["hostname"] == "box"


RESOURCES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"cpus": 0.5}, "cpu", {"quota": 50_000, "period": 100_000}),
    ({"cpu_shares": 512, "cpuset_cpus": "0-1"}, "cpu", {"shares": 512, "cpus": "0-1"}),
    ({"memory_bytes": 1 << 20}, "memory", {"limit": 1 << 20}),
    ({"memory_reservation_bytes": 5}, "memory", {"reservation": 5}),
    ({"pids_limit": 9}, "pids", {"limit": 9}),
    ({"blkio_weight": 300}, "blockIO", {"weight": 300}),
]


@pytest.mark.parametrize(("fields", "kind", "expected"), RESOURCES)
def test_resources(fields: dict[str, Any], kind: str, expected: dict[str, Any]) -> None:
    assert spec(**fields)["linux"]["resources"][kind] == expected
    assert kind not in spec()["linux"]["resources"]


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        ((), (), set(DEFAULT_CAPABILITIES)),
        (("NET_ADMIN",), (), {*DEFAULT_CAPABILITIES, "CAP_NET_ADMIN"}),
        (("cap_net_admin",), ("KILL",), {*DEFAULT_CAPABILITIES, "CAP_NET_ADMIN"} - {"CAP_KILL"}),
        ((), ("ALL",), set()),
        (("CHOWN",), ("ALL",), {"CAP_CHOWN"}),
        (("ALL",), (), set(ALL)),
        (("ALL",), ("SYS_ADMIN",), ALL - {"CAP_SYS_ADMIN"}),
    ],
)
def test_capabilities(add: tuple[str, ...], drop: tuple[str, ...], expected: set[str]) -> None:
    assert set(capabilities(replace(OPTIONS, cap_add=add, cap_drop=drop), ALL)) == expected


@given(
    st.sets(st.sampled_from(CAPABILITIES)),
    st.sets(st.sampled_from([*CAPABILITIES, "ALL"])),
    st.booleans(),
)
def test_nobody_gets_more_than_the_agent_has(
    has: set[str], added: set[str], privileged: bool
) -> None:
    options = replace(OPTIONS, cap_add=tuple(added), privileged=privileged)
    assert set(capabilities(options, frozenset(has))) <= has


def test_an_unknown_capability() -> None:
    with pytest.raises(UsageError, match="CAP_FLY"):
        capabilities(replace(OPTIONS, cap_add=("fly",)), ALL)


def test_privileged_takes_the_protection_away() -> None:
    made = spec(privileged=True)
    assert set(made["process"]["capabilities"]["effective"]) == ALL
    assert not made["process"]["noNewPrivileges"]
    assert not {"seccomp", "maskedPaths", "readonlyPaths"} & made["linux"].keys()
    assert made["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]


def test_another_user_has_no_capabilities_in_effect() -> None:
    process = make_spec(OPTIONS, replace(AROUND, user=User(70, 71, (72,), "/srv")))["process"]
    assert process["user"] == {"uid": 70, "gid": 71, "additionalGids": [72]}
    assert process["capabilities"]["effective"] == []
    assert "HOME=/srv" in process["env"]


def test_namespaces_that_are_shared() -> None:
    shared = {"network": None, "pid": "/proc/9/ns/pid", "ipc": "", "uts": None}
    made = spec(replace(AROUND, namespaces=shared))
    found = {n["type"]: n.get("path") for n in made["linux"]["namespaces"]}
    assert found == {"mount": None, "cgroup": None, "pid": "/proc/9/ns/pid", "ipc": None}
    assert "hostname" not in made
    sysfs = next(m for m in made["mounts"] if m["destination"] == "/sys")
    assert sysfs["type"] == "bind"


def test_mounts() -> None:
    made = spec(volumes=("/a:/b", "/c:/d:ro"), tmpfs=("/t:size=1m",), read_only=True)
    by_place = {m["destination"]: m for m in made["mounts"]}
    assert by_place["/b"]["options"] == ["rbind", "rprivate", "rw"]
    assert by_place["/d"]["options"] == ["rbind", "rprivate", "ro"]
    assert "size=1m" in by_place["/t"]["options"]
    assert made["root"]["readonly"]


def test_init_comes_first() -> None:
    made = spec(replace(AROUND, init="/usr/bin/tini"))
    assert made["process"]["args"] == ["/dev/init", "--", "true"]
    assert made["mounts"][-1]["source"] == "/usr/bin/tini"


@given(st.lists(st.dictionaries(st.from_regex(r"[A-Z]{1,3}", fullmatch=True), st.text())))
def test_the_last_variable_wins(layers: list[dict[str, str]]) -> None:
    merged = merge_env(*([f"{k}={v}" for k, v in layer.items()] for layer in layers))
    expected: dict[str, str] = {}
    for layer in layers:
        expected |= layer
    assert dict(text.split("=", 1) for text in merged) == expected


def test_ids_of_its_own() -> None:
    around = replace(AROUND, namespaces={**OWN, "user": ""}, ids=IdRange(5000, 100))
    made = spec(around)
    mapping = [{"containerID": 0, "hostID": 5000, "size": 100}]
    assert made["linux"]["uidMappings"] == made["linux"]["gidMappings"] == mapping
    assert {"type": "user"} in made["linux"]["namespaces"]
    assert "uidMappings" not in spec()["linux"]
    joined = spec(replace(around, namespaces={**OWN, "user": "/proc/7/ns/user"}))
    assert {"type": "user", "path": "/proc/7/ns/user"} in joined["linux"]["namespaces"]


def test_volumes_inside_of_others_are_mounted_later() -> None:
    around = replace(AROUND, volumes=(Volume("/v/2", "/a/b/c"), Volume("/v/1", "/a", True)))
    mounts = spec(around, volumes=("/x:/a/b", "name:/elsewhere"), read_only=True)["mounts"]
    assert [(m["source"], m["destination"], m["options"][-1]) for m in mounts[-3:]] == [
        ("/v/1", "/a", "ro"), ("/x", "/a/b", "rw"), ("/v/2", "/a/b/c", "rw"),
    ]  # fmt: skip
