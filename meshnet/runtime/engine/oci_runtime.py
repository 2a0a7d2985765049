"""The OCI runtime underneath: ``crun`` or ``runc``, whichever can run on this host.

Each command is a process of a few milliseconds (runtime-spec, "Operations"); ``create`` is
conmon's (`meshnet.runtime.engine.conmon`).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from meshnet.errors import KernelRefusedError
from meshnet.runtime.spec.config import standard_mounts

_CANDIDATES = ("crun", "runc")
_UNIFIED = Path("/sys/fs/cgroup/unified")
_HIDE_UNIFIED = 'umount /sys/fs/cgroup/unified && exec "$@"'
_NOT_FOUND = re.compile(
    "executable file .*not found|exec: .*: stat .*no such file|open executable: .*no such file",
    re.IGNORECASE,
)
_NOT_EXECUTABLE = re.compile("permission denied|is a directory|exec format", re.IGNORECASE)
_LEVEL = re.compile(r'^time="[^"]*" level=\w+ msg=')

_SYSFS = {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}
_SHM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class OciRuntime:
    """One runtime and its state directory.

    Attributes:
        root: where it remembers its containers; gone after a reboot, as they are.
        enter: words before `path` where it makes processes (`create`, `exec`); nothing that they
            make for it outlasts the call.
        systemd_cgroup: systemd makes the cgroups (``--cgroup-driver systemd``).
    """

    path: Path
    root: Path
    enter: tuple[str, ...] = ()
    systemd_cgroup: bool = False

    def cgroup(self, identity: str) -> str:
        """``cgroupsPath`` of a container; for systemd ``SLICE:PREFIX:NAME``, a scope."""
        if self.systemd_cgroup:
            return f"system.slice:meshnet:{identity}"
        return f"/meshnet/{identity}"

    async def start(self, identity: str) -> None:
        """Let the paused process of a created container go on.

        Raises:
            KernelRefusedError: the runtime's message.
        """
        await self._run("start", identity)

    async def delete(self, identity: str) -> None:
        """Kill what is left of a container and forget it, cgroup included.  Idempotent.

        Raises:
            KernelRefusedError: the runtime's message.
        """
        if (self.root / identity).exists():
            await self._run("delete", "--force", identity)

    async def _run(self, *arguments: str) -> None:
        driver = ["--systemd-cgroup"] if self.systemd_cgroup else []
        command = [str(self.path), "--root", str(self.root), *driver, *arguments]
        with trio.CancelScope(shield=True):
            done = await trio.run_process(
                command, capture_stdout=True, capture_stderr=True, check=False
            )
        if done.returncode != 0:
            raise KernelRefusedError(clean(done.stderr.decode(errors="replace")))


def clean(message: str) -> str:
    """A runtime's last words as one line."""
    lines = [_LEVEL.sub("", line).strip().strip('"') for line in message.splitlines()]
    return "; ".join(filter(None, lines)) or "the runtime says nothing"


def exit_status_of(message: str) -> int:
    """What a failed start means: 127 no such program, 126 it cannot be executed, else 125."""
    if _NOT_FOUND.search(message):
        return 127
    return 126 if _NOT_EXECUTABLE.search(message) else 125


async def find_runtime(
    root: Path, *, systemd_cgroup: bool = False
) -> tuple[OciRuntime, dict[str, str]]:
    """The first runtime that can run here, and why others were passed over.

    Each is asked to create a container of nothing, with the mounts of every other: one that gets as
    far as not finding the program has made namespaces, cgroups and mounts.

    Raises:
        KernelRefusedError: there is none; the message has the reasons.
    """
    passed_over: dict[str, str] = {}
    for name in _CANDIDATES:
        found = shutil.which(name)
        if found is None:
            passed_over[name] = "not installed"
            continue
        for enter in ways_to_run(name):
            runtime = OciRuntime(Path(found), root, enter, systemd_cgroup)
            reason = await _try(runtime)
            if _NOT_FOUND.search(reason):
                passed_over.pop(name, None)
                return runtime, passed_over
            passed_over.setdefault(name, reason)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise KernelRefusedError(f"no OCI runtime can run on this host ({reasons}): install runc")


def ways_to_run(name: str) -> list[tuple[str, ...]]:
    """What to put before a runtime: nothing, or what may help if that does not do.

    crun refuses cgroups v1 where a v2 tree beside them has controllers (hybrid), and takes v1 alone
    where it does not see that tree.  So it gets a mount namespace without it, one for each call:
    one that lasted would keep root file systems mounted that are gone.  What the container
    mounts is in a namespace of its own in any case.
    """
    unshare = shutil.which("unshare")
    if name != "crun" or unshare is None or not _UNIFIED.is_mount():
        return [()]
    hidden = (unshare, "--mount", "--propagation", "slave", "--", "sh", "-c", _HIDE_UNIFIED, "sh")
    return [(), hidden]


async def _try(runtime: OciRuntime) -> str:
    with TemporaryDirectory(prefix="meshnet-probe-") as directory:
        identity = Path(directory).name
        bundle = Path(directory, "bundle")
        for name in ("dev", "proc", "sys"):
            (bundle / "rootfs" / name).mkdir(parents=True)
        (bundle / "config.json").write_text(json.dumps(_probe(runtime.cgroup(identity))))
        command: list[str | Path] = [
            *runtime.enter,
            runtime.path,
            "--root",
            Path(directory, "state"),
            *(["--systemd-cgroup"] if runtime.systemd_cgroup else []),
            "run",
            "--bundle",
            bundle,
            identity,
        ]
        done = await trio.run_process(
            command, stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True, check=False
        )
    return clean(done.stderr.decode(errors="replace"))


def _probe(cgroup: str) -> dict[str, Any]:
    return {
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/none"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "mounts": [_SYSFS, *standard_mounts(_SHM_BYTES)],
        "linux": {
            "cgroupsPath": cgroup,
            "resources": {"pids": {"limit": 16}},
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "network", "ipc", "uts")],
        },
    }
