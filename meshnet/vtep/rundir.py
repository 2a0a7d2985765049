"""A process's run directory: its lock, and the members as it last knew them.

=================  ================================================================
``lock``           locked (flock) while the process lives; ``{"pid", "start_ticks"}``
``control.sock``   see `meshnet.vtep.control`
``state.json``     ``{"v": 1, "vni", "peers"}``; replaced by an atomic rename
=================  ================================================================

A process that is started again, after a crash or a kill, goes on with the members of
``state.json`` before anybody tells it more.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from typing import TYPE_CHECKING, Any

from meshnet.errors import ConflictError, KernelRefusedError, MeshnetError
from meshnet.system.proc import start_ticks

if TYPE_CHECKING:
    from meshnet.vtep.peers import PeerTable

_VERSION = 1


class RunDir:
    """The directory, locked for this process.

    Attributes:
        control_path: where the control socket belongs.
    """

    def __init__(self, path: str) -> None:
        """Lock it; made if it is missing.

        Raises:
            ConflictError: another process has it.
            KernelRefusedError: it cannot be made or written.
        """
        self._path = path
        self.control_path = os.path.join(path, "control.sock")
        self._state_path = os.path.join(path, "state.json")
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            lock = os.path.join(path, "lock")
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise KernelRefusedError(f"run directory {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._lock, 200).decode(errors="replace")
            os.close(self._lock)
            raise ConflictError(f"run directory {path} is held by process {holder}") from error
        text = json.dumps({"pid": os.getpid(), "start_ticks": start_ticks(os.getpid())})
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, text.encode(), 0)

    def load(self, table: PeerTable) -> str | None:
        """Take up the members of the last process, if it served the same network.

        Returns:
            Why not, where the file is there and cannot be used.
        """
        try:
            with open(self._state_path, "rb") as file:
                state: Any = json.load(file)
            if state["v"] != _VERSION or state["vni"] != table.own.vni:
                return f"{self._state_path} is of another version or network"
            table.replace(state["peers"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            return f"{self._state_path}: {str(error)[:200]!r}"
        except MeshnetError as error:
            return f"{self._state_path}: {error}"
        return None

    def save(self, table: PeerTable) -> None:
        """Write the members down.

        Raises:
            OSError: it cannot be written; the last state is still there.
        """
        peers = [peer.document for peer in table.by_underlay.values()]
        state = {"v": _VERSION, "vni": table.own.vni, "peers": peers}
        beside = f"{self._state_path}.new"
        with open(beside, "w") as file:
            json.dump(state, file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        os.rename(beside, self._state_path)

    def close(self) -> None:
        """Give the directory up; the members stay for the next one."""
        with contextlib.suppress(OSError):
            os.close(self._lock)
