"""Our tables beside others': how they are read, and that only they are replaced and removed."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from meshnet.firewall import UNKNOWN, Firewall
from meshnet.kernel.drivers.nft import NftTables
from meshnet.kernel.netns import inside
from tests.contract.hosts import host_namespace
from tests.unit.core.test_firewall_rules import DUAL, PROD, UNDERLAY

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
    firewall = Firewall((PROD,), UNDERLAY)
    with host_namespace() as (_, fd), inside(fd):
        tables = NftTables(tmp_path / "firewall.json")
        _nft("-f", "-", script=OTHERS)
        others = _nft("list", "ruleset")
        assert tables.read() is None
        tables.load(firewall, {}, {})
        assert tables.read() == firewall
        # What others do to their tables does not change ours; what anybody does to ours does.
        _nft("add", "rule", "inet", "aaa", "meshnet", "accept")
        _nft("add", "table", "inet", "mesh")
        assert tables.read() == firewall
        for family in ("inet", "bridge"):
            _nft("add", "chain", family, "meshnet", "more")
            assert tables.read() == UNKNOWN
            tables.load(firewall, {}, {})
            assert tables.read() == firewall
        _nft("delete", "table", "bridge", "meshnet")
        assert tables.read() == UNKNOWN
        tables.delete()
        assert tables.read() is None
        _nft("delete", "table", "inet", "mesh")
        _nft("flush", "chain", "inet", "aaa", "meshnet")
        _nft("add", "rule", "inet", "aaa", "meshnet", "tcp", "dport", "7", "drop")
        assert _nft("list", "ruleset") == others


def test_a_load_is_remembered(root: None, nothing_left: None, tmp_path: Path) -> None:
    memory, firewall = tmp_path / "firewall.json", Firewall((PROD, DUAL), UNDERLAY)
    with host_namespace() as (_, fd), inside(fd):
        NftTables(memory).load(firewall, {}, {})
        document = json.loads(memory.read_text())
        assert NftTables(memory).read() == firewall
        # As versions wrote it that remembered the text alone, or that rendered the value otherwise.
        others = [
            {name: document[name] for name in ("text", "listing_sha256")},
            document | {"text": document["text"].replace("masquerade", "accept")},
            document | {"firewall": {"networks": [{}]}},
            document | {"listing_sha256": "0"},
        ]
        for other in others:
            memory.write_text(json.dumps(other))
            tables = NftTables(memory)
            assert tables.read() == UNKNOWN
            tables.load(firewall, {}, {})
            assert NftTables(memory).read() == firewall
