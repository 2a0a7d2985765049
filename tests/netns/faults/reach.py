"""Tests who reaches whom: one UDP packet from each endpoint to each other, in all networks.

The packets that must not arrive are sent first: each has been delivered or dropped once what its
socket sent after it has arrived, so nobody waits for nothing to happen.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from tests.netns.faults.wanted import addresses_of
from tests.netns.talk import open_socket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.netns.faults.mesh import Member

_AGAIN_S = 0.1
"""How long after the first try another one is made."""
_GIVE_UP_S = 0.25


class _End(NamedTuple):
    """A socket at one address of an endpoint."""

    member: Member
    address: str
    socket: socket.socket

    @property
    def version(self) -> int:
        return ip_address(self.address).version

    def __str__(self) -> str:
        return f"{self.address} of {self.member.network} on {self.member.host}"


def probe(members: list[Member]) -> list[str]:
    """Send them all; returns sentences about what did not arrive, or should not have."""
    problems: list[str] = []
    with contextlib.ExitStack() as stack:
        ends = list(_open(members, stack, problems))
        if not ends:
            return problems
        port = _common_port(ends, problems)
        ends = [end for end in ends if end.socket.getsockname()[1] == port]
        pairs = [(a, b) for a in ends for b in ends if a is not b and a.version == b.version]
        pairs.sort(key=lambda pair: pair[0].member.network == pair[1].member.network)
        wanted = {
            (a.address, b.address): (a, b) for a, b in pairs if a.member.network == b.member.network
        }
        for a, b in pairs:
            _send(a, b, port)
        problems += _gather(ends, wanted, port)
    return problems


def _open(
    members: list[Member], stack: contextlib.ExitStack, problems: list[str]
) -> Iterator[_End]:
    for member in members:
        for address in addresses_of(member.document):
            try:
                opened = open_socket(
                    member.container, socket.SOCK_DGRAM, ip_address(address).version
                )
            except OSError as error:
                problems.append(f"endpoint {address}: its namespace cannot be entered: {error}")
                continue
            stack.enter_context(contextlib.closing(opened))
            opened.setblocking(False)
            yield _End(member, address, opened)


def _common_port(ends: list[_End], problems: list[str]) -> int:
    """Bind all sockets to a port that is free in every namespace."""
    port = 0
    for end in ends:
        try:
            end.socket.bind((end.address, port))
        except OSError as error:
            problems.append(f"endpoint {end}: does not have its address: {error}")
            continue
        port = end.socket.getsockname()[1]
    return port


def _send(source: _End, target: _End, port: int) -> None:
    text = f"{source.address} {target.address}".encode()
    with contextlib.suppress(OSError):  # no route: then it does not arrive
        source.socket.sendto(text, (target.address, port))


def _gather(
    ends: list[_End], wanted: dict[tuple[str, str], tuple[_End, _End]], port: int
) -> list[str]:
    missing = dict(wanted)
    problems: list[str] = []
    start = time.monotonic()
    again = start + _AGAIN_S
    with selectors.DefaultSelector() as selector:
        for end in ends:
            selector.register(end.socket, selectors.EVENT_READ, end)
        while missing and time.monotonic() < start + _GIVE_UP_S:
            for key, _ in selector.select(_AGAIN_S / 4):
                problems += _receive(key.data, wanted, missing)
            if missing and time.monotonic() > again:
                again = float("inf")
                for source, target in missing.values():
                    _send(source, target, port)
        for end in ends:
            problems += _receive(end, wanted, missing)
    problems += [f"endpoint {a} does not reach {b}" for a, b in missing.values()]
    return problems


def _receive(
    end: _End,
    wanted: dict[tuple[str, str], tuple[_End, _End]],
    missing: dict[tuple[str, str], tuple[_End, _End]],
) -> Iterator[str]:
    while True:
        try:
            text, sender = end.socket.recvfrom(128)
        except BlockingIOError:
            return
        except OSError as error:
            yield f"endpoint {end}: {error}"
            return
        source, _, target = text.decode(errors="replace").partition(" ")
        if (source, target) not in wanted:
            yield f"endpoint {end} got a packet of {source}, which is of another network"
        elif sender[0] != source or target != end.address:
            yield f"endpoint {end} got a packet from {sender[0]} that was {source}'s for {target}"
        else:
            missing.pop((source, target), None)
