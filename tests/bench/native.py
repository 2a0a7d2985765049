"""The benchmarks' C programs (``*.c`` beside this file), compiled when they are needed."""

from __future__ import annotations

import os
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


def compile_program(
    name: str,
    directory: Path,
    *,
    static: bool = False,
    shared: bool = False,
    sources: Path = _SOURCES,
) -> Path:
    """Compile a C source into a directory, unless that is done; returns the program.

    Args:
        static: make one that needs no files of this machine.
        shared: make a library.
        sources: the directory of the source.

    Raises:
        NotAvailableError: the C compiler is missing, or fails; the text has its last line.
    """
    program = directory / name
    source = sources / f"{name}.c"
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    directory.mkdir(parents=True, exist_ok=True)
    # Renamed when whole: others may be about to run it, or compile it, too.
    draft = program.with_suffix(f".{os.getpid()}")
    argv = [find("cc", "gcc"), "-O2", "-o", str(draft), str(source)]
    if static:
        argv.append("-static")
    if shared:
        argv += ["-shared", "-fPIC"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise NotAvailableError(f"{name}.c does not compile: {done.stderr.strip()[-200:]}")
    draft.rename(program)
    return program
