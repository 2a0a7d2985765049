"""Our tables among others': what is read of them, and that they alone are replaced and removed."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from meshnet.firewall.rules import render_rules
from meshnet.kernel.netns import inside
from meshnet.kernel.nft import NftTables
from meshnet.state import Ruleset
from tests.contract.hosts import host_namespace
from tests.unit.test_firewall_rules import PROD, UNDERLAY

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root
OTHERS = """
table inet aaa { chain meshnet { type filter hook input priority 0; tcp dport 7 drop; }; }
table inet meshnet2 { set meshnet { type ipv4_addr; elements = { 192.0.2.1 } }; }
table bridge zzz { chain c { type filter hook forward priority 0; accept; }; }
"""


def _nft(*arguments: str, script: str | None = None) -> str:
    return subprocess.run(
        ["nft", *arguments], input=script, capture_output=True, text=True, check=True
    ).stdout


def test_tables_are_told_apart_from_others(root: None, nothing_left: None, tmp_path: Path) -> None:
    ruleset = Ruleset(render_rules([PROD], UNDERLAY), {})
    with host_namespace() as (_, fd), inside(fd):
        tables = NftTables(tmp_path / "firewall.json")
        _nft("-f", "-", script=OTHERS)
        others = _nft("list", "ruleset")
        assert tables.read() is None
        tables.load(ruleset, {})
        assert tables.read() == ruleset.text
        # Whatever others do is no change of ours; whatever is done to ours is.
        _nft("add", "rule", "inet", "aaa", "meshnet", "accept")
        _nft("add", "table", "inet", "mesh")
        assert tables.read() == ruleset.text
        for family in ("inet", "bridge"):
            _nft("add", "chain", family, "meshnet", "more")
            assert tables.read() == ""
            tables.load(ruleset, {})
            assert tables.read() == ruleset.text
        _nft("delete", "table", "bridge", "meshnet")
        assert tables.read() == ""
        tables.delete()
        assert tables.read() is None
        _nft("delete", "table", "inet", "mesh")
        _nft("flush", "chain", "inet", "aaa", "meshnet")
        _nft("add", "rule", "inet", "aaa", "meshnet", "tcp", "dport", "7", "drop")
        assert _nft("list", "ruleset") == others
