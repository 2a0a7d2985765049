"""Keeps the host's firewalls open for our networks, and says where nothing can be done.

Looks when the networks changed, when somebody changed rules (a firewall was started or reloaded),
and every minute, for rules that nobody tells of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
import trio

from meshnet_agent.host_firewalls import BRIDGES, Openings
from meshnet_agent.host_firewalls.iptables import opens
from meshnet_agent.host_firewalls.programs import run
from meshnet_agent.host_firewalls.rules import foreign_chains
from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet_agent.dataplane.pass_values import PassResult
    from meshnet_agent.host_firewalls import HostFirewall
    from meshnet_agent.host_firewalls.rules import ForeignChain
    from meshnet_agent.mesh.view import MeshView

_log = structlog.get_logger()
_LOOK_S = 60.0
_GATHER_S, _REST_S, _SHARE = 0.1, 1.0, 0.1
"""Pause before a look, since rules come many at a time; the least from one to the next; the most of
all time that looks take: others may have thousands of rules, and change them all the time."""


class FirewallOpener:
    """The part that opens them: `PassListener`.

    Attributes:
        changed: set when rules of others changed.

    Args:
        firewalls: those that can be told.
        mesh: asked whether the networks are all known: nothing is closed for one that is not.
        on: False: what an agent that was told otherwise had added is taken back.
    """

    def __init__(self, firewalls: Sequence[HostFirewall], mesh: MeshView, *, on: bool) -> None:
        self.changed = Flag()
        self._firewalls = firewalls
        self._mesh = mesh
        self._on = on
        self._needed: Openings | None = None
        self._before = Openings()
        self._notes: list[str] = []

    def passed(self, result: PassResult) -> None:
        """See `PassListener`: networks may have come and gone."""
        needed = _needed(result)
        if needed != self._needed and not self._mesh.snapshot.holes:
            self._needed = needed
            self.changed.set()

    def report(self) -> list[str]:
        """What keeps our packets out, in words."""
        return list(self._notes)

    async def run(self) -> None:
        """Look for ever."""
        while self._firewalls:
            with trio.move_on_after(_LOOK_S):
                await self.changed.wait()
            await trio.sleep(_GATHER_S)
            began = trio.current_time()
            await self._look()
            await trio.sleep(max(_REST_S, (trio.current_time() - began) / _SHARE))

    async def _look(self) -> None:
        needed = self._needed
        listing = await run(["nft", "--json", "list", "chains"])
        if needed is None or not listing.ok:
            return  # the reconciler says what is wrong with nft
        try:
            chains = foreign_chains(listing.output)
        except ValueError as error:
            _log.warning("chains of others cannot be read", reason=str(error))
            return
        wanted = needed if self._on else Openings()
        before, self._before = (self._before if self._on else needed), wanted
        notes = []
        for firewall in self._firewalls:
            notes += await firewall.bring(chains, wanted, before)
        if needed.links:
            notes += [_closed(chain) for chain in chains if await self._is_closed(chain, chains)]
        for note in notes:
            if note not in self._notes:
                _log.warning("another firewall keeps packets out", reason=note)
        self._notes = notes

    async def _is_closed(self, chain: ForeignChain, chains: Sequence[ForeignChain]) -> bool:
        """Whether a base chain drops what it forwards, and has no place for us."""
        if chain.hook != "forward" or not chain.drops or (self._on and opens(chain, chains)):
            return False
        # The operator may have done what the note says.
        table = await run(["nft", "--terse", "list", "table", chain.family, chain.table])
        return f'"{BRIDGES}' not in table.output


def _closed(chain: ForeignChain) -> str:
    return (
        f"chain {chain} drops what this host forwards, packets of networks too, unless its rules "
        f'accept them: accept links "{BRIDGES}*" there, both in and out'
    )


def _needed(result: PassResult) -> Openings:
    """What the networks that came out of a pass need."""
    found = {
        name: outcome.plan.firewall
        for name, outcome in result.networks.items()
        if outcome.plan is not None and outcome.plan.firewall is not None
    }
    guarded = found.values()
    return Openings(
        links=tuple(sorted({link for network in guarded for link in network.links})),
        ports=tuple(sorted({port for network in guarded for port in network.ports})),
        underlay_dev=result.underlay.dev if result.underlay is not None and found else "",
        direct=tuple(sorted(name for name, network in found.items() if network.direct)),
    )
