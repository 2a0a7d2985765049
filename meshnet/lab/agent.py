"""Starts an agent for a lab host, and asks it whether it is ready.

May import only the standard library and `meshnet.unix_http`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from meshnet.unix_http import HttpConnection

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_HTTP_TIMEOUT_S = 2.0
_TAIL_LINES = 15
_TAIL_BYTES = 16_384


def spawn_agent(
    enter: Sequence[str], options: Sequence[str], log_path: Path
) -> subprocess.Popen[bytes]:
    """Start an agent, detached: it outlives us, our terminal and our Ctrl-C.

    Args:
        enter: argv that enters the host's namespace and then runs the agent's argv after it.
        options: of the agent's command line.
        log_path: file to which its stdout and stderr are appended.
    """
    # Our own settings are for the client, or for an agent of the machine itself.  The agent would
    # obey them, as every option has a variable.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MESHNET_")
    }
    with log_path.open("ab") as log:
        return subprocess.Popen(
            [*enter, sys.executable, "-m", "meshnet_agent", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=environment,
            start_new_session=True,
        )


def is_ready(socket_path: Path) -> bool:
    """Tell whether an agent answers GET /readyz with 200."""
    try:
        with HttpConnection(str(socket_path), _HTTP_TIMEOUT_S) as connection:
            connection.request("GET", "/readyz")
            return connection.answer().status == 200
    except OSError:
        return False


def log_tail(path: Path) -> str:
    """Return the last lines of a log, indented for an error message."""
    try:
        with path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    except FileNotFoundError:
        return f"  ({path} does not exist)"
    return "\n".join(f"  {line}" for line in lines) or f"  ({path} is empty)"
