"""The harness's C programs (``*.c`` beside this file): built when needed, asked line by line."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.native import compile_program

if TYPE_CHECKING:
    from meshnet.lab.commands import Namespace

_SOURCES = Path(__file__).parent
BUILD_DIR = _SOURCES.parents[2] / "build" / "faults"
_END_DEADLINE_S = 30.0


def compile_library(name: str) -> Path:
    """Compile one that is preloaded; returns it."""
    return compile_program(name, BUILD_DIR, shared=True, sources=_SOURCES)


class GoneError(Exception):
    """A program in an endpoint's namespace has ended: the endpoint did, or its host."""


class Program:
    """One of the C programs, running in a namespace."""

    def __init__(self, namespace: Namespace, name: str, *arguments: object) -> None:
        file = compile_program(name, BUILD_DIR, sources=_SOURCES)
        self._child = namespace.popen(
            [str(file), *map(str, arguments)], stdin=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._read()

    def ask(self, *lines: str) -> list[dict[str, Any]]:
        """Give it commands; returns its answers.

        Raises:
            GoneError: it has ended.
        """
        assert self._child.stdin is not None  # it is a pipe
        try:
            self._child.stdin.write("".join(f"{line}\n" for line in lines))
            self._child.stdin.flush()
        except (BrokenPipeError, ValueError) as exc:
            raise GoneError from exc
        return [self._read() for _ in lines]

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None  # it is a pipe
        line = self._child.stdout.readline()
        if not line:
            raise GoneError
        if not line.startswith("{"):
            raise AssertionError(f"{self._child.args!r}: {line.strip()}")
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, answer
        return answer

    def stop(self) -> None:
        """End it."""
        assert self._child.stdin is not None  # it is a pipe
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.wait(_END_DEADLINE_S)
