"""Firewalls made of iptables chains that leave one to others: Docker and ufw.

Docker sets the policy of FORWARD to drop and leaves DOCKER-USER to the operator; ufw drops too, and
has chains for the operator's rules of each kind, which it empties at a reload.  Our rules come last
in such a chain, so that the operator's own are heard before them.

The rules are written by ``iptables`` and ``ip6tables``, whatever those are on this host: so are the
chains.  What they write in nftables directly, ``iptables`` would not read.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from meshnet_agent.host_firewalls import BRIDGES, MARK, Openings
from meshnet_agent.host_firewalls.programs import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from meshnet_agent.host_firewalls.rules import ForeignChain

_MARKED = ("-m", "comment", "--comment", MARK, "-j", "ACCEPT")
_WAIT = ("--wait", "5")
"""For whoever else holds the lock of iptables, in seconds."""
_FAMILIES = {"ip": "iptables", "ip6": "ip6tables"}

Rule = tuple[str, ...]
"""A rule as ``iptables -S`` prints it, from its matches on."""


class _UserChain(NamedTuple):
    """A chain that a firewall leaves to others.

    Attributes:
        enters: whether packets to the host itself pass it; else those that it forwards.
    """

    family: str
    name: str
    enters: bool


_USER_CHAINS = (
    _UserChain("ip", "DOCKER-USER", False),
    _UserChain("ip6", "DOCKER-USER", False),
    _UserChain("ip", "ufw-user-forward", False),
    _UserChain("ip6", "ufw6-user-forward", False),
    _UserChain("ip", "ufw-user-input", True),
    _UserChain("ip6", "ufw6-user-input", True),
)


class IptablesChains:
    """`HostFirewall` of the chains that Docker and ufw leave to others."""

    async def bring(
        self, chains: Sequence[ForeignChain], wanted: Openings, before: Openings
    ) -> list[str]:
        """See `HostFirewall`."""
        there = {(c.family, c.name) for c in chains if c.table == "filter"}
        notes = []
        for chain in _USER_CHAINS:
            if (chain.family, chain.name) in there or _is_legacy(chain.family):
                notes += await _bring(chain, list(_rules(chain, wanted)))
        return notes


def opens(chain: ForeignChain, chains: Sequence[ForeignChain]) -> bool:
    """Whether packets pass a chain with our rules before a base chain's policy drops them."""
    return chain.table == "filter" and any(
        (there.family, there.table, there.name) == (chain.family, "filter", user.name)
        for there in chains
        for user in _USER_CHAINS
        if user.family == chain.family and not user.enters
    )


def _is_legacy(family: str) -> bool:
    """Whether the tables before nftables are in use, of which nftables lists nothing."""
    try:
        names = Path(f"/proc/net/{family}_tables_names").read_text()
    except OSError:
        return False
    return "filter" in names.split()


def _rules(chain: _UserChain, wanted: Openings) -> Iterator[Rule]:
    if chain.enters:
        for port in wanted.ports:
            yield ("-p", "udp", "-m", "udp", "--dport", str(port), *_MARKED)
    elif wanted.links:
        for side in ("-i", "-o"):
            yield (side, f"{BRIDGES}+", *_MARKED)


async def _bring(chain: _UserChain, wanted: Sequence[Rule]) -> list[str]:
    """Bring our rules of one chain to what is wanted; returns why that failed."""
    program = _FAMILIES[chain.family]
    listed = await run([program, *_WAIT, "-S", chain.name])
    if not listed.ok:
        # The tables may be others', or the chain has gone meanwhile.
        is_missing = "No chain" in listed.error
        return [] if is_missing else [f"chain {chain.name} cannot be read: {listed.error}"]
    rules = [tuple(shlex.split(line)) for line in listed.output.splitlines()]
    held = [rule[2:] for rule in rules if rule[0] == "-A"]
    ours = [rule for rule in held if rule[-len(_MARKED) : -2] == _MARKED[:-2]]
    commands = [("-D", chain.name, *rule) for rule in ours if rule not in wanted]
    # Before a RETURN that ends the chain: behind that nothing is heard.
    ends = bool(held) and held[-1] == ("-j", "RETURN")
    place = len(held) - len(commands) + (0 if ends else 1)
    missing = [rule for rule in wanted if rule not in ours]
    commands += [
        ("-I", chain.name, str(place + number), *rule) for number, rule in enumerate(missing)
    ]
    for command in commands:
        done = await run([program, *_WAIT, *command])
        if not done.ok:
            return [f"chain {chain.name} of {program} cannot be changed: {done.error}"]
    return []
