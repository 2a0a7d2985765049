"""The benchmarks' C programs (``*.c`` beside this file), compiled when they are needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_SOURCES = Path(__file__).parent
_TIMEOUT_S = 60


class NotAvailableError(Exception):
    """This machine lacks a program or a kernel feature; the text says which."""


def find(*names: str) -> str:
    """The path of the first program of these that is installed.

    Raises:
        NotAvailableError: none is.
    """
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise NotAvailableError(f"{' or '.join(names)} is not installed")


def compile_program(name: str, directory: Path, *, static: bool = False) -> Path:
    """Compile a C source of this package into a directory, once; returns the program.

    Args:
        static: make one that needs no files of this machine.

    Raises:
        NotAvailableError: there is no C compiler, or it refuses; the text has its last line.
    """
    program = directory / name
    if program.exists():
        return program
    argv = [find("cc", "gcc"), "-O2", "-o", str(program), str(_SOURCES / f"{name}.c")]
    if static:
        argv.append("-static")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise NotAvailableError(f"{name}.c does not compile: {done.stderr.strip()[-200:]}")
    return program
