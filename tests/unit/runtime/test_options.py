"""Options of ``meshnet run``, users, and seccomp rules: tables and properties."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.errors import UsageError
from meshnet.runtime.engine.oci_runtime import clean, exit_status_of
from meshnet.runtime.spec import seccomp
from meshnet.runtime.spec.checks import check_options
from meshnet.runtime.spec.config import DEFAULT_CAPABILITIES
from meshnet.runtime.spec.options import (
    ContainerOptions,
    Volume,
    parse_restart,
    parse_size,
    parse_volume,
)
from meshnet.runtime.spec.users import User, resolve_user

PASSWD = "root:x:0:0::/root:/bin/sh\nweb:x:70:71::/srv:/bin/sh\n# a line of another kind\n"
GROUP = "root:x:0:\nweb:x:71:\nlog:x:72:root,web\n"
PROFILE: dict[str, Any] = json.loads(
    files("meshnet.runtime.spec").joinpath("seccomp.json").read_text()
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("1k", 1024), ("256m", 256 << 20), ("256MB", 256 << 20),
     ("1.5g", 3 << 29), ("2T", 2 << 40), ("7b", 7)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 1 << 50))
def test_every_number_of_bytes_is_a_size(number: int) -> None:
    assert parse_size(str(number)) == number


@pytest.mark.parametrize("text", ["", "m", "-1", "1x", "1 m", "0x10", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="256m"):
        parse_size(text)


def test_volumes() -> None:
    assert parse_volume("/a:/b") == Volume("/a", "/b", False)
    assert parse_volume("/a:/b:ro") == Volume("/a", "/b", True)
    assert parse_volume("data-1:/b:ro") == Volume("data-1", "/b", True)
    assert parse_volume("/a") == Volume("", "/a")
    for text in (
        *("a:/b", "/a:b", "/a:/b:no", "/a:/b:ro:x", "", "a", ":/b", "../a:/b", "data"),
        *("-d:/b", "da/ta:/b", ":/a:ro", "data:"),
    ):
        with pytest.raises(UsageError):
            parse_volume(text)


@pytest.mark.parametrize(
    ("policy", "exit_code", "restarts", "again"),
    [
        ("no", 1, 0, False),
        ("always", 0, 99, True),
        ("on-failure", 0, 0, False),
        ("on-failure", 1, 99, True),
        ("on-failure:2", 1, 1, True),
        ("on-failure:2", 1, 2, False),
    ],
)
def test_restart_policies(policy: str, exit_code: int, restarts: int, again: bool) -> None:
    assert parse_restart(policy).wants(exit_code, restarts) is again


GOOD = ContainerOptions(rootfs="/r", command=("true",))


def changed(**fields: Any) -> ContainerOptions:  # noqa: ANN401
    return ContainerOptions(**{"rootfs": "/r", "command": ("true",)} | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"rootfs": None},
        {"image": "web"},
        {"rootfs": "relative"},
        {"command": ()},
        {"networks": ("prod", "host")},
        {"networks": ("container:x", "prod")},
        {"pid": "private"},
        {"ipc": "container:"},
        {"rm": True, "restart": "always"},
        {"restart": "sometimes"},
        {"cpus": 0.0},
        {"volumes": ("x",)},
        {"env": ("A=\0",)},
        {"env": ("=x",)},
        {"networks": ("prod", "prod")},
        {"name": ""},
        {"hostname": "a b"},
        {"workdir": "srv"},
        {"tmpfs": ("tmp",)},
        {"cpus": float("nan")},
        {"cpu_shares": -3},
        {"cpuset_cpus": "all"},
        {"memory_bytes": 1},
        {"memory_bytes": 99999999999 << 30},
        {"blkio_weight": 5},
        {"pids_limit": -2},
        {"stop_timeout_s": -1},
        {"stop_timeout_s": 10**30},
    ],
)
def test_options_that_contradict(fields: dict[str, Any]) -> None:
    check_options(GOOD)
    with pytest.raises(UsageError):
        check_options(changed(**fields))


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("", User(0, 0, (72,), "/root")),
        ("root", User(0, 0, (72,), "/root")),
        ("web", User(70, 71, (72,), "/srv")),
        ("70", User(70, 71, (72,), "/srv")),
        ("web:log", User(70, 72, (), "/srv")),
        ("web:5", User(70, 5, (), "/srv")),
        ("1234", User(1234, 0, (), "/")),
        ("1234:9", User(1234, 9, (), "/")),
    ],
)
def test_users(text: str, user: User) -> None:
    assert resolve_user(text, PASSWD, GROUP) == user


@pytest.mark.parametrize("text", ["nobody", "web:none", "4294967296", "0:4294967296"])
def test_users_that_are_not_there(text: str) -> None:
    with pytest.raises(UsageError):
        resolve_user(text, PASSWD, GROUP)


@given(st.text(), st.text())
def test_hostile_user_files_harm_nobody(passwd: str, group: str) -> None:
    try:
        resolve_user("web", passwd, group)
    except UsageError:
        assert True


def allowed(capabilities: tuple[str, ...], kernel: tuple[int, int] = (6, 1)) -> set[str]:
    found = seccomp.resolve(PROFILE, capabilities, "x86_64", kernel)
    assert found is not None
    rules = [r for r in found["syscalls"] if r["action"] == "SCMP_ACT_ALLOW" and not r["args"]]
    return {name for rule in rules for name in rule["names"]}


def test_seccomp_follows_capabilities_and_kernel() -> None:
    default = allowed(DEFAULT_CAPABILITIES)
    assert {"read", "clone", "chroot"} - default == {"clone"}  # clone only without namespaces
    assert not default & {"mount", "reboot", "init_module", "bpf", "unshare", "setns"}
    admin = allowed((*DEFAULT_CAPABILITIES, "CAP_SYS_ADMIN"))
    assert {"mount", "unshare", "setns", "clone"} <= admin
    assert "ptrace" in default
    assert "ptrace" not in allowed(DEFAULT_CAPABILITIES, (4, 4))
    assert seccomp.resolve(PROFILE, (), "vax", (6, 1)) is None


@given(st.sets(st.sampled_from(["CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_TIME", "CAP_SYSLOG"])))
def test_a_capability_takes_no_call_away(added: set[str]) -> None:
    assert allowed(DEFAULT_CAPABILITIES) <= allowed((*DEFAULT_CAPABILITIES, *added))


def test_what_a_runtime_says_becomes_a_status() -> None:
    runc = 'time="x" level=error msg="runc create failed: exec: \\"a\\": executable file not found"'
    assert exit_status_of(clean(runc)) == 127
    assert exit_status_of("exec: /a: permission denied") == 126
    assert exit_status_of("cgroups: cannot make it") == 125
    assert clean("\n\n") == "the runtime says nothing"
