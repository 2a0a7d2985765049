"""Probes the ways to peers of networks with a fallback, and tells when one is to go another way.

The decisions are `meshnet_agent.dataplane.fallback`'; the userspace VTEPs' processes send the
probes, answer those of others and take the time, so that neither a busy agent nor one that is away
looks like a way that is dead (`meshnet.vtep.probe_exchange`).  A process is asked in a thread: the
event loop stays free.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

import structlog
import trio

from meshnet_agent.dataplane.fallback import Paths, Way

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from meshnet.model import HostId, NetworkName
    from meshnet_agent.dataplane.fallback import Fall, Pair, Probe, Statistics

_log = structlog.get_logger()
_TICK_S = 0.1
_IDLE_S = 1.0
_LOOK_S, _LOOK_SHARE = 1.0, 0.02
"""Least time between two looks at who is to be probed, and the most of all time that they take."""
_LOGGED = 20


class Target(NamedTuple):
    """A peer to probe: by which TUN's process, where, and how long a packet may be."""

    tun: str
    underlay_ip: str
    mtu_bytes: int


class Prober(Protocol):
    """Sends probes by the process of a TUN (`meshnet.kernel.vteps.VtepProcesses`)."""

    def probe(
        self, tun: str, requests: Sequence[tuple[int, str, str, int]]
    ) -> list[tuple[int, str, float]]:
        """Send probes; returns the answers since the last call."""
        ...


class Probes:
    """Runs the probes of all networks.

    Args:
        prober: None: nothing is probed, and what is in fallback stays so.
        look: whom to probe; None: not known now, go on as before.
        on_move: called with hosts that are to be sent to another way.
    """

    def __init__(
        self,
        prober: Prober | None,
        look: Callable[[], Mapping[Pair, Target] | None],
        on_move: Callable[[Collection[HostId]], None],
    ) -> None:
        self._prober = prober
        self._look = look
        self._on_move = on_move
        self._paths = Paths(secrets.randbits(62), trio.current_time())
        self._targets: Mapping[Pair, Target] = {}
        self._stale = True

    @property
    def fallen(self) -> frozenset[Pair]:
        """Peers in fallback."""
        return self._paths.fallen

    @property
    def falls(self) -> Mapping[Pair, Fall]:
        """The same, since when and why."""
        return self._paths.falls

    def statistics(self, network: NetworkName) -> Statistics:
        """What the probes of one network came to."""
        return self._paths.statistics(network)

    def adopt(self, pairs: Iterable[Pair]) -> None:
        """Take over peers that the kernel sends to by the fallback, from before the start."""
        self._paths.adopt(pairs, trio.current_time())

    def refresh(self) -> None:
        """Whom to probe may have changed."""
        self._stale = True

    async def run(self) -> None:
        """Probe for ever."""
        if self._prober is None:
            return
        look_at = trio.current_time()
        while True:
            if self._stale and trio.current_time() >= look_at:
                began = time.perf_counter()
                self._follow()
                took_s = time.perf_counter() - began
                look_at = trio.current_time() + max(_LOOK_S, took_s / _LOOK_SHARE)
            if self._targets:
                await self._tick(self._prober)
            await trio.sleep(_TICK_S if self._targets else _IDLE_S)

    def _follow(self) -> None:
        targets = self._look()
        if targets is None:
            return
        self._stale = False
        self._targets = targets
        self._paths.follow(targets.keys(), trio.current_time())

    async def _tick(self, prober: Prober) -> None:
        requests: dict[str, list[tuple[int, str, str, int]]] = {}
        networks = {pair[0]: target.tun for pair, target in self._targets.items()}
        for probe in self._paths.due(trio.current_time()):
            target = self._targets[probe.pair]
            requests.setdefault(target.tun, []).append(_to_request(probe, target))
        for network, tun in networks.items():
            if tun in requests or self._paths.waits_for(network):
                send = requests.get(tun, [])
                answers = await trio.to_thread.run_sync(prober.probe, tun, send)
                self._take(answers)
        moved = self._paths.settle(trio.current_time())
        if moved:
            self._log_moves(moved)
            self._on_move(moved)

    def _take(self, answers: Iterable[tuple[int, str, float]]) -> None:
        now = trio.current_time()
        for number, underlay_ip, rtt_ms in answers:
            pair = self._paths.pair_of(number)
            target = self._targets.get(pair) if pair is not None else None
            if target is not None and target.underlay_ip == underlay_ip:
                self._paths.answered(number, rtt_ms, now)

    def _log_moves(self, moved: Collection[HostId]) -> None:
        for host in sorted(moved)[:_LOGGED]:
            falls = [(name, fall) for (name, h), fall in self._paths.falls.items() if h == host]
            for name, fall in falls:
                _log.warning("peer in fallback", network=name, peer=host, reason=fall.why)
            if not falls:
                _log.info("peer by VXLAN again", peer=host)
        if len(moved) > _LOGGED:
            _log.warning("more peers go another way", peers=len(moved) - _LOGGED)


def _to_request(probe: Probe, target: Target) -> tuple[int, str, str, int]:
    way = "udp" if probe.way is Way.FALLBACK else "vxlan"
    size = 0 if probe.way is Way.SMALL else target.mtu_bytes
    return probe.id, target.underlay_ip, way, size
