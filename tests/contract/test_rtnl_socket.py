"""Dumps while the tables change: by a script, and on the real kernel."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from meshnet.kernel.netns import inside
from meshnet.kernel.wire import bulk, rtnl
from meshnet.state import NEXTHOP_ID_FIRST, Nexthop
from meshnet.tables import Op, Table
from tests.contract.hosts import UNDERLAY_DEV, host_namespace, ip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Datagram = list[tuple[int, int, bytes]]
"""Type, flags and body of each message."""

INTERRUPTED = rtnl.NLM_F_DUMP_INTR
KIND = rtnl.RTM_GETNEXTHOP


class ScriptedSocket(rtnl.RtnlSocket):
    """Answers each dump with the next datagram of a script."""

    def __init__(self, *answers: Datagram, forever: bool = False) -> None:
        super().__init__()
        self._answers = list(answers)
        self._forever = forever
        self.dumps = 0

    def _receive(self) -> bytes:
        self.dumps += 1
        answer = self._answers[0] if self._forever else self._answers.pop(0)
        # The rest of an earlier dump arrives first, and does not belong to this one.
        stale = [(KIND - 2, INTERRUPTED, b"stale...", self._sequence - 1)]
        messages = stale + [(*message, self._sequence) for message in answer]
        return b"".join(
            rtnl.NLMSG_HEADER.pack(16 + len(body), kind, flags, sequence, 0) + body
            for kind, flags, body, sequence in messages
        )


@pytest.fixture
def scripted(nothing_left: None) -> Iterator[Callable[..., ScriptedSocket]]:
    opened: list[ScriptedSocket] = []

    def open_socket(*answers: Datagram, forever: bool = False) -> ScriptedSocket:
        opened.append(ScriptedSocket(*answers, forever=forever))
        return opened[-1]

    yield open_socket
    for each in opened:
        each.close()


def failed(code: int, flags: int = 0) -> tuple[int, int, bytes]:
    return rtnl.NLMSG_ERROR, flags, rtnl.NLMSGERR.pack(-code) + bytes(16)


DONE = (rtnl.NLMSG_DONE, 0, bytes(4))
GOOD = [(KIND - 2, 0, b"12345678"), DONE]


def texts(found: list[rtnl.Body]) -> list[bytes]:
    return [data[start:end] for data, start, end in found]


@pytest.mark.parametrize(
    "first",
    [
        [(KIND - 2, INTERRUPTED, b"half...."), DONE],
        [(KIND - 2, 0, b"half...."), (rtnl.NLMSG_DONE, INTERRUPTED, bytes(4))],
        [(KIND - 2, 0, b"half...."), failed(errno.EINTR)],
    ],
    ids=["a message", "the end", "EINTR"],
)
def test_an_interrupted_dump_is_repeated(
    scripted: Callable[..., ScriptedSocket], first: Datagram
) -> None:
    target = scripted(first, first, GOOD)
    assert texts(target.dump(KIND, bulk.nexthop_dump())) == [b"12345678"]
    assert target.dumps == 3


def test_a_dump_that_is_always_interrupted(scripted: Callable[..., ScriptedSocket]) -> None:
    target = scripted([(KIND - 2, INTERRUPTED, b"half...."), DONE], forever=True)
    with pytest.raises(InterruptedError, match="ten times"):
        target.dump(KIND, bulk.nexthop_dump())
    assert target.dumps == 10


def test_a_dump_that_is_refused(scripted: Callable[..., ScriptedSocket]) -> None:
    with pytest.raises(OSError, match="not supported") as caught:
        scripted([failed(errno.EOPNOTSUPP)]).dump(KIND, bulk.nexthop_dump())
    assert caught.value.errno == errno.EOPNOTSUPP


def test_a_kernel_that_does_not_answer(nothing_left: None) -> None:
    target = rtnl.RtnlSocket(timeout_s=0.05)
    try:
        with pytest.raises(TimeoutError, match="did not answer"):
            target.ask([rtnl.pack_request(rtnl.Request(rtnl.NLMSG_NOOP, 0, b""), 1)])
    finally:
        target.close()


class Meddled(rtnl.RtnlSocket):
    """Somebody changes the tables after the first datagram that is received."""

    def __init__(self) -> None:
        super().__init__()
        self.meddle: Callable[[], None] | None = None
        self.received = 0

    def _receive(self) -> bytes:
        data = super()._receive()
        self.received += 1
        meddle, self.meddle = self.meddle, None
        if meddle is not None:
            meddle()
        return data


@pytest.mark.root
def test_linux_tells_of_a_change_while_it_dumps(root: None, nothing_left: None) -> None:
    ids = range(NEXTHOP_ID_FIRST, NEXTHOP_ID_FIRST + 3000)
    gateway = Nexthop(UNDERLAY_DEV, bytes((10, 9, 0, 9)))
    ops = [Op(Table.NEXTHOP, i, gateway, False) for i in ids]
    with host_namespace() as (name, fd):

        def delete_one() -> None:
            ip("-n", name, "nexthop", "del", "id", str(ids[-1]))

        with inside(fd):
            target = Meddled()
        try:
            (index,) = {
                line.split(":")[0] for line in ip("-n", name, "-o", "link").splitlines()
                if UNDERLAY_DEV in line
            }  # fmt: skip
            indices = {UNDERLAY_DEV: int(index)}
            assert target.send_packed(bulk.encode_nexthops(ops, indices, 1)) == {}
            target.received, target.meddle = 0, delete_one
            found = target.dump(rtnl.RTM_GETNEXTHOP, bulk.nexthop_dump())
            ours, _ = bulk.decode_nexthops(found, {int(index): UNDERLAY_DEV})
            assert ours == dict.fromkeys(ids[:-1], gateway)
            datagrams = len({id(data) for data, _, _ in found})
            assert target.received > datagrams + 2  # it was repeated
        finally:
            target.close()
