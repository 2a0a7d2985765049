"""The ports of a host in memory: a fake of `endpoints.published_ports.KernelPorts`."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshnet.model import IpAddress
    from meshnet.ports import Binding


@dataclass
class FakePorts:
    """Attributes:
    held: what was taken and not let go.
    others: what a process of the host has, and its name.
    addresses: of the host; None: all there are.
    """

    held: set[Binding] = field(default_factory=set)
    others: dict[Binding, str] = field(default_factory=dict)
    addresses: set[IpAddress] | None = None

    def hold(self, binding: Binding) -> FakePort:
        """See `meshnet_agent.endpoints.published_ports.HostPorts`."""
        if not (
            binding.address.is_unspecified
            or self.addresses is None
            or binding.address in self.addresses
        ):
            raise _error(errno.EADDRNOTAVAIL)
        free = (n for n in range(40000, 40100) if not self._taken(binding._replace(port=n)))
        taken = binding._replace(port=binding.port or next(free))
        if self._taken(taken):
            raise _error(errno.EADDRINUSE)
        self.held.add(taken)
        return FakePort(self, taken)

    def find_user(self, binding: Binding) -> str | None:
        """See `meshnet_agent.endpoints.published_ports.HostPorts`."""
        return next((name for b, name in self.others.items() if b.overlaps(binding)), None)

    def _taken(self, binding: Binding) -> bool:
        return any(b.overlaps(binding) for b in (*self.held, *self.others))


@dataclass
class FakePort:
    """One that is held until it is closed."""

    ports: FakePorts
    binding: Binding

    @property
    def port(self) -> int:
        """Its number."""
        return self.binding.port

    def close(self) -> None:
        """Let it go."""
        self.ports.held.remove(self.binding)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
