"""Runs commands in a namespace, and keeps track of the children that this makes.

May import only the standard library and the lab's lower modules.
"""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any, TextIO

from meshnet.lab.netns import enter_argv
from meshnet.lab.process import ProcessRef, identify

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_REAP_TIMEOUT_S = 10.0


class CommandFailedError(subprocess.CalledProcessError):
    """A command in the lab failed; the message also has what it printed.

    `subprocess.CalledProcessError` shows only the status, which says little in a test's report.
    """

    def __str__(self) -> str:
        printed = "".join(
            f"\n  {name}: {text.strip()}"
            for name, text in (("stdout", self.stdout), ("stderr", self.stderr))
            if text and text.strip()
        )
        return f"{super().__str__()}{printed}"


class Children:
    """Processes that this program has started and must reap."""

    def __init__(self) -> None:
        self._by_pid: dict[int, subprocess.Popen[Any]] = {}

    def add(self, child: subprocess.Popen[Any]) -> None:
        """Keep a child until it is reaped."""
        self._by_pid[child.pid] = child

    def running(self) -> list[ProcessRef]:
        """Return the children that have not ended."""
        # A child that poll() finds running is not reaped, so its pid is still its own.
        return [identify(child.pid) for child in self._by_pid.values() if child.poll() is None]

    def reap(self, pid: int) -> int | None:
        """Reap a child that has ended, or is about to.

        Returns:
            Its exit status, negative for a signal; None if it is not a child of ours.
        """
        child = self._by_pid.pop(pid, None)
        return None if child is None else _reap(child)

    def reap_all(self) -> None:
        """Reap all children, and close our ends of their pipes."""
        while self._by_pid:
            _reap(self._by_pid.popitem()[1])


def _reap(child: subprocess.Popen[Any]) -> int:
    status = child.wait(_REAP_TIMEOUT_S)
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None and not pipe.closed:
            pipe.close()
    return status


class Namespace:
    """A network namespace to run commands in.

    Attributes:
        netns_path: what setns(2) and nsenter(1) take.
    """

    def __init__(
        self, netns_path: Path, children: Children, environment: Mapping[str, str] | None = None
    ) -> None:
        self.netns_path = netns_path
        self._children = children
        self._environment = dict(environment or {})

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30.0,
        input_text: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command here and wait for it; its output is captured.

        Args:
            check: raise when its exit status is not 0.
            timeout: seconds after which it is killed.
            input_text: its stdin; nothing by default.
            env: further variables, on top of those inherited.

        Raises:
            CommandFailedError: see `check`.
            subprocess.TimeoutExpired: see `timeout`.
        """
        result = subprocess.run(
            [*enter_argv(self.netns_path), *argv],
            input=input_text,
            stdin=subprocess.DEVNULL if input_text is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self._full_environment(env),
            check=False,
        )
        if check and result.returncode != 0:
            raise CommandFailedError(result.returncode, list(argv), result.stdout, result.stderr)
        return result

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: int | TextIO = subprocess.DEVNULL,
        stdout: int | TextIO = subprocess.PIPE,
        stderr: int | TextIO = subprocess.STDOUT,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command here; its pid is the command's own.

        It is ended, reaped and its pipes are closed when the lab is taken down, if the caller has
        not done so.  The pipe of a command that prints much must be read, or it stops.
        """
        child = subprocess.Popen(
            [*enter_argv(self.netns_path), *argv],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            env=self._full_environment(env),
            start_new_session=True,
        )
        self._children.add(child)
        return child

    def _full_environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        return {**os.environ, **self._environment, **(env or {})}
