"""Runs a systemd on a lab's host, in namespaces, where it cannot reach anything of this machine.

It has this machine's file system below an overlay whose upper layer is in memory, its own /run,
/tmp and devices, control groups below one of its own, and may set no sysctl but those of its
network namespace.  Of the units that are installed it starts none but those it is asked for, and
what they require.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from meshnet.lab.netns import enter_argv
from meshnet.lab.poll import wait_until
from tests.netns.cgroups import removed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from meshnet.lab.host import LabHost

_REPOSITORY = Path(__file__).parents[3]
_CGROUPS = "/sys/fs/cgroup"
_CPUSET = ("cpuset.cpus", "cpuset.mems")
_TARGET = "started.target"
_LOG = "run/agent.log"
_DEADLINE_S = 30.0


class Hierarchy(NamedTuple):
    """A hierarchy of control groups.

    Attributes:
        kind: type of its file system: ``cgroup`` or ``cgroup2``.
        options: to mount it by; "": none.
        place: where it is mounted.
    """

    kind: str
    options: str
    place: str


class Systemd:
    """Running while this is entered, in the host's network namespace.

    Args:
        files: what /etc has besides: paths below it, and contents.
    """

    def __init__(self, host: LabHost, files: Mapping[str, str]) -> None:
        self._host = host
        self._directory = host.state_dir.with_name("systemd")
        self._hierarchies = _hierarchies()
        self._groups = [Path(h.place, f"{host.netns}-systemd") for h in self._hierarchies]
        self._kept = sorted({str(_REPOSITORY), sys.prefix, sys.base_prefix})
        # Where this checkout and its interpreter may be, a unit hides things.
        drop_in = ["[Service]", f"StandardOutput=append:/{_LOG}", "ProtectHome=tmpfs"]
        drop_in += [f"BindReadOnlyPaths={path}" for path in self._kept]
        self._files = {
            **files,
            "hostname": f"{host.name}\n",
            f"systemd/system/{_TARGET}": "[Unit]\nDefaultDependencies=no\n",
            "systemd/system/meshnet-agent.service.d/zz-tests.conf": "\n".join(drop_in),
        }
        self._outer: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._boot()
            wait_until(self._is_up, _DEADLINE_S, "systemd is up")
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _boot(self) -> None:
        self._directory.mkdir()
        boot = {
            "files": self._files,
            "hierarchies": self._hierarchies,
            "groups": [str(path) for path in self._groups],
            "kept": self._kept,
            "target": _TARGET,
        }
        (self._directory / "boot.json").write_text(json.dumps(boot))
        for path in self._groups:
            path.mkdir()
            for name in _CPUSET:
                if (path / name).exists():  # version 1: nobody may join before it has some
                    (path / name).write_text((path.parent / name).read_text())
        argv = [sys.executable, "-m", "tests.netns.systemd_unit.boot", str(self._directory)]
        with (self._directory / "log").open("ab") as log:
            self._outer = subprocess.Popen(
                [*enter_argv(self._host.netns_path), *argv],
                cwd=_REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is not None:
            exc.add_note(self._logs())
        if self._outer is not None:
            # It ends its child with itself, and with process 1 of a namespace all others end.
            self._outer.kill()
            self._outer.wait(_DEADLINE_S)
        for path in self._groups:
            wait_until(partial(removed, path), 10, f"{path} is empty")

    @property
    def pid(self) -> int:
        """Process 1 of the namespaces, as this machine counts.

        Raises:
            ProcessLookupError: it has ended, or has not begun.
        """
        if self._outer is not None:
            outer = self._outer.pid
            with contextlib.suppress(OSError, ValueError):
                (child,) = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
                return int(child)
        raise ProcessLookupError

    def run(
        self, *argv: str, check: bool = True, timeout_s: float = _DEADLINE_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command among its processes."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", "-n", "-p", "-u", "-i", "-C", "--", *argv],
            capture_output=True, text=True, timeout=timeout_s, check=False,
            env={"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()

    def _is_up(self) -> bool:
        assert self._outer is not None
        assert self._outer.poll() is None, "systemd has ended"
        with contextlib.suppress(ProcessLookupError):
            return self.run("systemctl", "is-active", _TARGET, check=False).returncode == 0
        return False

    def _logs(self) -> str:
        text = ""
        with contextlib.suppress(OSError):
            text += (self._directory / "log").read_text()
            text += Path(f"/proc/{self.pid}/root", _LOG).read_text()
        return text


def _hierarchies() -> list[Hierarchy]:
    """All that are mounted in the place for them."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        place = before.split()[4]
        kind, _, options = after.split()[:3]
        if kind.startswith("cgroup") and place.startswith(_CGROUPS):
            options = options.removeprefix("rw").removeprefix(",") if kind == "cgroup" else ""
            found.append(Hierarchy(kind, options, place))
    return found
