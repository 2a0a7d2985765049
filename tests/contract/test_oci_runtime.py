"""The commands before an OCI runtime's own that let it run on this machine's cgroups."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from meshnet.runtime.engine.conmon import Shim
from meshnet.runtime.engine.oci_runtime import OciRuntime, ways_to_run

pytestmark = pytest.mark.root
UNIFIED = "/sys/fs/cgroup/unified"


def test_crun_does_not_see_the_v2_tree_of_a_hybrid_machine() -> None:
    """And the machine keeps it."""
    before = os.path.ismount(UNIFIED)
    ways = ways_to_run("crun")
    assert len(ways) == (2 if before else 1)
    for way in ways:
        argv = [*way, "cat", "/proc/self/mounts"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        seen = [line.split()[1] for line in done.stdout.splitlines()]
        assert (UNIFIED in seen) == (before and way == ())
    assert os.path.ismount(UNIFIED) == before
    assert ways_to_run("runc") == [()]


def test_conmon_is_told_all_words(tmp_path: Path) -> None:
    """The words that conmon puts together: run as it runs them."""
    runtime = OciRuntime(Path("/bin/echo"), tmp_path / "root", ("/usr/bin/env", "A=b", "sh", "-c",
                         'echo "$A"; exec "$@"', "sh"))  # fmt: skip
    shim = Shim(
        runtime=runtime,
        identity="c1",
        bundle=tmp_path,
        log=tmp_path / "log",
        exits=tmp_path,
        tty=False,
        stdin=False,
    )
    words = shim.command()
    program = words[words.index("--runtime") + 1]
    arguments = [words[i + 1] for i, word in enumerate(words) if word == "--runtime-arg"]
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "b",
        f"--root {tmp_path / 'root'} --log {tmp_path / 'runtime.log'}",
    ]
