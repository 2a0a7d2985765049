"""Each fault alone: what it does not cut loses nothing, and the mesh is whole again in time.

Those that take long are left to ``python -m tests.netns.faults``, as are sequences of them.
"""

from __future__ import annotations

import contextlib
import re
import time
from random import Random
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.faults.catalogue import FAULTS
from tests.netns.faults.fault import Injected
from tests.netns.faults.invariants import wait_whole
from tests.netns.faults.mesh import AGENT_ARGS, make_mesh
from tests.netns.mesh import BRIEFLY, PingStream, address_of, ping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from meshnet.lab.topology import Lab
    from tests.netns.faults.mesh import FaultMesh, Member

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
_INTERVAL_S = 0.005
_QUICK = (
    "two agents with one id",
    "state directory full",
    "state directory read-only",
    "packets duplicated",
    "kernel object duplicated",
)


def _pairs(mesh: FaultMesh) -> list[tuple[Member, Member]]:
    """Two endpoints of a network each; a ping tells of both ways."""
    members = mesh.members
    return [
        (one, other)
        for number, one in enumerate(members)
        for other in members[number + 1 :]
        if one.network == other.network
    ]


@contextlib.contextmanager
def _watched(mesh: FaultMesh, injected: list[Injected]) -> Iterator[None]:
    """Ping between all pairs while the block runs; of what is not cut nothing may be lost."""
    streams = [
        (one, other, PingStream(one.container, address_of(other.document), _INTERVAL_S))
        for one, other in _pairs(mesh)
    ]
    yield
    for one, other, stream in streams:
        cut = any(fault.cuts(one, other) or fault.cuts(other, one) for fault in injected)
        if cut and not (one.container.is_alive() and other.container.is_alive()):
            continue  # it ended with its container, and the lab reaps it
        sent, lost = stream.stop()
        # The last one may be on its way when ping is told to stop.
        assert cut or lost <= 1, (
            f"{injected[0].what}: {lost} of {sent} lost between {one.network} on {one.host} "
            f"and on {other.host}"
        )


def _bear(mesh: FaultMesh, name: str, seed: int = 1) -> None:
    """Have a fault happen, with packets going on, until the mesh is whole again."""
    logs = {host.name: host.log_path for host in mesh.lab.hosts}
    before = {host: len(path.read_text()) for host, path in logs.items()}
    injected: list[Injected] = []
    with _watched(mesh, injected):
        fault = FAULTS[name].inject(mesh, Random(f"{name} {seed}"))
        injected.append(fault)
        over = time.monotonic() + fault.lasts_s
        wait_until(lambda: time.monotonic() >= over, fault.lasts_s + 1, "it has lasted")
        fault.heal()
        wait_whole(mesh, fault.whole_within_s)
    said = "".join(path.read_text()[before[host] :] for host, path in logs.items())
    assert re.search(fault.says, said), f"{fault.what}: nobody says {fault.says!r}"
    assert "Traceback" not in said, f"{fault.what}: {said}"


def test_each_fault_alone(make_lab: MakeLab) -> None:
    mesh = make_mesh(make_lab(2, agent_args=AGENT_ARGS))
    for name in _QUICK:
        _bear(mesh, name)


def test_a_member_of_etcd_lost(make_lab: MakeLab) -> None:
    mesh = make_mesh(make_lab(2, etcd_members=3, agent_args=AGENT_ARGS))
    _bear(mesh, "etcd member lost")
    _assert_that_a_loss_is_seen(mesh)


def _assert_that_a_loss_is_seen(mesh: FaultMesh) -> None:
    """What is tested above can fail: a fault that cuts more than it says is found out."""
    one, other = _pairs(mesh)[0]
    nothing = Injected("nothing", lambda: None)
    watched = _watched(mesh, [nothing])
    watched.__enter__()
    fault = FAULTS["underlay link down"].inject(mesh, Random(1))
    assert fault.cuts(one, other)
    assert not ping(one.container, address_of(other.document), *BRIEFLY)
    fault.heal()
    with pytest.raises(AssertionError, match="lost between"):
        watched.__exit__(None, None, None)
