"""Small UDP packets a second over a way, with ``blast.c`` at both ends.

What counts is what arrives.  The sender keeps a window of packets on their way, which fills the
path without flooding it; `FLOOD` sends as fast as it can, and on a machine with few CPUs most of
that is dropped after it has cost its time.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from tests.bench.ways import Way

BYTES = 64
WINDOW = 400  # less than what a TUN device queues, 500
FLOOD = 0
_PORT = 7000
_WAIT_MS = 3000


class Arrived(NamedTuple):
    """What came out of a way.

    Attributes:
        packets: how many arrived.
        rate: of them a second.
        lost: the part of those sent that did not.
    """

    packets: int
    rate: float
    lost: float


def blast(program: Path, way: Way, length_ms: int, window: int = WINDOW) -> Arrived:
    """Send for so long, and count at the other end.

    Args:
        window: packets on their way at most; `FLOOD`: any number.

    Raises:
        RuntimeError: nothing arrived.
    """
    counter = way.server.popen([str(program), "count", str(_PORT), str(_WAIT_MS)])
    try:
        assert counter.stdout is not None  # it is a pipe
        counter.stdout.readline()  # it has bound its port
        argv = ["send", way.address, str(_PORT), str(BYTES), str(length_ms), "0", str(window)]
        sent = int(way.client.run([str(program), *argv]).stdout)
        counted = counter.communicate(timeout=_WAIT_MS / 1000 + 5)[0].split()
    finally:
        with contextlib.suppress(ProcessLookupError):
            counter.kill()
    packets, taken_ns = (int(field) for field in counted)
    if not packets or not taken_ns:
        raise RuntimeError(f"of {sent} packets to {way.address} none or one arrived")
    return Arrived(packets, packets / taken_ns * 1e9, max(0.0, 1 - packets / sent))
