"""Fixtures for tests on labs: several hosts on this machine, and nothing left of them after."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import pytest

from meshnet.errors import MeshnetError
from meshnet.lab.netns import list_netns
from meshnet.lab.state import LabFile
from meshnet.lab.topology import Lab
from meshnet.lab.underlay import LabUnderlay
from tests.netns.containers import cgroups_of, make_rootfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Unpack

    from meshnet.lab.process import ProcessRef
    from meshnet.lab.underlay import Family


class LabOptions(TypedDict, total=False):
    """What `Lab` takes, less what ``make_lab`` does itself."""

    etcd_members: int
    base_dir: Path | None
    agent_args: Sequence[str]
    start_agents: bool


_counter = itertools.count()
_PROGRAMS = ("ip", "bridge", "nft", "nsenter", "unshare", "ping", "etcd", "etcdctl")


def _why_not() -> str | None:
    """Say why this machine cannot have a lab; None if it can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"needs programs that are not installed: {', '.join(missing)}"
    result = subprocess.run(
        ["unshare", "--net", "true"], capture_output=True, text=True, check=False
    )
    return None if result.returncode == 0 else f"needs network namespaces: {result.stderr}"


@pytest.fixture(scope="session", autouse=True)
def _machine() -> None:
    """Skip on a machine that cannot have a lab.  In CI fail, or nobody would ever notice."""
    reason = _why_not()
    if reason is None:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI is set, and this machine {reason}")
    pytest.skip(reason)


def _own_network() -> dict[str, str]:
    """Describe the network namespace that the tests run in."""
    return {
        command: subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout
        for command in ("ip -j link", "ip -j route", "ip -6 -j route", "nft list tables")
    }


def _processes(lab: Lab) -> list[ProcessRef]:
    try:
        return LabFile(lab.base_dir).read().processes()
    except MeshnetError:
        return []


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file system of busybox alone."""
    return make_rootfs(tmp_path_factory.mktemp("rootfs"))


@pytest.fixture
def lab_name() -> str:
    """A name that no other lab has, of this or another test process."""
    return f"t{os.getpid()}x{next(_counter)}"


@pytest.fixture
def make_lab() -> Iterator[Callable[..., Lab]]:
    """Make labs: ``make_lab(hosts=3, **options of Lab)`` is up, with ``up=False`` it is not yet.

    ``underlay_family``, ``mtu`` and ``gateway`` are those of the underlay.

    Every lab is taken down at the end of the test.  Then nothing of it may be left, and the
    namespace that the tests run in must look as before.
    """
    before = _own_network()
    labs: list[Lab] = []

    def make(
        hosts: int = 3,
        *,
        name: str | None = None,
        up: bool = True,
        underlay_family: Family = 4,
        mtu: int = 1500,
        gateway: bool = True,
        **options: Unpack[LabOptions],
    ) -> Lab:
        underlay = LabUnderlay(underlay_family, mtu, gateway)
        name = name or f"t{os.getpid()}x{next(_counter)}"
        lab = Lab(name, hosts=hosts, underlay=underlay, **options)
        labs.append(lab)
        if up:
            lab.up()
        return lab

    yield make

    errors = []
    for lab in labs:
        started = _processes(lab)
        containers = [path.name for path in lab.base_dir.glob("*/state/containers/*")]
        try:
            lab.down()
        except MeshnetError as exc:
            errors.append(f"down of lab {lab.name}: {exc}")
        left = {
            "namespaces": list_netns(lab.name),
            "processes": [ref.pid for ref in started if ref.is_alive()],
            "directory": [str(lab.base_dir)] if lab.base_dir.exists() else [],
            "cgroups": [path for name in containers for path in cgroups_of(name)],
            "mounts": [
                line
                for line in Path("/proc/self/mountinfo").read_text().splitlines()
                if f" {lab.base_dir}" in line
            ],
        }
        errors += [f"lab {lab.name} left {what}: {items}" for what, items in left.items() if items]
    assert not errors
    assert _own_network() == before
