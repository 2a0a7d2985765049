"""The shared library of the native engine: built from ``src``, found beside it.

It is called through ctypes, which is in Python: nothing but a C compiler and libc's headers is
needed to build it, no headers of Python, and one build serves all versions of it.  What a call
costs does not matter: the engine returns only when Python has something to do.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path

from meshnet.errors import KernelRefusedError, NotFoundError

_SOURCES = Path(__file__).parent / "src"
_LIBRARY = Path(__file__).parent / "libmeshnet-vtep.so"
_FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-z,now,-z,relro"),
    *("-Wall", "-Wextra", "-fstack-protector-strong"),
)
_REMEDY = "run `make native`, or `python -m meshnet.vtep.native` where meshnet is installed"
_TIMEOUT_S = 120


def build() -> Path:
    """Compile the library, if the one that is there is not of these sources; returns its path.

    Raises:
        NotFoundError: there is no C compiler.
        KernelRefusedError: it does not compile, or cannot be written.
    """
    try:
        load()
    except NotFoundError:
        _compile()
    return _LIBRARY


def load() -> ctypes.CDLL:
    """The library.

    Raises:
        NotFoundError: it is not built, or from other sources than these.
    """
    if not _LIBRARY.exists():
        raise NotFoundError(f"the native engine is not built: {_REMEDY}")
    try:
        library = ctypes.CDLL(str(_LIBRARY), use_errno=True)
        library.mn_digest.restype = ctypes.c_char_p
        found = library.mn_digest()
    except (OSError, AttributeError) as error:
        raise NotFoundError(f"the native engine cannot be used ({error}): {_REMEDY}") from error
    if found != _digest().encode():
        raise NotFoundError(f"the native engine is of another version: {_REMEDY}")
    return library


def _digest() -> str:
    """Of everything that the library is made from."""
    found = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in sorted(_SOURCES.iterdir()):
        found.update(path.read_bytes())
    return found.hexdigest()


def _compile() -> None:
    # Imported here: a process that only loads the library starts sooner.
    import shutil
    import subprocess
    import tempfile

    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise NotFoundError("there is no C compiler: install one (Debian: gcc libc6-dev)")
    sources = [str(path) for path in sorted(_SOURCES.glob("*.c"))]
    try:
        with tempfile.TemporaryDirectory(dir=_LIBRARY.parent) as directory:
            made = Path(directory, _LIBRARY.name)
            define = f'-DMESHNET_DIGEST="{_digest()}"'
            done = subprocess.run(
                [compiler, *_FLAGS, define, "-o", str(made), *sources],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
            if done.returncode != 0:
                words = done.stderr.strip()[-300:]
                raise KernelRefusedError(f"the native engine does not compile: {words}")
            made.rename(_LIBRARY)  # whole or not at all, whoever builds it, too, or uses it
    except OSError as error:
        raise KernelRefusedError(f"{_LIBRARY.parent} cannot be written: {error}") from error
