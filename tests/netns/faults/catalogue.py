"""Every fault there is, by name; docs/reliability.md has what each promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.netns.faults import (
    agent_faults,
    clock_faults,
    disk_faults,
    etcd_faults,
    kernel_faults,
    underlay_faults,
)

if TYPE_CHECKING:
    from tests.netns.faults.fault import Fault
    from tests.netns.faults.mesh import FaultMesh

_ALL: tuple[Fault, ...] = (
    agent_faults.KILLED,
    agent_faults.STOPPED,
    agent_faults.AgentFrozen(),
    agent_faults.SecondAgent(),
    agent_faults.OutOfDescriptors(),
    agent_faults.OutOfMemory(),
    agent_faults.Reboot(),
    agent_faults.RebootInSilence(),
    clock_faults.ClockJump(),
    etcd_faults.KILLED,
    etcd_faults.STOPPED,
    etcd_faults.EtcdFrozen(),
    etcd_faults.EtcdSlow(),
    etcd_faults.MemberLost(),
    etcd_faults.QuorumLost(),
    etcd_faults.LeaderMoved(),
    etcd_faults.RolledBack(),
    etcd_faults.Wiped(),
    etcd_faults.Compacted(),
    etcd_faults.Full(),
    etcd_faults.AuthEnabled(),
    underlay_faults.LinkDown(),
    underlay_faults.OneWayLoss(),
    underlay_faults.Partition(),
    underlay_faults.AddressChanged(),
    underlay_faults.Duplicates(),
    disk_faults.DiskFull(),
    disk_faults.DiskReadOnly(),
    disk_faults.FileDamaged(),
    disk_faults.NewerState(),
    kernel_faults.REMOVED,
    kernel_faults.CHANGED,
    kernel_faults.DUPLICATED,
)
FAULTS: dict[str, Fault] = {fault.name: fault for fault in _ALL}
"""All of them; those of `CLUSTER` need an etcd of three members."""

CLUSTER = frozenset({"etcd member lost", "etcd quorum lost", "etcd leader moved"})
"""Faults that an etcd of one member cannot have."""


def faults_for(mesh: FaultMesh) -> dict[str, Fault]:
    """Those that can happen to a mesh."""
    alone = len(mesh.lab.etcds) == 1
    return {name: fault for name, fault in FAULTS.items() if not (alone and name in CLUSTER)}
