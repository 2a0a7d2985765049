"""What a listing of nftables says of others' chains."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshnet_agent.host_firewalls.iptables import opens
from meshnet_agent.host_firewalls.rules import ForeignChain, foreign_chains

FORWARD = {
    "family": "ip",
    "table": "filter",
    "name": "FORWARD",
    "hook": "forward",
    "policy": "drop",
}
USER = {"family": "ip", "table": "filter", "name": "DOCKER-USER"}


def listing(*chains: dict[str, str], named: str = "") -> str:
    match = {"match": {"left": {"meta": {"key": "iifname"}}, "op": "==", "right": "mnb*"}}
    rules: list[dict[str, Any]] = [
        {"rule": {"family": "ip", "table": named, "chain": "x", "expr": [match]}}
    ]
    items: list[dict[str, Any]] = [{"metainfo": {}}, *({"chain": chain} for chain in chains)]
    return json.dumps({"nftables": items + (rules if named else [])})


def test_chains_of_others_by_table() -> None:
    own = {"family": "inet", "table": "meshnet", "name": "forward", "hook": "forward"}
    found = foreign_chains(listing(FORWARD, USER, own), "mnb")
    assert found == [
        ForeignChain("ip", "filter", "FORWARD", "forward", drops=True, names_us=False),
        ForeignChain("ip", "filter", "DOCKER-USER", "", drops=False, names_us=False),
    ]
    assert str(found[0]) == "ip filter FORWARD"
    assert foreign_chains(listing(FORWARD, named="filter"), "mnb")[0].names_us
    assert not foreign_chains(listing(FORWARD, named="other"), "mnb")[0].names_us


def test_a_policy_is_passed_by_a_chain_of_the_same_table() -> None:
    forward, user = foreign_chains(listing(FORWARD, USER), "mnb")
    assert opens(forward, [forward, user])
    assert not opens(forward, [forward])
    assert not opens(forward._replace(family="ip6"), [forward, user])
    assert not opens(forward._replace(table="mine"), [forward, user])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"nftables": 1}', '{"nftables": [{"chain": 1}]}', "[[[", "null"]
)
def test_what_is_no_listing(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  json's own, too
        foreign_chains(text, "mnb")
