"""Which flows are older than the rules, and would be treated otherwise now."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from meshnet.firewall import FirewallNetwork, firewall_for
from meshnet.firewall.elements import published_elements
from meshnet.firewall.flows import IPS_DST_NAT, IPS_SRC_NAT, Direction, Flow, FlowRules
from meshnet.model import Protocol, PublishedPort
from meshnet.wire.inner import TCP, UDP
from tests.values import make_endpoint

CIDR, SUBNET = ip_network("10.42.0.0/16"), ip_network("10.42.3.0/24")
INNER = FirewallNetwork(
    links=("mnb2",), cidrs=(ip_network("10.50.0.0/16"),), subnets=(ip_network("10.50.3.0/24"),),
    internal=True,
)  # fmt: skip
PROD = FirewallNetwork(links=("mnb1",), cidrs=(CIDR,), subnets=(SUBNET,))
HOST, WEB, PEER, OUTSIDE = "192.0.2.1", "10.42.3.2", "10.42.9.9", "198.51.100.7"


def rules() -> FlowRules:
    ports = (
        PublishedPort(Protocol.UDP, 53, 5353),
        PublishedPort(Protocol.UDP, 54, 5454, ip_address("127.0.0.1")),
    )
    endpoint = replace(make_endpoint((f"{WEB}/24",)), published=ports)
    own = {ip_address(text).packed for text in (HOST, "10.42.3.1", "127.0.0.1")}
    return FlowRules(
        firewall_for([PROD, INNER], ip_address(HOST)), published_elements(endpoint), own
    )


def flow(
    source: str, to: str, port: int = 80, *, by: tuple[str, int] | None = None,
    status: int = 0, protocol: int = UDP,
) -> Flow:  # fmt: skip
    """A flow; `by` is who answers, if its destination was translated."""
    here, there = ip_address(source).packed, ip_address(to).packed
    answers, answering_port = by or (to, port)
    if by is not None:
        status |= IPS_DST_NAT
    return Flow(
        protocol,
        status,
        Direction(here, there, 4000, port),
        Direction(ip_address(answers).packed, here, answering_port, 4000),
    )


@pytest.mark.parametrize(
    "wrong",
    [
        # Out, and not masqueraded.
        flow(WEB, OUTSIDE),
        flow(WEB, OUTSIDE, protocol=TCP),
        # In, to what is not published.
        flow(OUTSIDE, WEB),
        flow(OUTSIDE, WEB, protocol=TCP),
        flow(OUTSIDE, "10.50.3.2"),
        # To a published port, but to the host; or to who had it before.
        flow(OUTSIDE, HOST, 53),
        flow(OUTSIDE, HOST, 53, by=("10.42.3.9", 5353)),
        flow(OUTSIDE, HOST, 53, by=(WEB, 5354)),
        flow("127.0.0.1", "127.0.0.1", 54),
        # To a port that is not published any more.
        flow(OUTSIDE, HOST, 99, by=(WEB, 99)),
    ],
)
def test_wrong(wrong: Flow) -> None:
    assert rules().is_wrong(wrong)


@pytest.mark.parametrize(
    "right",
    [
        flow(WEB, OUTSIDE, status=IPS_SRC_NAT),
        flow(WEB, PEER),
        flow(PEER, WEB),
        flow(WEB, "224.0.0.251", 5353),
        flow(WEB, "255.255.255.255", 67),
        flow(WEB, "10.42.3.1"),  # its gateway
        flow(WEB, HOST),
        flow(HOST, WEB),
        flow("10.42.3.1", OUTSIDE),
        flow("10.50.3.2", OUTSIDE),  # is dropped, whatever connection tracking says
        flow(OUTSIDE, HOST),
        flow(OUTSIDE, HOST, 54),  # published at another address
        flow(OUTSIDE, HOST, 53, by=(WEB, 5353)),
        flow("127.0.0.1", "127.0.0.1", 54, by=(WEB, 5454)),
        flow(OUTSIDE, HOST, 99, by=("172.17.0.2", 99)),  # somebody else's
        flow(OUTSIDE, HOST, 99, by=(WEB, 99), protocol=TCP),  # open connections go on
        flow(OUTSIDE, "203.0.113.9"),
        flow("fd00::1", "fd00::2"),
    ],
)
def test_right(right: Flow) -> None:
    assert not rules().is_wrong(right)
