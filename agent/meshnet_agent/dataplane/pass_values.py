"""Inputs and results of passes: values, passed between the event loop and the kernel's thread."""

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
    """The input of a pass over everything: values, safe to hand to the kernel's thread.

    Attributes:
        underlay_ip: this host's underlay address, as last known.
        underlay_dev: the link that has this address, if the address may change.
    """

    snapshot: MeshSnapshot
    local: LocalView
    underlay_ip: IpAddress
    underlay_dev: str | None = None


class HostView(NamedTuple):
    """What the store says about one host: its entry, if any, and its subnets by network."""

    host: Host | None
    subnets: Mapping[NetworkName, tuple[IpNetwork, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartInput:
    """The input of a pass over some hosts.

    Attributes:
        hosts: the hosts that changed, as they are now.
        expired: all hosts that have been dead for longer than the grace period.
        fallen: all peers that this host reaches by a network's fallback.
    """

    hosts: Mapping[HostId, HostView]
    expired: frozenset[HostId]
    fallen: frozenset[tuple[NetworkName, HostId]] = frozenset()


@dataclass(slots=True)
class Stages:
    """How long each stage of a pass took, in seconds."""

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
    """Operations of the running pass; may be read from other threads, for ``status``."""

    total: int = 0
    done: int = 0

    def begin(self, total: int) -> None:
        """A pass starts to carry out `total` operations."""
        self.done = 0
        self.total = total

    def advance(self, count: int) -> None:
        """`count` more operations are carried out."""
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
        networks: the outcome of each network, as of this pass.
        failures: operations that the kernel refused, in this pass or an earlier one, and that have
            not succeeded since.
        missing: names of endpoints' links that did not exist.
        underlay: the underlay as the pass found it; None before the first pass.
        writes: operations carried out or attempted.
        again: links were made or changed.  The kernel then drops routes, neighbours and FDB entries
            on them, so another pass has to follow.
        seconds: how long the whole pass took.
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
