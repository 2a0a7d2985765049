"""What nftables holds besides our tables, as ``nft --json`` lists it.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from meshnet.firewall.elements import TABLE


class ForeignChain(NamedTuple):
    """A chain of somebody else's table.

    Attributes:
        hook: "" where packets come only by a jump.
        drops: whether it is a base chain whose policy is to drop.
        names_us: whether a rule of its table names our bridges.
    """

    family: str
    table: str
    name: str
    hook: str
    drops: bool
    names_us: bool

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


def foreign_chains(listing: str, bridges: str) -> list[ForeignChain]:
    """The chains of other tables.

    Args:
        listing: of ``nft --json list ruleset``.
        bridges: how the names of our bridges begin.

    Raises:
        ValueError: it is not such a listing.
    """
    try:
        items = json.loads(listing)["nftables"]
        chains = [item["chain"] for item in items if "chain" in item]
        rules = [item["rule"] for item in items if "rule" in item]
        named = {_table(rule) for rule in rules if bridges in json.dumps(rule.get("expr"))}
        return [
            ForeignChain(
                *_table(chain),
                chain["name"],
                chain.get("hook", ""),
                chain.get("policy") == "drop",
                _table(chain) in named,
            )
            for chain in chains
            if chain["table"] != TABLE
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"nft lists something else: {error}") from error


def _table(item: dict[str, Any]) -> tuple[str, str]:
    return item["family"], item["table"]
