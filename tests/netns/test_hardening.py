"""The agent under its unit's hardening: what agent/systemd gives it is enough for its work.

All of it, and what each capability is for, is shown by ``make hardening``; here is what takes
little time.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.netns.mesh import create_network
from tests.netns.systemd_unit.exercise import Exercise, confined
from tests.netns.systemd_unit.settings import CONTAINERS, UNIT, read_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
QUICK = (
    "vxlan",
    "udp",
    "bridge, published port 80",
    "attach a process of another user",
    "socket of group meshnet",
    "load an image",
    "kill -9 and start",
)


def make_rootfs(host: LabHost) -> Path:
    """A file system of busybox alone, where the agent sees it: /tmp is its own."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "install busybox-static"
    root = host.state_dir / "tree"
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin" / "echo")
    return root


def status_of(host: LabHost) -> dict[str, str]:
    """What the kernel says of the agent's process."""
    lines = Path(f"/proc/{host.agent_pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def run_container(host: LabHost) -> tuple[int, str]:
    root = make_rootfs(host)
    argv = ["run", "--rm", "--net", "prod", "--rootfs", str(root), "echo", "from within"]
    done = host.run([sys.executable, "-m", "meshnet.cli.main", *argv], check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_unit_lets_the_agent_work(make_lab: MakeLab, tmp_path: Path) -> None:
    with confined(read_settings(UNIT)):
        lab = make_lab(2)
        h1, _ = lab.hosts
        status = status_of(h1)
        # It is confined indeed.
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert int(status["CapBnd"], 16).bit_count() == len(read_settings(UNIT).capabilities or ())
        assert status["CapEff"] == status["CapPrm"] == status["CapBnd"]
        inside = ("nsenter", f"--mount=/proc/{h1.agent_pid}/ns/mnt", "touch")
        for path in ("/etc/new", "/usr/new", "/var/new", str(h1.run_dir.parent / "new")):
            assert "Read-only" in h1.run([*inside, path], check=False).stderr
        steps = Exercise(lab, tmp_path).steps()
        for name in QUICK:
            steps[name]()
        refused, said = run_container(h1)
        assert refused == 9, said
        assert "docs/run.md" in said


def test_the_drop_in_lets_it_run_containers(make_lab: MakeLab) -> None:
    with confined(read_settings(UNIT, CONTAINERS)):
        lab = make_lab(1)
        create_network(lab, "prod", "--subnet", "10.42.0.0/16")
        assert run_container(lab.hosts[0]) == (0, "from within\n")
