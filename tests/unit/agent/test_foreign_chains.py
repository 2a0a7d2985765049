"""What a listing of nftables says of others' chains."""

from __future__ import annotations

import json

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


def listing(*chains: dict[str, str]) -> str:
    return json.dumps({"nftables": [{"metainfo": {}}, *({"chain": chain} for chain in chains)]})


def test_chains_of_others() -> None:
    own = {"family": "inet", "table": "meshnet", "name": "forward", "hook": "forward"}
    found = foreign_chains(listing(FORWARD, USER, own))
    assert found == [
        ForeignChain("ip", "filter", "FORWARD", "forward", drops=True),
        ForeignChain("ip", "filter", "DOCKER-USER", "", drops=False),
    ]
    assert str(found[0]) == "ip filter FORWARD"


def test_a_policy_is_passed_by_a_chain_of_the_same_table() -> None:
    forward, user = foreign_chains(listing(FORWARD, USER))
    assert opens(forward, [forward, user])
    assert not opens(forward, [forward])
    assert not opens(forward._replace(family="ip6"), [forward, user])
    assert not opens(forward._replace(table="mine"), [forward, user])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"nftables": 1}', '{"nftables": [{"chain": 1}]}', "[[[", "null"]
)
def test_what_is_no_listing(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  json's own, too
        foreign_chains(text)
