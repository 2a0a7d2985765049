"""The agent on a host that knows no names: of protocols, services, or routing's own.

A small Debian has neither /etc/protocols nor /etc/services (package netbase), nor /etc/iproute2.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from meshnet.lab.agent import spawn_agent
from tests.netns.mesh import address_of, attach, create_network, meshnet, ping, wait_in_sync

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Sequence

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
FILES = ("/etc/protocols", "/etc/services")
DIRECTORIES = ("/etc/iproute2", "/usr/share/iproute2", "/usr/lib/iproute2")


@contextlib.contextmanager
def without_databases() -> Iterator[None]:
    """Every agent of a lab that is started in the block, and what it runs, finds no names."""
    hide = [f"mount --bind /dev/null {path}" for path in FILES if Path(path).exists()]
    hide += [f"mount -t tmpfs none {path}" for path in DIRECTORIES if Path(path).exists()]
    script = "; ".join(["set -e", *hide, 'exec "$@"'])

    def spawn(
        enter: Sequence[str], options: Sequence[str], log_path: Path
    ) -> subprocess.Popen[bytes]:
        return spawn_agent([*enter, "unshare", "-m", "sh", "-c", script, "sh"], options, log_path)

    with mock.patch("meshnet.lab.host.spawn_agent", spawn):
        yield


def tables_of(host: LabHost) -> str:
    """Our tables with the kernel's handles: a table that is loaded anew has a new one."""
    listing = host.run(["nft", "--handle", "list", "tables"]).stdout
    assert "meshnet" in listing
    return listing


def test_networks_work_without_the_databases_of_names(make_lab: MakeLab) -> None:
    with without_databases():
        lab = make_lab(2)
        h1, h2 = lab.hosts
        inside = ["nsenter", f"--mount=/proc/{h1.agent_pid}/ns/mnt", "getent", "protocols", "tcp"]
        assert h1.run(inside, check=False).returncode == 2  # not found
        create_network(lab, "prod", "--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48")
        first, second = h1.spawn_container(), h2.spawn_container()
        attach(first, h1, "prod")
        there = attach(second, h2, "prod", "--publish", "8080:80/tcp")
        assert ping(first, address_of(there))
        assert ping(first, address_of(there, 6))
        for host in lab.hosts:
            status = meshnet(host, "status")
            assert [network["errors"] for network in status["networks"]] == [[]]
            wait_in_sync(host, peers=1)
    # The tables are listed by number: they are as loaded also for an agent that has the names.
    before = tables_of(h1)
    h1.stop_agent()
    h1.start_agent()
    wait_in_sync(h1, peers=1)
    assert tables_of(h1) == before
