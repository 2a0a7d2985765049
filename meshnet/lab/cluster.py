"""The lab's etcd: one member, or a cluster of three, each in a namespace of its own.

May import only the standard library, `meshnet.errors` and the lab's lower modules.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from meshnet.lab.etcd import EtcdServer, Membership
from meshnet.lab.netns import ETCDS, enter_argv, netns_name, netns_path
from meshnet.lab.poll import wait_until
from meshnet.lab.process import identify, is_listening
from meshnet.lab.underlay import ETCD_PEER_PORT, ETCD_PORT

if TYPE_CHECKING:
    from pathlib import Path

    from meshnet.lab.state import LabFile
    from meshnet.lab.underlay import LabUnderlay

_HEALTHY_DEADLINE_S = 30.0
# A lone member waits for one election timeout, by default 1 s, before it elects itself.  The
# shortest lease that etcd grants is 1.5 times that timeout, so a short one lets tests have short
# leases.  Three members on a busy machine need more patience, or the leader changes all the time.
_ARGS = {
    1: ("--heartbeat-interval=20", "--election-timeout=100"),
    3: (
        *("--heartbeat-interval=50", "--election-timeout=500"),
        # Otherwise etcd refuses to change members until all have been connected for 5 s.
        "--strict-reconfig-check=false",
    ),
}
MEMBERS = tuple(_ARGS)
"""How many members there may be."""


def make_etcds(
    lab: str, base_dir: Path, underlay: LabUnderlay, members: int
) -> dict[str, EtcdServer]:
    """Make the members, by the names of their ports at the switch; start none of them."""
    names = ETCDS[:members]
    cluster = {name: underlay.etcd_url(index, ETCD_PEER_PORT) for index, name in enumerate(names)}
    token = secrets.token_hex(8)
    return {
        name: EtcdServer(
            base_dir / name / "data",
            client_url=underlay.etcd_url(index),
            membership=Membership(name, cluster, token),
            prefix=enter_argv(netns_path(netns_name(lab, name))),
            log_file=base_dir / name / "etcd.log",
            extra_args=_ARGS[members],
        )
        for index, name in enumerate(names)
    }


def start_etcds(etcds: dict[str, EtcdServer], file: LabFile) -> None:
    """Start all members, and wait until they answer.

    Raises:
        StoreUnavailableError: one does not.
    """
    # All before any is waited for: a member answers only once a majority is there.
    for name, etcd in etcds.items():
        etcd.start()
        with file.edit() as document:
            document.etcds[name] = identify(etcd.pid)
    for etcd in etcds.values():
        # Wait for the port first: etcdctl, when it finds nobody, tries again only after a second.
        wait_until(
            lambda: not etcd.running or is_listening(etcd.pid, ETCD_PORT),  # noqa: B023
            _HEALTHY_DEADLINE_S,
            f"etcd listens on {etcd.client_url}; see {etcd.log_file}",
        )
        etcd.wait_healthy(_HEALTHY_DEADLINE_S)
