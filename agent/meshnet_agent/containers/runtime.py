"""Finds the OCI runtime of this host, when the first container needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.runtime.engine.oci_runtime import OciRuntime, find_runtime
from meshnet_agent.containers.bundle.privileges import check_may_run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_log = structlog.get_logger()


class RuntimeProvider:
    """Finds the OCI runtime, once.

    Args:
        root: where the runtime keeps its own state.
        systemd_cgroup: whether systemd makes the containers' cgroups.
    """

    def __init__(self, root: Path, *, systemd_cgroup: bool = False) -> None:
        self._root = root
        self._systemd_cgroup = systemd_cgroup
        self._found: OciRuntime | None = None
        self._passed_over: dict[str, str] = {}
        self._probing = trio.Lock()

    async def get(self) -> OciRuntime:
        """The OCI runtime (`find_runtime`); each call looks again until one is found.

        Raises:
            PolicyRefusedError: the agent's unit does not let it run containers.
            KernelRefusedError: this host has no runtime that can run.
        """
        # One caller at a time: a probe runs an empty container by each runtime.
        async with self._probing:
            if self._found is None:
                check_may_run()
                self._found, self._passed_over = await find_runtime(
                    self._root, systemd_cgroup=self._systemd_cgroup
                )
                _log.info("OCI runtime", path=str(self._found.path), passed_over=self._passed_over)
            return self._found

    def report(self) -> Mapping[str, str]:
        """Runtimes that cannot run here, and why; empty until a container needed one."""
        return dict(self._passed_over)
