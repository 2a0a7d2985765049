"""Three machines for all tests: booted once, and brought back to that state before each test."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.etcd import EtcdServer
from tests.vm.image import build_image
from tests.vm.machine import Machine
from tests.vm.mesh import Mesh
from tests.vm.switch import GATEWAY, Switch

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

_MACHINES = 3


def _own_network() -> str:
    command = "ip -j link; ip -j route; ip -6 -j route; nft list tables"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="session")
def machines() -> Iterator[Sequence[Machine]]:
    """The machines, booted, in the state that each test begins with."""
    image = build_image()
    before = _own_network()
    with (
        tempfile.TemporaryDirectory(prefix="mnvm") as directory,
        Switch(f"mnvm-{os.getpid()}", _MACHINES) as switch,
    ):
        made = [Machine(n, image, switch, Path(directory)) for n in range(1, _MACHINES + 1)]
        try:
            for machine in made:
                machine.make_disk()
                machine.power_on()
            for machine in made:
                machine.wait_up()
                machine.keep()
            yield made
        finally:
            for machine in made:
                machine.power_cut()
    assert _own_network() == before


@pytest.fixture
def mesh(
    machines: Sequence[Machine], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Mesh]:
    """The machines as new, with an empty etcd at the gateway; what complains fails the test."""
    switch = machines[0].switch
    with EtcdServer(
        tmp_path / "etcd",
        client_url=f"http://{GATEWAY}:2379",
        prefix=switch.prefix,
        log_file=tmp_path / "etcd.log",
    ) as etcd:
        for machine in machines:
            machine.reset()
        mesh = Mesh(machines, etcd, switch)
        yield mesh
        if not request.node.stash.get(_FAILED, False):
            mesh.check_quiet()


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the machines' consoles and journals said last, where a test failed."""
    report = yield
    if report.failed and call.when == "call":
        item.stash[_FAILED] = True
        for machine in getattr(item, "funcargs", {}).get("machines", ()):
            report.sections.append((f"console of {machine.name}", machine.console_tail()))
            report.sections.append((f"journal of {machine.name}", machine.journal_tail()))
    return report
