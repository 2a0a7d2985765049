"""What carries packets, and the one written in Python.

An engine runs in the process's one thread and stops for nothing but the caller's descriptors: so a
change of members needs no lock, and no packet ever sees half of one.
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from meshnet.vtep.receiver import Receiver
from meshnet.vtep.sender import Sender

if TYPE_CHECKING:
    from meshnet.vtep.counters import Counters
    from meshnet.vtep.peers import PeerTable
    from meshnet.vtep.prober import Prober
    from meshnet.vtep.tun import Tun, UnderlaySocket

ENGINES = ("python", "native")
_MOST_READS = 64
_AT_ONCE_S = 10e-6
"""A wait shorter than this was none: the packet had been there before."""


class Parts(NamedTuple):
    """What an engine works with; all of it is the caller's.

    Attributes:
        called: readable when the caller has something else to do (an epoll's descriptor).
    """

    tun: Tun
    underlay: UnderlaySocket
    table: PeerTable
    counters: Counters
    mtu_bytes: int
    prober: Prober
    called: int


class Engine(Protocol):
    """Carries packets."""

    def run(self, timeout_s: float | None) -> None:
        """Carry packets until the caller is called, or for about that long.

        Raises:
            OSError: the TUN is gone.
        """
        ...

    def collect(self) -> None:
        """Bring the counters of members and of the process up to date."""
        ...

    def members_changed(self) -> None:
        """The table has other members than before; `collect` was called before that."""
        ...

    def close(self) -> None:
        """Close what is its own."""
        ...


class PythonEngine:
    """`Sender` and `Receiver` in turn."""

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


def make_carriers(parts: Parts) -> tuple[Sender, Receiver]:
    """A sender and a receiver; the caller closes the sender."""
    tun, underlay, table, counters, mtu_bytes, prober, _ = parts
    sender = Sender(tun, underlay, table, counters, mtu_bytes)
    return sender, Receiver(tun, underlay, table, counters, mtu_bytes, prober)


def make_engine(name: str, parts: Parts) -> Engine:
    """The engine of that name, one of `ENGINES`.

    Raises:
        NotFoundError: the native one is not built.
        KernelRefusedError: the kernel refused.
    """
    if name == "python":
        return PythonEngine(parts)
    # Imported here: the engine in Python needs neither ctypes nor hashlib.
    from meshnet.vtep.native.engine import NativeEngine

    return NativeEngine(parts)
