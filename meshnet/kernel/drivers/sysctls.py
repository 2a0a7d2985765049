"""Settings under /proc/sys: those of the host's links, and helpers for those of our links."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.kernel.drivers.writing import write_each

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from meshnet.kernel.drivers.namespace import HostNamespace
    from meshnet.state import KernelState
    from meshnet.tables import Failure, Op

_PROC_SYS = Path("/proc/sys")
ALL_IPV6_FORWARDING = "net/ipv6/conf/all/forwarding"


def forwarding(dev: str) -> str:
    """Path of the setting that has packets forwarded that come by a link (IPv4)."""
    return f"net/ipv4/conf/{dev}/forwarding"


def accept_ra(dev: str) -> str:
    """Path of the setting that has a link listen to router advertisements."""
    return f"net/ipv6/conf/{dev}/accept_ra"


def read_sysctl(path: str) -> str:
    """A setting by its path under /proc/sys; "" if it does not exist."""
    with contextlib.suppress(OSError):
        return (_PROC_SYS / path).read_text().strip()
    return ""


def has_sysctl(path: str) -> bool:
    """Whether this kernel has a setting."""
    return (_PROC_SYS / path).exists()


def write_sysctl(path: str, value: str) -> None:
    """Change a setting.

    Raises:
        OSError: it does not exist, or the kernel refused.
    """
    (_PROC_SYS / path).write_text(value)


class SysctlDriver:
    """`meshnet.kernel.drivers.Driver` of the host's own settings."""

    def __init__(self, namespace: HostNamespace) -> None:
        self._namespace = namespace

    def dump(self, state: KernelState) -> None:
        """See `meshnet.kernel.drivers.Driver`."""
        state.sysctls.update((path, read_sysctl(path)) for path in self._paths())

    def _paths(self) -> Iterator[str]:
        yield from map(forwarding, self._namespace.forwarding_links)
        yield from map(accept_ra, self._namespace.ra_links)
        yield ALL_IPV6_FORWARDING

    def write(self, ops: Sequence[Op]) -> list[Failure]:
        """See `meshnet.kernel.drivers.Driver`."""
        return write_each(self._namespace, lambda op: write_sysctl(op.key, op.value), ops)
