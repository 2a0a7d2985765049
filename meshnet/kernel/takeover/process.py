"""Starting the program and asking what stands: the agent's side of a takeover.

A process goes on when the agent that started it ends; the next process waits for it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING

import trio

from meshnet.errors import KernelRefusedError, error_classes
from meshnet.kernel.takeover.interface import Interfaces
from meshnet.kernel.takeover.journal import JournalDir
from meshnet.kernel.takeover.standing import find_standing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from meshnet.model import IpAddress


class TakeoverProcesses:
    """What a host has taken over.

    Args:
        state_dir: the agent's; it holds the journals.
        etcd: ``HOST:PORT`` of etcd's members, of which one must answer through a bridge.
        confirm_s: seconds for it and the gateway to answer.
    """

    def __init__(self, state_dir: Path, etcd: Sequence[str], confirm_s: float) -> None:
        self._state_dir = state_dir
        self._journals = JournalDir(state_dir)
        self._etcd = etcd
        self._confirm_s = confirm_s

    def bridges(self) -> list[str]:
        """Bridges that have taken a link, or were about to."""
        return self._journals.bridges()

    async def standing(self) -> dict[str, str]:
        """Bridges that have taken a link, confirmed by the gateway and etcd, and that link.

        Raises:
            KernelRefusedError: a journal cannot be read.
        """
        bridges = self.bridges()
        return await trio.to_thread.run_sync(self._find_standing, bridges) if bridges else {}

    def _find_standing(self, bridges: Sequence[str]) -> dict[str, str]:
        with contextlib.closing(Interfaces()) as interfaces:
            found = {b: find_standing(b, self._journals, interfaces) for b in bridges}
        return {bridge: parent for bridge, parent in found.items() if parent is not None}

    async def settle(self) -> None:
        """Undo what was cut short, and what somebody took apart.

        Raises:
            MeshnetError: it cannot be undone.
        """
        standing = await self.standing()
        for bridge in self.bridges():
            if bridge not in standing:
                await self._run(bridge, "settle")

    async def take_over(self, bridge: str, parent: str, gateways: Sequence[IpAddress]) -> None:
        """Put a bridge in the place of a link (`meshnet.kernel.takeover.main.Takeover.take_over`).

        Raises:
            MeshnetError: everything is as it was.
        """
        options = ["--parent", parent, "--confirm", str(self._confirm_s)]
        for gateway in gateways:
            options += ["--gateway", str(gateway)]
        for member in self._etcd:
            options += ["--etcd", member]
        await self._run(bridge, "take", *options)

    async def give_back(self, bridge: str) -> None:
        """Move everything back (`meshnet.kernel.takeover.main.Takeover.give_back`).

        Raises:
            MeshnetError: it cannot be given back, or endpoints hang on it.
        """
        await self._run(bridge, "return")

    async def _run(self, bridge: str, verb: str, *options: str) -> None:
        """Run the program and wait; cancellation stops only the waiting.

        If the program is killed, what it did is undone.
        """
        # Not `trio.run_process`, which kills its process on cancellation.
        self._journals.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        log_path = self._journals.log_of(bridge)
        argv = [sys.executable, "-m", "meshnet.kernel.takeover", verb, "--bridge", bridge]
        argv += ["--state-dir", str(self._state_dir), *options]
        with log_path.open("wb") as log:
            process = await trio.lowlevel.open_process(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        status = await process.wait()
        # Of settling itself this would never end.
        if status < 0 and verb != "settle":
            await self._run(bridge, "settle")
            raise KernelRefusedError(
                f"takeover by bridge {bridge}: its process was killed by signal {-status}"
            )
        if status:
            words = log_path.read_text(errors="replace").strip().splitlines()
            reason = words[-1].partition(": ")[2] if words else "it was killed"
            # The exit status names the class: the user gets the error that the program met.
            for error in error_classes().values():
                if error.exit_status == status:
                    raise error(reason)
            raise KernelRefusedError(f"takeover by bridge {bridge} ended with {status}: {reason}")
