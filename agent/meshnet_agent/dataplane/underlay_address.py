"""Follows this host's underlay address, which may change while the agent runs (DHCP)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from meshnet.store import Store
    from meshnet_agent.dataplane.pass_values import PassResult
    from meshnet_agent.mesh.membership import Membership

_log = structlog.get_logger()


class UnderlayAddress:
    """Has the host's entry published again when its underlay address changes.

    And tells the membership what else has addresses on this host.
    """

    def __init__(self, store: Store, membership: Membership) -> None:
        self._store = store
        self._membership = membership

    def passed(self, result: PassResult) -> None:
        """See `PassListener`."""
        host, underlay = self._membership.host, result.underlay
        if underlay is None:
            return
        self._membership.occupied = underlay.occupied
        if underlay.ip == host.underlay_ip:
            return
        _log.warning("underlay address changed", before=str(host.underlay_ip), now=str(underlay.ip))
        # Answers from etcd would go to the old address: the host once waited 5 s for them before it
        # told the others where it is.
        self._store.reconnect()
        self._membership.move(replace(host, underlay_ip=underlay.ip))
