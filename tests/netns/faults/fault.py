"""What a fault is: something that is done to a mesh, what it may cut meanwhile, and its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from tests.netns.faults.mesh import FaultMesh, Member


def cuts_nothing(_source: Member, _target: Member) -> bool:
    """Say no: most faults are of the control plane, and no packet may be lost."""
    return False


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that has happened.

    Attributes:
        what: what was done and to whom, for people.
        heal: ends it, if it does not end by itself; called exactly once.
        lasts_s: how long it is left as it is before `heal`, in seconds.
        cuts: whether packets from one endpoint to another may be lost, from its start until the
            mesh is whole again after `heal`.
        opens: whether packets may get from an endpoint to one of another network meanwhile.
        whole_within_s: seconds after `heal` in which every invariant holds again.
        says: what the operator is told, if this happens alone: a regular expression that is found
            in an agent's log of the time from the injection until the mesh is whole.
    """

    what: str
    heal: Callable[[], None]
    lasts_s: float = 0.0
    cuts: Callable[[Member, Member], bool] = cuts_nothing
    whole_within_s: float = 15.0
    says: str = ""
    opens: Callable[[Member, Member], bool] = cuts_nothing


@dataclass(frozen=True, slots=True)
class CutsHosts:
    """Whatever goes from or to these hosts, but not what stays on one."""

    hosts: frozenset[str]

    def __call__(self, source: Member, target: Member) -> bool:
        """Whether a packet may be lost."""
        return source.host != target.host and bool(self.hosts & {source.host, target.host})


class Fault(Protocol):
    """One kind of fault.  All choices come from the generator given, so a seed replays them."""

    @property
    def name(self) -> str:
        """One word or two, as in docs/reliability.md."""

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Make it happen."""
