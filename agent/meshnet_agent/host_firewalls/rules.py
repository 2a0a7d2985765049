"""What chains nftables holds besides ours, as ``nft --json`` lists them.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from meshnet.firewall.elements import TABLE


class ForeignChain(NamedTuple):
    """A chain of somebody else's table.

    Attributes:
        hook: "" where packets come only by a jump.
        drops: whether it is a base chain whose policy is to drop.
    """

    family: str
    table: str
    name: str
    hook: str
    drops: bool

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


def foreign_chains(listing: str) -> list[ForeignChain]:
    """The chains of other tables.

    Args:
        listing: of ``nft --json list chains``.

    Raises:
        ValueError: it is not such a listing.
    """
    try:
        chains = [item["chain"] for item in json.loads(listing)["nftables"] if "chain" in item]
        return [
            ForeignChain(
                chain["family"],
                chain["table"],
                chain["name"],
                chain.get("hook", ""),
                chain.get("policy") == "drop",
            )
            for chain in chains
            if chain["table"] != TABLE
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"nft lists something else: {error}") from error
