"""Ulimits, devices, sysctls, swap and cgroup drivers; where logs are read from."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshnet.cli.commands.container import parse_since
from meshnet.errors import KernelRefusedError, NotFoundError, UsageError
from meshnet.runtime.engine.conmon import Shim
from meshnet.runtime.engine.oci_runtime import OciRuntime
from meshnet.runtime.spec.checks import check_options
from meshnet.runtime.spec.config import Surroundings, make_spec
from meshnet.runtime.spec.devices import DeviceWish, parse_device
from meshnet.runtime.spec.options import ContainerOptions
from meshnet.runtime.spec.ulimits import UNLIMITED, Ulimit, parse_ulimit
from meshnet.runtime.spec.users import User, add_groups
from meshnet_agent.containers.bundle import limits
from meshnet_agent.containers.bundle.devices import find_devices
from meshnet_agent.containers.bundle.limits import check_limits
from meshnet_agent.containers.log import _seek

OPTIONS = ContainerOptions(rootfs="/r", command=("true",))
MIB = 1 << 20
LOG = (
    b"2026-01-01T00:00:01.000000001+00:00 stdout F one\n"
    b"2026-01-01T00:00:02.000000001+00:00 stdout P tw\n"
    b"2026-01-01T00:00:02.500000001+00:00 stdout F o\n"
    b"2026-01-01T02:00:03.000000001+02:00 stderr F three\n"
)


def memory_of(*, accounts_swap: bool, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    around = Surroundings(
        args=("true",), user=User(), hostname="box", rootfs="/m", cgroup="/c", namespaces={},
        files={}, seccomp=None, accounts_swap=accounts_swap,
    )  # fmt: skip
    made: dict[str, Any] = make_spec(replace(OPTIONS, **fields), around)["linux"]["resources"]
    return dict(made.get("memory", {}))


def test_swap_is_as_dockers() -> None:
    assert memory_of(accounts_swap=True, memory_bytes=MIB) == {"limit": MIB, "swap": 2 * MIB}
    assert memory_of(accounts_swap=False, memory_bytes=MIB) == {"limit": MIB}
    unlimited = memory_of(accounts_swap=True, memory_bytes=MIB, memory_swap_bytes=-1)
    assert unlimited == {"limit": MIB, "swap": -1}
    assert memory_of(accounts_swap=True, memory_swap_bytes=-1) == {}
    with pytest.raises(UsageError, match="less than --memory"):
        check_options(replace(OPTIONS, memory_bytes=8 * MIB, memory_swap_bytes=MIB))


def test_what_this_kernel_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "accounts_swap", lambda: False)
    with pytest.raises(KernelRefusedError, match="swapaccount=1"):
        check_limits(replace(OPTIONS, memory_bytes=MIB, memory_swap_bytes=MIB))
    check_limits(replace(OPTIONS, memory_bytes=MIB))
    monkeypatch.setattr("resource.getrlimit", lambda _number: (10, 20))
    monkeypatch.setattr(limits, "may_raise_limits", lambda: False)
    check_limits(replace(OPTIONS, ulimits=("nofile=20", "locks=1:20")))
    with pytest.raises(KernelRefusedError, match="LimitNOFILE="):
        check_limits(replace(OPTIONS, ulimits=("nofile=1:21",)))
    monkeypatch.setattr(limits, "may_raise_limits", lambda: True)
    check_limits(replace(OPTIONS, ulimits=("nofile=1:21",)))


def test_ulimits() -> None:
    assert parse_ulimit("nofile=1:2") == Ulimit("nofile", 1, 2)
    assert parse_ulimit("core=-1") == Ulimit("core", UNLIMITED, UNLIMITED)
    for text in ("nofile", "nofile=", "files=1", "nofile=2:1", "nofile=-1:5", "NOFILE=1", "cpu=-2"):
        with pytest.raises(UsageError, match="ulimit"):
            parse_ulimit(text)


def test_devices(tmp_path: Path) -> None:
    assert parse_device("/dev/a") == DeviceWish("/dev/a", "/dev/a")
    assert parse_device("/dev/a:r") == DeviceWish("/dev/a", "/dev/a", "r")
    assert parse_device("/dev/a:/dev/b:rw") == DeviceWish("/dev/a", "/dev/b", "rw")
    for text in ("a", "/dev/a:b", "/dev/a:/dev/b:x", "/dev/a:/dev/b:/dev/c", ""):
        with pytest.raises(UsageError, match="device"):
            parse_device(text)
    (null,) = find_devices(DeviceWish("/dev/null", "/dev/n", "r"))
    assert (null.kind, null.major, null.minor, null.access, null.path) == ("c", 1, 3, "r", "/dev/n")
    with pytest.raises(NotFoundError, match="does not exist"):
        list(find_devices(DeviceWish(str(tmp_path / "x"), "/x")))
    (tmp_path / "x").touch()
    with pytest.raises(NotFoundError, match="is not a device"):
        list(find_devices(DeviceWish(str(tmp_path / "x"), "/x")))


@pytest.mark.parametrize(
    "fields",
    [{"sysctls": ("kernel.panic=1",)}, {"sysctls": ("net.ipv4.ip_forward",)},
     {"sysctls": ("kernel.msgmax=1",), "ipc": "host"}, {"sysctls": ("vm.swappiness=1",)},
     {"sysctls": ("net.core.somaxconn=1",), "networks": ("host",)}, {"dns": ("name",)},
     {"sysctls": ("net/../kernel/panic=1",)}, {"add_hosts": ("db",)}, {"add_hosts": (":1.1.1.1",)},
     {"add_hosts": ("db:1.1.1.1",), "networks": ("container:a",)}, {"labels": ("=x",)},
     {"log_max_bytes": 5}, {"shm_size_bytes": 0}],
)  # fmt: skip
def test_what_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        check_options(replace(OPTIONS, **fields))


def test_groups() -> None:
    user = User(7, 8, (9,), "/h")
    assert add_groups(user, ("log", "9", "5"), "log:x:72:\n") == User(7, 8, (9, 72, 5), "/h")


@pytest.mark.parametrize("systemd", [False, True])
def test_the_cgroup_driver(systemd: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conmon = tmp_path / "conmon"
    conmon.write_text("#!/bin/sh\n")
    conmon.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    runtime = OciRuntime(Path("/runc"), Path("/root"), systemd_cgroup=systemd)
    shim = Shim(
        runtime=runtime, identity="abc", bundle=Path("/b"), log=Path("/l"), exits=Path("/e"),
        tty=False, stdin=False, log_max_bytes=70000,
    )  # fmt: skip
    command = shim.command()
    assert ("--systemd-cgroup" in command) is systemd
    assert command[command.index("--log-size-max") + 1] == "70000"
    assert runtime.cgroup("abc") == ("system.slice:meshnet:abc" if systemd else "/meshnet/abc")


@pytest.mark.parametrize(
    ("tail", "since", "rest"),
    [(None, None, 0), (0, None, 4), (1, None, 3), (2, None, 1), (3, None, 0), (9, None, 0),
     (None, 1767225602.0, 1), (None, 1767225602.7, 3), (None, 2e9, 4), (3, 1767225602.7, 3)],
)  # fmt: skip
def test_where_a_log_is_read_from(
    tmp_path: Path, tail: int | None, since: float | None, rest: int
) -> None:
    path = tmp_path / "log"
    path.write_bytes(LOG)
    with path.open("rb") as file:
        _seek(file, tail, since)
        assert file.read() == b"".join(io.BytesIO(LOG).readlines()[rest:])
    path.write_bytes(b"")
    with path.open("rb") as file:
        _seek(file, tail, since)
        assert file.read() == b""


def test_since() -> None:
    assert parse_since("1h30m", 10_000.0) == 4600.0
    assert parse_since("2.5s", 10.0) == 7.5
    assert parse_since("17.25", 0) == 17.25
    assert parse_since("1970-01-01T00:01:00Z", 0) == 60.0
    for text in ("", "yesterday", "1d"):
        with pytest.raises(UsageError, match="--since"):
            parse_since(text, 0)
