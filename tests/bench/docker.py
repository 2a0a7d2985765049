"""A Docker of a benchmark's own, on a lab host: the peer of published ports and of ``run``.

``dockerd`` is started by hand in the host's network namespace, in a mount namespace of its own,
with all its files in a scratch directory and its socket there.  It neither sees nor touches a
Docker that the machine may have.  Settings that concern the network are Docker's defaults.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from tests.bench.native import find

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from meshnet.lab.host import LabHost

_READY_S, _END_S, _CALL_S = 60.0, 30.0, 60.0
_CGROUPS = Path("/sys/fs/cgroup")
# In a mount namespace of its own, where a containerd of the machine is not to be found.
_START = 'mkdir -p /run/containerd && mount -t tmpfs none /run/containerd && exec "$@"'
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
"""Without CAP_SYS_RESOURCE, as in a sandbox, the limits that an engine hands on are refused."""
_NO_NETWORK = ("--bridge=none", "--iptables=false", "--ip6tables=false")


class Docker:
    """A running ``dockerd``; see `open_docker`."""

    def __init__(self, host: LabHost, directory: Path, storage: str, *, network: bool) -> None:
        self._host = host
        self._socket = directory / "docker.sock"
        self._log = directory / "dockerd.log"
        self._cgroup = f"mnbench{os.getpid()}"
        config = directory / "daemon.json"
        config.write_text("{}")
        argv = [
            *("unshare", "--mount", "--", "sh", "-c", _START, "sh"),
            *(find("dockerd"), "--config-file", str(config), "--storage-driver", storage),
            *("--data-root", str(directory / "data"), "--exec-root", str(directory / "exec")),
            *("--pidfile", str(directory / "docker.pid"), "-H", f"unix://{self._socket}"),
            *(() if network else _NO_NETWORK),
            *("--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", self._cgroup),
        ]
        with self._log.open("w") as log:
            self._daemon = host.popen(argv, stdout=log, stderr=log)

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: it ended, or does not answer in time; the text has the end of its log.
        """

        def ready() -> bool:
            if self._daemon.poll() is not None:
                raise RuntimeError(f"dockerd ended: {self._log.read_text()[-800:]}")
            return self._socket.exists() and self.call("version", check=False).returncode == 0

        wait_until(ready, _READY_S, "dockerd answers")

    def call(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the client.

        Raises:
            CommandFailedError: it failed; the text has what it printed.
        """
        return self._host.run([*self.argv, *arguments], check=check, timeout=_CALL_S)

    @property
    def argv(self) -> list[str]:
        """How the client is called; it runs in any namespace."""
        return [find("docker"), "-H", f"unix://{self._socket}"]

    def load(self, image: str, program: Path, *changes: str) -> None:
        """Make an image with one program at its root.

        Args:
            changes: instructions of a Dockerfile that say how it is to be run.
        """
        archive = program.with_suffix(".tar")
        with tarfile.open(archive, "w") as tar:
            tar.add(program, arcname=program.name)
        options = [word for change in changes for word in ("--change", change)]
        self.call("import", *options, str(archive), image)

    def serve(self, image: str, published: str, argv: Sequence[str]) -> None:
        """Start a container on Docker's default network with a published port.

        The system call filter would slow it, and only the network is to be compared.
        """
        options = (*LIMITS, "--security-opt", "seccomp=unconfined", "--publish", published)
        self.call("run", "--detach", *options, image, *argv)

    def end(self) -> None:
        """Remove its containers, end it, and remove what it leaves in the control groups."""
        if self._daemon.poll() is None:
            left = self.call("ps", "--all", "--quiet", check=False).stdout.split()
            if left:
                self.call("rm", "--force", *left, check=False)
            self._daemon.terminate()
            try:
                self._daemon.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
        remove_cgroups(self._cgroup)


def remove_cgroups(name: str) -> None:
    """Remove what an engine has left of the control group that its containers were in."""
    for group in (_CGROUPS / name, *_CGROUPS.glob(f"*/{name}")):
        for path in (*sorted(group.glob("**/"), reverse=True), group):
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def open_docker(
    host: LabHost, directory: Path, *, storage: str = "vfs", network: bool = True
) -> Iterator[Docker]:
    """A Docker on a lab host while the block runs.

    Args:
        directory: for its files; removed at the end.
        storage: its storage driver; that of the default copies, and works on any file system.
        network: False for a Docker without networks, which only makes images.

    Raises:
        NotAvailableError: it is not installed.
        RuntimeError: it does not start.
    """
    directory.mkdir()
    docker = Docker(host, directory, storage, network=network)
    try:
        docker.wait_until_ready()
        yield docker
    finally:
        docker.end()
        shutil.rmtree(directory, ignore_errors=True)
