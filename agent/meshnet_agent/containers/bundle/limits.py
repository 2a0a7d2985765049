"""Refuses limits that this host's kernel, or the agent's own limits, do not allow."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError
from meshnet.runtime.engine.cgroups import accounts_swap
from meshnet.runtime.spec.ulimits import UNLIMITED, parse_ulimit
from meshnet_agent.containers.bundle.privileges import may_raise_limits

if TYPE_CHECKING:
    from meshnet.runtime.spec.options import ContainerOptions

_RLIMIT_LOCKS = 10
"""The only one that Python has no name for (asm-generic/resource.h)."""


def check_limits(options: ContainerOptions) -> None:
    """Refuse limits that this host cannot set, before anything is made.

    Raises:
        KernelRefusedError: the message names the option.
    """
    if options.memory_swap_bytes is not None and not accounts_swap():
        raise KernelRefusedError(
            "--memory-swap needs a kernel that accounts swap, and this one has no memory.memsw.* "
            "or memory.swap.* files: boot it with swapaccount=1, or leave the option out"
        )
    for text in options.ulimits:
        wanted = parse_ulimit(text)
        _, hard = resource.getrlimit(
            getattr(resource, f"RLIMIT_{wanted.name.upper()}", _RLIMIT_LOCKS)
        )
        own = UNLIMITED if hard == resource.RLIM_INFINITY else hard
        if wanted.hard > own and not may_raise_limits():
            raise KernelRefusedError(
                f"ulimit {text}: the agent's own hard limit is {own}, and it has no "
                f"CAP_SYS_RESOURCE to raise it: give {own} or less, or raise "
                f"Limit{wanted.name.upper()}= of its unit"
            )
