"""Other firewalls of the host: allowing our packets where they have a place for it.

An accept of ours overrides nobody (docs/firewall.md).  So what our networks need is added to the
others' own rules: a file a firewall.  Each looks whether it is there, and only then adds; it knows
its additions again by a mark, after a restart too, and takes them back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet_agent.host_firewalls.rules import ForeignChain

BRIDGES = "mnb"
"""What the names of our bridges begin with.  Each packet that is forwarded for a network crosses
one of them."""
MARK = "meshnet"
"""Comment of our rules, where a firewall has comments."""


class Openings(NamedTuple):
    """What the networks of this host need of its firewalls; empty: nothing, and nothing is left.

    Attributes:
        links: names of the links that packets are routed through.
        ports: UDP ports of tunnels; our own rules accept only members' packets there.
        underlay_dev: the link that tunnel packets come by.
        direct: names of networks whose packets may come without a tunnel.
    """

    links: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    underlay_dev: str = ""
    direct: tuple[str, ...] = ()


class HostFirewall(Protocol):
    """One kind of firewall."""

    async def bring(
        self, chains: Sequence[ForeignChain], wanted: Openings, before: Openings
    ) -> list[str]:
        """Make our additions those that `wanted` takes, if the firewall is there.

        Args:
            chains: base chains and others of all tables that are not ours.
            before: what was wanted when last called; what of it is not wanted any more goes.

        Returns:
            What keeps our packets out all the same, in words.
        """
        ...
