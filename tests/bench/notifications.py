"""When objects appear in and vanish from the kernels of namespaces, as they tell of it themselves.

Sockets of rtnetlink notifications, opened inside each namespace, read by one thread: what is
measured is not disturbed by looking.  linux/rtnetlink.h, linux/neighbour.h, linux/nexthop.h.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from meshnet.kernel.events import (
    NETLINK_ADD_MEMBERSHIP,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV6_ROUTE,
    RTNLGRP_NEIGH,
    RTNLGRP_NEXTHOP,
)
from meshnet.kernel.netns import inside
from meshnet.kernel.wire import bulk, rtnl
from tests.bench.simulated import Object

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

ALL_GROUPS = (RTNLGRP_NEIGH, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_ROUTE, RTNLGRP_NEXTHOP)
_SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 256 << 20
_RECEIVE_BYTES = 1 << 16
_NEW = {
    rtnl.RTM_NEWROUTE: True,
    rtnl.RTM_DELROUTE: False,
    rtnl.RTM_NEWNEXTHOP: True,
    rtnl.RTM_DELNEXTHOP: False,
    rtnl.RTM_NEWNEIGH: True,
    rtnl.RTM_DELNEIGH: False,
}


class Notification(NamedTuple):
    """One object came (or changed), or went.

    Attributes:
        at: `time.monotonic` when it was read.
        place: the namespace, as named to `Watch`.
    """

    at: float
    place: str
    object: Object
    there: bool


class Watch:
    """Listens in namespaces.  Read it, or what comes piles up.

    Args:
        netns: paths of the namespaces by a name.
        groups: multicast groups to hear.
    """

    def __init__(self, netns: Mapping[str, Path], groups: Collection[int] = ALL_GROUPS) -> None:
        self._poll = select.epoll()
        self._sockets: dict[int, tuple[str, socket.socket]] = {}
        try:
            for place, path in netns.items():
                opened = _open(path, groups)
                self._sockets[opened.fileno()] = (place, opened)
                self._poll.register(opened.fileno(), select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        for _, opened in self._sockets.values():
            opened.close()
        self._poll.close()

    def read(self, wait_s: float) -> Iterator[Notification]:
        """What has come; waits for the first at most so long.

        Raises:
            OSError: ENOBUFS: more came than was read, notifications are lost.
        """
        for fd, _ in self._poll.poll(wait_s):
            place, opened = self._sockets[fd]
            # A bounded number, so that one busy namespace does not keep us from the others.
            for _ in range(256):
                try:
                    data = opened.recv(_RECEIVE_BYTES)
                except BlockingIOError:
                    break
                now = time.monotonic()
                for message in rtnl.split_messages(data):
                    found = _object(message)
                    if found is not None:
                        yield Notification(now, place, found, _NEW[message.kind])

    def count(self, notifications: int, deadline_s: float) -> None:
        """Wait until so many came, without reading what they say: the kernel makes them as fast.

        Raises:
            TimeoutError: they did not come in time.
        """
        deadline = time.monotonic() + deadline_s
        while (left_s := deadline - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(left_s):
                receive = self._sockets[fd][1].recv
                with contextlib.suppress(BlockingIOError):
                    while notifications > 0:
                        receive(16)
                        notifications -= 1
            if notifications <= 0:
                return
        raise TimeoutError(f"not within {deadline_s:g} s: {notifications} more notifications")

    def until(self, done: Callable[[Notification], bool], deadline_s: float, what: str) -> float:
        """Read until `done` says so of a notification; returns when that one came.

        Raises:
            TimeoutError: it did not in time.
        """
        deadline = time.monotonic() + deadline_s
        while (left := deadline - time.monotonic()) > 0:
            for notification in self.read(left):
                if done(notification):
                    return notification.at
        raise TimeoutError(f"not within {deadline_s:g} s: {what}")

    def until_all(self, objects: set[Object], there: bool, deadline_s: float) -> float:
        """Read until each of `objects` has come (or gone); returns when the last one did."""
        left = set(objects)

        def done(notification: Notification) -> bool:
            if notification.there == there:
                left.discard(notification.object)
            return not left

        verb = "come" if there else "gone"
        return self.until(done, deadline_s, f"{len(objects)} objects have {verb}")


def _open(path: Path, groups: Collection[int]) -> socket.socket:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with inside(fd):
            opened = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
            )
    finally:
        os.close(fd)
    try:
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        opened.bind((0, 0))
        for group in groups:
            opened.setsockopt(rtnl.SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    except BaseException:
        opened.close()
        raise
    return opened


def _object(message: rtnl.Message) -> Object | None:
    """What a notification is about, if it is one of ours by its look."""
    data, start, end = message.data, message.start, message.end
    match message.kind:
        case rtnl.RTM_NEWROUTE | rtnl.RTM_DELROUTE:
            if rtnl.RTMSG.unpack_from(data, start)[4] != bulk.RT_TABLE_MAIN:
                return None
            key = rtnl.parse_attrs(data, start + 12, end).get(bulk.RTA_DST)
            return Object("route", key) if key else None
        case rtnl.RTM_NEWNEXTHOP | rtnl.RTM_DELNEXTHOP:
            key = rtnl.parse_attrs(data, start + 8, end).get(bulk.NHA_GATEWAY)
            return Object("nexthop", key) if key else None
        case rtnl.RTM_NEWNEIGH | rtnl.RTM_DELNEIGH:
            family = rtnl.NDMSG.unpack_from(data, start)[0]
            attrs = rtnl.parse_attrs(data, start + 12, end)
            if family == rtnl.AF_BRIDGE:
                key = attrs.get(bulk.NDA_LLADDR)
                return Object("fdb", key) if key else None
            key = attrs.get(bulk.NDA_DST)
            return Object("neighbour", key) if key else None
        case _:
            return None
