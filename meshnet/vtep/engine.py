"""What carries packets: what an engine is, and what it works with.

`meshnet.vtep.python.engine` and `meshnet.vtep.native.engine` are the two.

An engine runs in the process's one thread and stops for nothing but the caller's descriptors: so a
change of members needs no lock, and no packet ever sees half of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from meshnet.vtep.python.receiver import Receiver
from meshnet.vtep.python.sender import Sender

if TYPE_CHECKING:
    from meshnet.vtep.counters import Counters
    from meshnet.vtep.peers import PeerTable
    from meshnet.vtep.probe_exchange import ProbeExchange
    from meshnet.vtep.tun import Tun
    from meshnet.vtep.underlay_socket import UnderlaySocket

ENGINES = ("python", "native")


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
    probes: ProbeExchange
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


def make_carriers(parts: Parts) -> tuple[Sender, Receiver]:
    """A sender and a receiver; the caller closes the sender."""
    tun, underlay, table, counters, mtu_bytes, probes, _ = parts
    sender = Sender(tun, underlay, table, counters, mtu_bytes)
    return sender, Receiver(tun, underlay, table, counters, mtu_bytes, probes)
