"""Probes both tunnels to peers of networks with a fallback, and marks peers that change tunnels.

`meshnet_agent.dataplane.fallback` decides.  The userspace VTEPs' processes send the probes, answer
those of other hosts and measure the time, so that neither a busy agent nor one that is restarted
looks like a dead tunnel (`meshnet.vtep.probe_exchange`).  A worker thread talks to the process, so
that the event loop stays free.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

import structlog
import trio

from meshnet_agent.dataplane.fallback import ProbeKind
from meshnet_agent.mesh.view import MeshListener

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from meshnet.model import MeshSnapshot
    from meshnet.store.mirror import Changes
    from meshnet_agent.dataplane.dirty import Dirty
    from meshnet_agent.dataplane.fallback import Fallback, Pair, Probe
    from meshnet_agent.dataplane.inputs import PassInputs, Target
    from meshnet_agent.dataplane.pass_values import PassResult

_log = structlog.get_logger()
_TICK_S = 0.1
_IDLE_S = 1.0
_LOOK_S, _LOOK_SHARE = 1.0, 0.02
"""Least seconds between two computations of the peers to probe, and the largest share of all time
that they may take: with 10,000 peers one takes 20 ms, whenever hosts come or go."""
_LOGGED = 20


class ProbeSender(Protocol):
    """Sends probes through the process of a TUN (`meshnet.kernel.vteps.VtepProcesses`)."""

    def probe(
        self, tun: str, requests: Sequence[tuple[int, str, str, int]]
    ) -> list[tuple[int, str, float]]:
        """Send probes; returns the answers that came since the last call.  Blocks.

        Args:
            tun: name of the TUN device.
            requests: probe id, underlay address, tunnel ("vxlan" or "udp") and size in bytes (0:
                as small as possible).

        Returns:
            Probe id, underlay address that answered, round-trip time in milliseconds.
        """
        ...


class Probes(MeshListener):
    """Runs the probes of all networks.

    Args:
        sender: sends the probes; None: nothing is probed, and peers in fallback stay there.
        fallback: gets the answers, and decides.
        dirty: marked with the hosts whose packets have to leave by the other tunnel.
    """

    def __init__(
        self, sender: ProbeSender | None, inputs: PassInputs, fallback: Fallback, dirty: Dirty
    ) -> None:
        self._sender = sender
        self._inputs = inputs
        self._fallback = fallback
        self._dirty = dirty
        self._result: PassResult | None = None
        self._targets: Mapping[Pair, Target] = {}
        self._stale = True

    def mesh_changed(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        """See `MeshListener`."""
        self._stale = True

    def passed(self, result: PassResult) -> None:
        """See `PassListener`: which peers are on-link may have changed."""
        self._result = result
        self._stale = True

    async def run(self) -> None:
        """Probe.  Never returns, except where there is no sender."""
        if self._sender is None:
            return
        look_at = trio.current_time()
        while True:
            if self._stale and trio.current_time() >= look_at:
                began = time.perf_counter()
                self._follow()
                took_s = time.perf_counter() - began
                look_at = trio.current_time() + max(_LOOK_S, took_s / _LOOK_SHARE)
            if self._targets:
                await self._tick(self._sender)
            await trio.sleep(_TICK_S if self._targets else _IDLE_S)

    def _follow(self) -> None:
        targets = self._inputs.probe_targets(self._result) if self._result is not None else None
        if targets is None:
            return  # not known now: go on with the same peers
        self._stale = False
        self._targets = targets
        self._fallback.follow(targets.keys(), trio.current_time())

    async def _tick(self, sender: ProbeSender) -> None:
        requests: dict[str, list[tuple[int, str, str, int]]] = {}
        networks = {pair[0]: target.tun for pair, target in self._targets.items()}
        for probe in self._fallback.due(trio.current_time()):
            target = self._targets[probe.pair]
            requests.setdefault(target.tun, []).append(_to_request(probe, target))
        for network, tun in networks.items():
            if tun in requests or self._fallback.waits_for(network):
                send = requests.get(tun, [])
                answers = await trio.to_thread.run_sync(sender.probe, tun, send)
                self._note(answers)
        moved = self._fallback.settle(trio.current_time())
        if moved:
            self._log_moves(moved)
            self._dirty.touch({host for _, host in moved})

    def _note(self, answers: Iterable[tuple[int, str, float]]) -> None:
        now = trio.current_time()
        for number, underlay_ip, rtt_ms in answers:
            pair = self._fallback.pair_of(number)
            target = self._targets.get(pair) if pair is not None else None
            # An answer from another address is not the peer's: its host may have moved meanwhile.
            if target is not None and target.underlay_ip == underlay_ip:
                self._fallback.answered(number, rtt_ms, now)

    def _log_moves(self, moved: Collection[Pair]) -> None:
        for network, host in sorted(moved)[:_LOGGED]:
            fall = self._fallback.falls.get((network, host))
            if fall is not None:
                _log.warning("peer in fallback", network=network, peer=host, reason=fall.why)
            else:
                _log.info("peer by VXLAN again", network=network, peer=host)
        if len(moved) > _LOGGED:
            _log.warning("more peers moved", peers=len(moved) - _LOGGED)


def _to_request(probe: Probe, target: Target) -> tuple[int, str, str, int]:
    tunnel = "udp" if probe.kind is ProbeKind.FALLBACK else "vxlan"
    size = 0 if probe.kind is ProbeKind.SMALL else target.mtu_bytes
    return probe.id, target.underlay_ip, tunnel, size
