"""What a pass works on, and what it comes to: values for the event loop and the kernel's thread."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from meshnet.backends import Underlay
    from meshnet.model import Host, HostId, IpAddress, IpNetwork, MeshSnapshot, NetworkName
    from meshnet.plan import LocalView, NetworkOutcome
    from meshnet.tables import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInput:
    """What a pass over everything works on: values, safe to hand to the kernel's thread.

    Attributes:
        underlay_ip: the host's address on the underlay so far.
        underlay_dev: the link whose address it is, if that may change.
    """

    snapshot: MeshSnapshot
    local: LocalView
    underlay_ip: IpAddress
    underlay_dev: str | None = None


class HostView(NamedTuple):
    """What the store says of one host: its entry, if it has one, and what it owns by network."""

    host: Host | None
    subnets: Mapping[NetworkName, tuple[IpNetwork, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartInput:
    """What a pass over some hosts works on.

    Attributes:
        hosts: those that changed, as they are now.
        expired: hosts dead for longer than the grace period, of all hosts.
        fallen: peers that are sent to by a network's fallback, of all hosts.
    """

    hosts: Mapping[HostId, HostView]
    expired: frozenset[HostId]
    fallen: frozenset[tuple[NetworkName, HostId]] = frozenset()


@dataclass(slots=True)
class Stages:
    """Where the time of a pass went, in seconds."""

    observe_s: float = 0.0
    dump_s: float = 0.0
    plan_s: float = 0.0
    diff_s: float = 0.0
    apply_s: float = 0.0

    @contextmanager
    def timed(self, stage: Literal["observe", "dump", "plan", "diff", "apply"]) -> Iterator[None]:
        """Add the time of the block to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            name = f"{stage}_s"
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)


@dataclass(slots=True)
class Progress:
    """Operations of the pass that is running; read from other threads, for ``status``."""

    total: int = 0
    done: int = 0

    def begin(self, total: int) -> None:
        """A pass has so many operations to carry out."""
        self.done = 0
        self.total = total

    def advance(self, count: int) -> None:
        """So many more are carried out."""
        self.done += count

    @property
    def left(self) -> int:
        """Operations that are not carried out yet."""
        return max(0, self.total - self.done)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """How a pass went.

    Attributes:
        scope: everything, or the hosts that changed.
        networks: how each came out, as of now.
        failures: operations that were refused, in this pass or before it, and not made good.
        missing: names of endpoint links that were not there.
        writes: operations carried out or tried.
        again: links were made or changed, which makes the kernel drop what hung on them.
    """

    scope: Literal["all", "part"] = "all"
    networks: Mapping[NetworkName, NetworkOutcome] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    missing: frozenset[str] = frozenset()
    underlay: Underlay | None = None
    writes: int = 0
    again: bool = False
    seconds: float = 0.0
    stages: Stages = field(default_factory=Stages)
