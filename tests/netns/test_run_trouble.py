"""What a container's end needs and does not get: the agent goes on, says so, and tries again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.containers import FOREVER, detached
from tests.netns.mesh import meshnet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root


@contextlib.contextmanager
def mounted(*argv: str) -> Iterator[None]:
    """Something at the last of the words, until the block ends."""
    subprocess.run(["mount", *argv], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", argv[-1]], check=True)


def errors(host: LabHost) -> str:
    """What ``status`` names, outside of networks."""
    return "\n".join(meshnet(host, "status")["errors"])


def end(host: LabHost, name: str) -> None:
    """Have a container end by itself, with status 9."""
    (pid,) = [c["pid"] for c in meshnet(host, "ps") if c["name"] == name]
    os.kill(pid, signal.SIGTERM)


def test_a_full_disk(make_lab: MakeLab, rootfs: Path) -> None:
    (host,) = make_lab(1, start_agents=False).hosts
    directory = host.state_dir / "containers"
    directory.mkdir(parents=True)
    with mounted("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory)):
        host.start_agent()
        agent = host.agent_pid
        detached(host, rootfs, "--name", "c", "--", "sh", "-c", FOREVER)
        with contextlib.suppress(OSError), (directory / "filler").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        end(host, "c")
        meshnet(host, "wait", "c")  # its status was conmon's to write, on the same disk
        wait_until(lambda: "container c has no record" in errors(host), 10, "status names it")
        assert "No space left" in errors(host)
        (directory / "filler").unlink()
        wait_until(lambda: "container c" not in errors(host), 20, "it is recorded")
        assert host.agent_pid == agent
        host.kill_agent()
        host.start_agent()
        (found,) = meshnet(host, "ps", "--all")
        assert found["state"] == "exited"
        meshnet(host, "rm", "c")
        host.stop_agent()


def test_files_that_cannot_be_removed(make_lab: MakeLab, rootfs: Path) -> None:
    (host,) = make_lab(1).hosts
    agent = host.agent_pid
    detached(host, rootfs, "--name", "c", "--rm", "--", "sh", "-c", FOREVER)
    (directory,) = (host.state_dir / "containers").iterdir()
    file = directory / "immutable"
    file.touch()
    subprocess.run(["chattr", "+i", str(file)], check=True)
    try:
        end(host, "c")
        wait_until(lambda: "container c is not removed" in errors(host), 10, "status names it")
        assert host.agent_pid == agent
    finally:
        subprocess.run(["chattr", "-i", str(file)], check=True)
    wait_until(lambda: not meshnet(host, "ps", "--all"), 20, "it is removed")
    assert "container c" not in errors(host)
    assert not directory.exists()
