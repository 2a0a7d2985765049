"""Each fault alone: only what it cuts loses packets, and the mesh is whole again in time.

Those that take long are left to ``python -m tests.netns.faults``, as are sequences of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.netns.faults.catalogue import FAULTS
from tests.netns.faults.fault import cuts_nothing
from tests.netns.faults.mesh import AGENT_ARGS
from tests.netns.faults.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.topology import Lab
    from tests.netns.faults.fault import Injected
    from tests.netns.faults.mesh import FaultMesh

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
_QUICK = (
    "two agents with one id",
    "clock jump",
    "state directory full",
    "state directory read-only",
    "packets duplicated",
    "kernel object duplicated",
)


def _bear(stage: Stage, name: str) -> None:
    """Have a fault happen, with traffic on, until the mesh is whole again."""
    step = stage.step([FAULTS[name]], Random(name))
    assert not step.broken, step


@dataclass(frozen=True, slots=True)
class _Liar:
    """Pulls a cable, and says that this cuts nothing."""

    name: str = "underlay link down"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        return replace(FAULTS[self.name].inject(mesh, rng), cuts=cuts_nothing)


def test_each_fault_alone(make_lab: MakeLab) -> None:
    with Stage(make_lab(2, up=False, agent_args=AGENT_ARGS)) as stage:
        for name in _QUICK:
            _bear(stage, name)
        step = stage.step([_Liar()], Random(1))
        assert "were lost" in step.broken[0]
        assert "on a path that nothing cut" in step.broken[0]


def test_a_member_of_etcd_lost(make_lab: MakeLab) -> None:
    lab = make_lab(2, up=False, etcd_members=3, agent_args=AGENT_ARGS)
    with Stage(lab) as stage:
        _bear(stage, "etcd member lost")
