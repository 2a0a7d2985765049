"""What our nftables tables were loaded from, on disk: a restarted agent need not load them again.

The file has the text beside the value.  By it an agent of another version, which renders the same
value differently, finds out that the tables do not do what it means by that value.
"""

from __future__ import annotations

import json
import os
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any, NamedTuple

from meshnet.firewall import UNKNOWN, Firewall, FirewallNetwork, Unknown
from meshnet.firewall.rules import render_rules

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Loaded(NamedTuple):
    """The last load.

    Attributes:
        text: the rules that `firewall` was rendered as.
        listing_sha256: digest of the tables' listings right after the load.
    """

    firewall: Firewall | Unknown
    text: str
    listing_sha256: str


NOTHING = Loaded(UNKNOWN, "", "")


def write_memory(path: Path, loaded: Loaded) -> None:
    """Remember a load.

    Raises:
        OSError: the file cannot be written.
    """
    assert isinstance(loaded.firewall, Firewall)
    document = {
        "text": loaded.text,
        "listing_sha256": loaded.listing_sha256,
        "firewall": _to_document(loaded.firewall),
    }
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(document))
    os.replace(draft, path)


def read_memory(path: Path) -> Loaded:
    """The last load; `NOTHING` if the file is missing or damaged.

    Earlier versions wrote the text alone.  What they loaded is unknown, which costs one load.
    """
    try:
        document = json.loads(path.read_text())
        text, digest = str(document["text"]), str(document["listing_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return NOTHING
    try:
        firewall = _from_document(document["firewall"])
        if render_rules(firewall) == text:
            return Loaded(firewall, text, digest)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return Loaded(UNKNOWN, text, digest)


def _to_document(firewall: Firewall) -> dict[str, Any]:
    return {
        "underlay_ip": str(firewall.underlay_ip),
        "networks": [
            {
                **network._asdict(),
                "cidrs": [str(cidr) for cidr in network.cidrs],
                "subnets": [str(subnet) for subnet in network.subnets],
            }
            for network in firewall.networks
        ],
    }


def _from_document(document: Mapping[str, Any]) -> Firewall:
    networks = tuple(
        FirewallNetwork(
            links=tuple(network["links"]),
            ports=tuple(network["ports"]),
            cidrs=tuple(ip_network(cidr) for cidr in network["cidrs"]),
            subnets=tuple(ip_network(subnet) for subnet in network["subnets"]),
            vni=network["vni"],
            internal=network["internal"],
            direct=network["direct"],
        )
        for network in document["networks"]
    )
    return Firewall(networks, ip_address(document["underlay_ip"]))
