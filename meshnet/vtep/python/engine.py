"""The engine that is written in Python: `Sender` and `Receiver` in turn, in one loop."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING

from meshnet.vtep.engine import make_carriers

if TYPE_CHECKING:
    from meshnet.vtep.engine import Parts

_MOST_READS = 64
_AT_ONCE_S = 10e-6
"""A wait shorter than this was none: the packet had been there before."""


class PythonEngine:
    """See `meshnet.vtep.engine.Engine`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._sender, self._receiver = make_carriers(parts)
        self._poll = select.epoll()
        for fd in (parts.tun.fd, parts.underlay.socket.fileno(), parts.called):
            self._poll.register(fd, select.EPOLLIN)
        self._outward = self._inward = 1

    def run(self, timeout_s: float | None) -> None:
        """See `Engine.run`.

        One reader at a time, as many reads at once as have lately been waiting.  A lone packet
        costs one wait, one read and one send; with a budget of one there is no second read that
        would say that nothing is left.  The budget grows when the wait for more was none.
        """
        tun_fd, udp_fd = self._parts.tun.fd, self._parts.underlay.socket.fileno()
        send, send_one = self._sender.pump, self._sender.one
        receive, receive_one = self._receiver.pump, self._receiver.one
        wait, clock = self._poll.poll, time.monotonic
        outward, inward = self._outward, self._inward
        idle_since = clock()
        deadline = None if timeout_s is None else idle_since + timeout_s
        called = False
        while not called:
            ready = wait(timeout_s, 3)
            waited = clock() - idle_since > _AT_ONCE_S
            for fd, _ in ready:
                if fd == tun_fd:
                    done = send(outward) if outward > 1 else send_one()
                    if done < outward:
                        outward = done or 1
                    elif not waited and outward < _MOST_READS:
                        outward *= 2
                elif fd == udp_fd:
                    done = receive(inward) if inward > 1 else receive_one()
                    if done < inward:
                        inward = done or 1
                    elif not waited and inward < _MOST_READS:
                        inward *= 2
                else:
                    called = True
            idle_since = clock()
            if deadline is not None:
                timeout_s = deadline - idle_since
                if timeout_s <= 0:
                    break
        self._outward, self._inward = outward, inward

    def collect(self) -> None:
        """See `Engine.collect`: they always are."""

    def members_changed(self) -> None:
        """See `Engine.members_changed`."""
        self._sender.forget_sockets()

    def close(self) -> None:
        """See `Engine.close`."""
        self._poll.close()
        self._sender.close()
