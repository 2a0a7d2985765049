"""Limits of containers where control groups are of version 2 alone: read back, and felt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.vm.mesh import meshnet

if TYPE_CHECKING:
    from tests.vm.mesh import Mesh

_ROOTFS = """
set -e
mkdir -p /root/image/bin
cp /bin/busybox /root/image/bin/
/bin/busybox --install -s /root/image/bin
"""


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_limits(mesh: Mesh, runtime: str) -> None:
    one = mesh.machines[0]
    other = {"runc": "/usr/bin/crun", "crun": "/usr/sbin/runc"}[runtime]
    one.run(f"rm {other}")
    one.run(_ROOTFS)
    mesh.start_agents()
    run = "meshnet run --rm --net none"
    shown = one.run(
        f"{run} --memory 64m --pids-limit 50 --cpus 0.5 --cpu-shares 512 --cpuset-cpus 0 "
        "--rootfs /root/image sh -c 'cd /sys/fs/cgroup; "
        "cat memory.max pids.max cpu.max cpu.weight cpuset.cpus'"
    ).stdout.split("\n")
    assert shown[:3] == [str(64 << 20), "50", "50000 100000"]
    assert shown[4] == "0"
    # 512 of 1024 shares, as runc and crun convert them to a weight of 1 to 10000.
    assert 15 <= int(shown[3]) <= 60
    felt = one.run(
        f"{run} --memory 32m --rootfs /root/image sh -c 'head -c 200000000 /dev/zero | tail'",
        check=False,
    )
    assert felt.returncode == 137
    forks = "for i in $(seq 40); do sleep 5 & done; wait"
    felt = one.run(
        f"{run} --pids-limit 10 --rootfs /root/image sh -c '{forks}'", check=False, timeout_s=60
    )
    assert felt.returncode != 0
    one.run("meshnet run -d --name c --net none --memory 64m --rootfs /root/image sleep 1000")
    usage = meshnet(one, "stats", "c")
    assert usage["memory_limit_bytes"] == 64 << 20
    one.run("meshnet rm -f c")
    mesh.allowed += ["out of memory"]
