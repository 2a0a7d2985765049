"""The steps of a takeover on tables in memory: they leave no gap, and all can be undone."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import tempfile
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from meshnet.errors import KernelRefusedError
from meshnet.kernel.takeover import contents
from meshnet.kernel.takeover.contents import Contents, Kind, LinkObject
from meshnet.kernel.takeover.journal import Journal, JournalDir, Stage
from meshnet.kernel.takeover.plan import Step, Verb, plan_giving_back, plan_taking
from meshnet.kernel.wire import links, rtnl
from meshnet.kernel.wire.bulk import (
    NDA_DST,
    NDA_LLADDR,
    NUD_PERMANENT,
    RTA_DST,
    RTA_GATEWAY,
    RTA_PRIORITY,
    RTA_TABLE,
)
from meshnet.kernel.wire.host_routes import RTA_MULTIPATH

if TYPE_CHECKING:
    from collections.abc import Sequence

PARENT, BRIDGE = "eth0", "mnp7"
PREFIXES = [ip_network(p) for p in ("10.1.0.0/24", "10.2.0.0/16", "2001:db8:1::/64", "fe80::/64")]


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def make_address(text: str, length: int, flags: int = 0, label: str = "") -> LinkObject:
    ip = ip_address(text)
    attrs = [(links.IFA_ADDRESS, ip.packed), (links.IFA_FLAGS, rtnl.U32.pack(flags))]
    if ip.version == 4:
        attrs += [(links.IFA_LOCAL, ip.packed), (contents.IFA_LABEL, label.encode())]
    header = rtnl.IFADDR.pack(_family(ip.version), length, 0, 0, 0)
    return LinkObject(Kind.ADDRESS, header, tuple(attrs))


def make_route(
    prefix: str, metric: int, protocol: int = 4, gateway: str | None = None
) -> LinkObject:
    network = ip_network(prefix)
    header = rtnl.RTMSG.pack(
        _family(network.version), network.prefixlen, 0, 0, 254, protocol, 0, 1, 0
    )
    attrs = [
        (RTA_TABLE, rtnl.U32.pack(254)),
        (RTA_DST, network.network_address.packed),
        (RTA_PRIORITY, rtnl.U32.pack(metric)),
    ]
    if gateway is not None:
        attrs.append((RTA_GATEWAY, ip_address(gateway).packed))
    return LinkObject(Kind.ROUTE, header, tuple(attrs))


def make_neighbour(text: str) -> LinkObject:
    ip = ip_address(text)
    header = rtnl.NDMSG.pack(_family(ip.version), 0, NUD_PERMANENT, 0, 0)
    return LinkObject(Kind.NEIGHBOUR, header, ((NDA_DST, ip.packed), (NDA_LLADDR, bytes(6))))


class Tables:
    """What two links have, as the kernel would keep it: a new address has its place, and a route
    to its prefix that comes and goes with it."""

    def __init__(self, held: Contents) -> None:
        self.is_port = False
        self._lists: dict[str, dict[Kind, list[LinkObject]]] = {
            link: {kind: [] for kind in Kind} for link in (PARENT, BRIDGE)
        }
        for record in itertools.chain.from_iterable(held):
            self._lists[PARENT][record.kind].append(record)

    def of(self, link: str) -> Contents:
        kinds = self._lists[link]
        return Contents(
            tuple(kinds[Kind.ADDRESS]),
            tuple(kinds[Kind.NEIGHBOUR]),
            tuple(kinds[Kind.NEXTHOP]),
            tuple(kinds[Kind.ROUTE]),
        )

    def drop(self, link: str) -> None:
        for records in self._lists[link].values():
            records.clear()

    def carry_out(self, batch: Sequence[Step]) -> None:
        for step in batch:
            record = step.moved
            if record is None:
                assert self.is_port is (step.verb is Verb.DELETE)
                self.is_port = step.verb is Verb.ADD
                continue
            at = self._lists[step.link][record.kind]
            if step.verb is Verb.ADD:
                assert record not in at
                first = record.kind is Kind.ADDRESS and record.family == socket.AF_INET6
                at.insert(self._ipv4_count(at) if first else self._end(at, record), record)
            elif record in at:
                at.remove(record)
            else:
                # Of what came with an address.
                assert record.kind is Kind.ROUTE
                assert record.header[5] == contents.RTPROT_KERNEL

    def _ipv4_count(self, at: list[LinkObject]) -> int:
        return sum(r.family == socket.AF_INET for r in at)

    def _end(self, at: list[LinkObject], record: LinkObject) -> int:
        return self._ipv4_count(at) if record.kind is Kind.ADDRESS else len(at)


@st.composite
def held_contents(draw: st.DrawFn) -> Contents:
    """Something of everything; routes are distinct, as the kernel has them."""
    hosts = draw(st.lists(st.tuples(st.sampled_from(PREFIXES), st.integers(2, 9)), unique=True))
    hosts.sort(key=lambda host: host[0].version)
    addresses = tuple(
        make_address(str(prefix[number]), prefix.prefixlen, contents.IFA_F_NOPREFIXROUTE)
        for prefix, number in hosts
    )
    numbers = draw(st.lists(st.integers(0, 20), unique=True))
    routes = tuple(make_route(f"192.0.{n}.0/24", n % 3, gateway="10.1.0.1") for n in numbers)
    names = draw(st.lists(st.integers(2, 9), unique=True))
    neighbours = tuple(make_neighbour(f"10.1.0.{n}") for n in names)
    return Contents(addresses, neighbours, (), routes)


@given(held_contents())
def test_after_every_batch_nothing_is_nowhere(held: Contents) -> None:
    tables = Tables(held)
    batches = plan_taking(PARENT, BRIDGE, held)
    for batch in batches:
        tables.carry_out(batch)
        for before, *now in zip(held, tables.of(PARENT), tables.of(BRIDGE), strict=True):
            assert set(before) == set().union(*now)
    assert tables.of(BRIDGE) == held
    assert tables.of(PARENT) == Contents()
    assert tables.is_port


@given(held_contents(), st.integers(0, 3), st.integers(0, 3))
def test_whatever_was_cut_short_is_undone(held: Contents, taken: int, given_back: int) -> None:
    """Taking over stops after some batches, and giving back too; giving back again repairs it."""
    tables = Tables(held)
    for batch in plan_taking(PARENT, BRIDGE, held)[:taken]:
        tables.carry_out(batch)
    for upto in (given_back, None):
        batches = plan_giving_back(
            PARENT,
            BRIDGE,
            held,
            tables.of(PARENT),
            tables.of(BRIDGE),
            is_port=tables.is_port,
        )
        for batch in batches[:upto]:
            tables.carry_out(batch)
    tables.drop(BRIDGE)
    assert tables.of(PARENT) == held
    assert not tables.is_port


def test_a_route_that_comes_with_an_address_is_not_added_twice() -> None:
    implied = make_route("10.1.0.0/24", 0, contents.RTPROT_KERNEL)
    by_hand = make_route("10.1.0.0/24", 100, contents.RTPROT_KERNEL)
    flag = contents.IFA_F_NOPREFIXROUTE
    with_route, without = make_address("10.1.0.2", 24), make_address("10.1.0.2", 24, flag)
    routes = (implied, by_hand)
    assert Contents((with_route,), (), (), routes).own_routes == (by_hand,)
    assert Contents((without,), (), (), routes).own_routes == routes


def test_a_label_follows_the_link() -> None:
    for label, moved in (("eth0", "mnp7"), ("eth0:a", "mnp7:a"), ("other", "other")):
        body = rtnl.IFADDR.pack(socket.AF_INET, 24, 0, 0, 3)
        body += rtnl.attr(links.IFA_LOCAL, b"\x0a\0\0\1")
        body += rtnl.attr(contents.IFA_LABEL, label.encode() + b"\0")
        (record,) = contents.decode_addresses([(body, 0, len(body))], 3, PARENT)
        there = contents.encode_body(record, 4, BRIDGE)
        assert moved.encode() + b"\0" in there
        (back,) = contents.decode_addresses([(there, 0, len(there))], 4, BRIDGE)
        assert contents.encode_body(back, 3, PARENT) == body


def test_ways_of_one_ipv6_route_are_routes() -> None:
    """As they are while parent and bridge have the same one."""
    way = rtnl.attr(RTA_GATEWAY, ip_address("fe80::1").packed)
    ways = b"".join(contents._RTNEXTHOP.pack(8 + len(way), 0, index) + way for index in (3, 4))
    body = rtnl.RTMSG.pack(socket.AF_INET6, 0, 0, 0, 254, 4, 0, 1, 0)
    body += rtnl.attr(RTA_TABLE, rtnl.U32.pack(254))
    body += rtnl.attr(RTA_PRIORITY, rtnl.U32.pack(1024))
    alone = body + way + rtnl.attr(4, rtnl.U32.pack(3))
    both = body + rtnl.attr(RTA_MULTIPATH, ways)
    (first,) = contents.decode_routes([(alone, 0, len(alone))], 3)
    for index in (3, 4):
        (found,) = contents.decode_routes([(both, 0, len(both))], index)
        assert found.identity == first.identity
    assert contents.multipath_over([(both, 0, len(both))], 4)


def make_journal(held: Contents, stage: Stage = Stage.MOVED) -> Journal:
    return Journal(bridge=BRIDGE, parent=PARENT, stage=stage, contents=held, generation=1, boot="b")


@given(held_contents(), st.sampled_from(Stage))
def test_a_journal_is_read_as_it_was_written(held: Contents, stage: Stage) -> None:
    journal = make_journal(held, stage)
    with tempfile.TemporaryDirectory() as directory:
        journals = JournalDir(Path(directory))
        with journals.locked(BRIDGE):
            assert journals.load(BRIDGE) is None
            journals.save(journal)
        assert journals.bridges() == [BRIDGE]
        assert journals.load(BRIDGE) == journal
        journals.remove(BRIDGE)
        assert journals.bridges() == []


def test_a_damaged_journal_is_not_believed(tmp_path: Path) -> None:
    """The host would be given back addresses that it never had."""
    journals = JournalDir(tmp_path)
    journal = make_journal(Contents(addresses=(make_address("10.1.0.5", 24),)))
    with journals.locked(BRIDGE):
        journals.save(journal)
    (file,) = journals.path.glob("*.json")
    whole = file.read_bytes()
    damaged = [whole[:size] for size in range(len(whole))]
    for at, byte in enumerate(whole):
        damaged.append(whole[:at] + bytes([byte ^ 1 << at % 8]) + whole[at + 1 :])
    for content in damaged:
        file.write_bytes(content)
        # If the checksum's own name was hit, the content is whole.
        with contextlib.suppress(KernelRefusedError):
            assert journals.load(BRIDGE) == journal


def test_a_journal_of_a_version_without_checksums_is_taken(tmp_path: Path) -> None:
    journals = JournalDir(tmp_path)
    journal = make_journal(Contents())
    with journals.locked(BRIDGE):
        journals.save(journal)
    (file,) = journals.path.glob("*.json")
    document = json.loads(file.read_bytes())
    del document["crc32"]
    file.write_text(json.dumps(document))
    assert journals.load(BRIDGE) == journal
