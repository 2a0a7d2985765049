"""A Podman of a benchmark's own, on a lab host: a peer of ``run``.

It has no daemon: each command is a process.  All of them run in the host's network namespace and in
one mount namespace, in which its files are in a scratch directory and those that it has at fixed
places are hidden.  The network is its default one, a bridge with NAT by CNI plugins.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from tests.bench.docker import remove_cgroups
from tests.bench.native import find

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from meshnet.lab.host import LabHost

_READY_S, _CALL_S = 10.0, 60.0
_HIDE = (
    "mkdir -p /var/lib/cni && mount -t tmpfs none /var/lib/cni && mount -t tmpfs none /dev/shm"
    ' && touch "$1" && exec sleep infinity'
)


class Podman:
    """A place for Podman's commands; see `open_podman`."""

    def __init__(self, host: LabHost, directory: Path) -> None:
        self._cgroup = f"mnbenchpod{os.getpid()}"
        ready = directory / "ready"
        self._holder = host.popen(
            ["unshare", "--mount", "--", "sh", "-c", _HIDE, "sh", str(ready)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(ready.exists, _READY_S, "Podman's mount namespace is there")
        space = f"/proc/{self._holder.pid}/ns"
        self.argv = [
            *("nsenter", f"--net={space}/net", f"--mount={space}/mnt", find("podman")),
            *("--root", str(directory / "root"), "--runroot", str(directory / "run")),
            *("--tmpdir", str(directory / "tmp"), "--network-config-dir", str(directory / "net")),
            *("--cgroup-manager", "cgroupfs", "--runtime", find("runc")),
        ]
        self.run_options = ("--cgroup-parent", f"/{self._cgroup}")

    def call(self, *arguments: str) -> None:
        """Run a command.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        subprocess.run(
            [*self.argv, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_CALL_S,
            check=True,
        )

    def end(self) -> None:
        """Remove its containers and what it leaves in the control groups."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.call("rm", "--all", "--force", "--time", "0")
        self._holder.terminate()
        self._holder.wait()
        remove_cgroups(self._cgroup)


@contextlib.contextmanager
def open_podman(host: LabHost, directory: Path) -> Iterator[Podman]:
    """A Podman on a lab host while the block runs.

    Args:
        directory: for its files; removed at the end.

    Raises:
        NotAvailableError: it is not installed.
    """
    directory.mkdir()
    podman = Podman(host, directory)
    try:
        yield podman
    finally:
        podman.end()
        shutil.rmtree(directory, ignore_errors=True)
