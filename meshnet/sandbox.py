"""What an endpoint lives in: a network namespace, and the reason why that lives.

Pure: values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class NetnsId(NamedTuple):
    """Identifies a network namespace among all that exist: its file in nsfs (namespaces(7)).

    Never a path through a pid, which may lead to another namespace tomorrow.

    Attributes:
        device: 0: unknown, as in records of versions before this field.
    """

    device: int
    inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSandbox:
    """A sandbox that lives as long as its namespace has a process.

    Attributes:
        pid_start_ticks: start time of `pid` (field 22 of /proc/PID/stat): pids are reused.
    """

    pid: int
    pid_start_ticks: int
    netns: NetnsId

    @property
    def label(self) -> str:
        """Default name of an endpoint."""
        return f"pid{self.pid}"

    def __str__(self) -> str:
        return f"process {self.pid}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldSandbox:
    """A sandbox that lives until its owner releases it: a namespace bound to a path, as CNI has.

    No process need be in it: container engines attach a namespace before they start any.

    Attributes:
        path: where it was bound, in the file system of the caller; the path may lead to another
            namespace tomorrow.
        owner: key of whoever holds it, unique on a host.
        boot_id: of the boot of the machine that it was made in (random(4)): no namespace outlives
            that.  "": Linux hides it.
    """

    path: str
    netns: NetnsId
    owner: str
    boot_id: str

    @property
    def label(self) -> str:
        """Default name of an endpoint."""
        return f"ns{self.netns.inode}"

    def __str__(self) -> str:
        return f"network namespace {self.path}"


Sandbox = ProcessSandbox | HoldSandbox
