"""Running the programs that the host's firewalls are told by, without holding up the event loop."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, NamedTuple

import trio

if TYPE_CHECKING:
    from collections.abc import Sequence

_TIMEOUT_S = 20.0


class Done(NamedTuple):
    """How a program ended; a program that is missing or hangs has failed, and `error` says so."""

    ok: bool
    output: str
    error: str


async def run(argv: Sequence[str]) -> Done:
    """Run a program, without a shell."""
    try:
        with trio.fail_after(_TIMEOUT_S):
            done = await trio.run_process(
                list(argv), capture_stdout=True, capture_stderr=True, check=False
            )
    except FileNotFoundError:
        return Done(False, "", f"program {argv[0]} is missing: install it")
    except (OSError, subprocess.SubprocessError) as error:
        return Done(False, "", f"{argv[0]}: {error}")
    except trio.TooSlowError:
        return Done(False, "", f"{argv[0]} did not end within {_TIMEOUT_S:.0f} s")
    said = done.stderr.decode(errors="replace").strip()
    return Done(
        done.returncode == 0,
        done.stdout.decode(errors="replace"),
        said.splitlines()[0] if said else f"{argv[0]} ended with status {done.returncode}",
    )
