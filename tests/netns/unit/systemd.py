"""A systemd of its own on a lab's host, in namespaces, with nothing of this machine in its reach.

It has this machine's file system below an overlay whose upper layer is in memory, its own /proc,
/run, /tmp and devices, and control groups below one of its own.  Of the units that are installed it
starts none but those it is asked for, and what they require.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

from meshnet.lab.netns import enter_argv
from meshnet.lab.poll import wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from meshnet.lab.host import LabHost

_REPOSITORY = Path(__file__).parents[3]
_CGROUPS = Path("/sys/fs/cgroup")
_TARGET = "started.target"
_LOG = "run/agent.log"
_DEADLINE_S = 30.0


class Systemd:
    """Running while this is entered, in the host's network namespace.

    Args:
        files: what /etc has besides: paths below it, and contents.
    """

    def __init__(self, host: LabHost, files: Mapping[str, str]) -> None:
        self._host = host
        self._directory = host.state_dir.with_name("systemd")
        self._cgroups = [
            (options, Path(place) / f"{host.netns}-systemd") for place, options in _hierarchies()
        ]
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

    def __enter__(self) -> Self:
        self._directory.mkdir()
        boot = {
            "files": self._files,
            "cgroups": [[options, str(path)] for options, path in self._cgroups],
            "kept": self._kept,
            "target": _TARGET,
        }
        (self._directory / "boot.json").write_text(json.dumps(boot))
        for _, path in self._cgroups:
            path.mkdir()
        argv = [sys.executable, "-m", "tests.netns.unit.boot", str(self._directory)]
        with (self._directory / "log").open("ab") as log:
            self._outer = subprocess.Popen(
                [*enter_argv(self._host.netns_path), *argv],
                cwd=_REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(self._is_up, _DEADLINE_S, "systemd is up")
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            if exc is not None:
                exc.add_note(self._logs())
            # With process 1 of a namespace all others end.
            os.kill(self.pid, signal.SIGKILL)
        self._outer.wait(_DEADLINE_S)
        for _, path in self._cgroups:
            wait_until(lambda: _removed(path), 10, f"{path} is empty")  # noqa: B023

    @property
    def pid(self) -> int:
        """Process 1 of the namespaces, as this machine counts.

        Raises:
            ProcessLookupError: it has ended, or has not begun.
        """
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        with contextlib.suppress(OSError, ValueError):
            (child,) = children.read_text().split()
            return int(child)
        raise ProcessLookupError

    def run(
        self, *argv: str, check: bool = True, timeout_s: float = _DEADLINE_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command among its processes."""
        done = subprocess.run(
            [*self.enter_argv(), *argv], capture_output=True, text=True, timeout=timeout_s,
            check=False, env={"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def enter_argv(self) -> tuple[str, ...]:
        """Argv to put before a command that is to run among its processes."""
        return ("nsenter", "-t", str(self.pid), "-m", "-n", "-p", "-u", "-i", "-C", "--")

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()

    def _is_up(self) -> bool:
        assert self._outer.poll() is None, "systemd has ended"
        with contextlib.suppress(ProcessLookupError):
            return self.run("systemctl", "is-active", _TARGET, check=False).returncode == 0
        return False

    def _logs(self) -> str:
        text = (self._directory / "log").read_text()
        with contextlib.suppress(OSError):
            text += Path(f"/proc/{self.pid}/root", _LOG).read_text()
        return text


def _hierarchies() -> list[tuple[str, str]]:
    """Where hierarchies of control groups are mounted below /sys/fs/cgroup, and their options."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        place = before.split()[4]
        kind, _, options = after.split()[:3]
        # Nobody can join a new cpuset of version 1 before it has been given CPUs.
        if place.startswith(str(_CGROUPS)) and kind == "cgroup" and "cpuset" not in options:
            found.append((place, options.removeprefix("rw,")))
        if place == str(_CGROUPS) and kind == "cgroup2":
            found.append((place, ""))
    return found


def _removed(cgroup: Path) -> bool:
    """Remove a cgroup and those below it; the last process may not be gone entirely."""
    try:
        for directory, _, _ in os.walk(cgroup, topdown=False):
            os.rmdir(directory)
    except OSError:
        return False
    return True
