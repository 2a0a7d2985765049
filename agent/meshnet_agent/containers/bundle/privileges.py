"""What the agent's unit lets it do, and so what it can give to containers (proc(5), status)."""

from __future__ import annotations

from pathlib import Path

from meshnet.errors import PolicyRefusedError
from meshnet.runtime.spec.config import CAPABILITIES

_STATUS = Path("/proc/self/status")


def check_may_run() -> None:
    """Refuse to run containers if the agent's unit restricts it, and so every container, too much.

    Raises:
        PolicyRefusedError: the agent may not gain privileges (NoNewPrivs).
    """
    # It stands for the whole drop-in containers.conf, which takes it back with all the rest.
    if "NoNewPrivs:\t1" in _STATUS.read_text():
        raise PolicyRefusedError(
            "this agent's unit does not let it run containers: install its drop-in containers.conf "
            "(docs/run.md)"
        )


def capabilities_to_give() -> frozenset[str]:
    """Capabilities that the agent may give away (CapBnd)."""
    mask = _mask("CapBnd")
    return frozenset(c for bit, c in enumerate(CAPABILITIES) if mask >> bit & 1)


def may_raise_limits() -> bool:
    """Whether the agent may raise a hard limit (CapEff has CAP_SYS_RESOURCE)."""
    return bool(_mask("CapEff") >> CAPABILITIES.index("CAP_SYS_RESOURCE") & 1)


def _mask(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value, 16)
    return 0
