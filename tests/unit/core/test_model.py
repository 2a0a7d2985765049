"""Who owns which subnet, looked up either way."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshnet.model import HostId, IpNetwork, Reservations

SUBNETS = [*ip_network("10.42.0.0/21").subnets(new_prefix=24), ip_network("fd00:42::/64")]
HOSTS = [HostId(f"h{i}") for i in range(4)]

steps = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(SUBNETS), st.sampled_from(HOSTS)),
    st.tuples(st.just("remove"), st.sampled_from(SUBNETS), st.just(None)),
    st.tuples(
        st.just("assign"),
        st.lists(st.sampled_from(SUBNETS), max_size=3),
        st.sampled_from(HOSTS),
    ),
)


@given(st.lists(steps, max_size=30))
def test_both_ways_agree(changes: list[tuple[str, Any, HostId]]) -> None:
    held, plain = Reservations(), dict[IpNetwork, HostId]()
    for kind, subnet, host in changes:
        before = held.copy()
        if kind == "put":
            assert held.put(subnet, host) == plain.get(subnet)
            plain[subnet] = host
        elif kind == "remove":
            assert held.remove(subnet) == plain.pop(subnet, None)
        else:
            held.assign(host, tuple(subnet))
            plain = {s: h for s, h in plain.items() if h != host}
            plain |= dict.fromkeys(subnet, host)
        assert held == plain
        assert held.hosts == set(plain.values())
        for owner in HOSTS:
            owned = [s for s, h in plain.items() if h == owner]
            assert held.of(owner) == tuple(
                sorted(owned, key=lambda s: (s.version, int(s.network_address)))
            )
        assert before == Reservations(before)  # a copy is not touched
