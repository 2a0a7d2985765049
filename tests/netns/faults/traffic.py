"""Runs traffic across a fault mesh, and judges what becomes of it."""

from __future__ import annotations

import itertools
import time
from ipaddress import ip_interface
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from tests.netns.faults.evidence import Endpoint, Evidence, Verdict, judge
from tests.netns.faults.probing import Matrix, PathId
from tests.netns.faults.streams import Streams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from tests.netns.faults.evidence import Cut
    from tests.netns.faults.mesh import FaultMesh, Member

PERIOD_US = 4000
_SOFTNET = Path("/proc/net/softnet_stat")


class Traffic:
    """Datagrams between all endpoints of a mesh, and streams between some.

    Attributes:
        endpoints: all there ever were, by id.
    """

    def __init__(self, mesh: FaultMesh, period_us: int = PERIOD_US) -> None:
        self._mesh = mesh
        self._period_ns = period_us * 1000
        self._ids = itertools.count(1)
        self._network_ids: dict[str, int] = {}
        self._present: list[Endpoint] = []
        self._expected: dict[PathId, int] = {}
        self._matrix = Matrix(period_us)
        self._streams = Streams()
        self._drops = self._overruns = 0
        self._judged_ns = time.monotonic_ns()
        self.endpoints: dict[int, Endpoint] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def sent(self) -> int:
        """Datagrams sent so far, as `judge` saw them."""
        return self._matrix.sent

    def follow(self) -> None:
        """Let exactly the endpoints that the mesh has now take part.

        Call `leave` first for an endpoint that is removed in order: then nothing of it counts.
        """
        members = [member for member in self._mesh.members if member.container.is_alive()]
        gone = [endpoint for endpoint in self._present if endpoint.member not in members]
        known = [endpoint.member for endpoint in self._present]
        self._change([member for member in members if member not in known], gone)

    def leave(self, member: Member) -> None:
        """Exclude a member that is about to be removed."""
        self._matrix.collect()
        self._streams.collect()
        found = [endpoint for endpoint in self._present if endpoint.member is member]
        self._change([], found)

    def wait_flowing(self, deadline_s: float) -> float:
        """Wait until something sent after this call has arrived on every path.

        From then on all must.

        Returns:
            Seconds that it took.

        Raises:
            TimeoutError: it did not; the text names the paths.
        """
        began_ns = time.monotonic_ns()
        silent: list[PathId] = []
        received: dict[PathId, tuple[int, int]] = {}

        def flowing() -> bool:
            received.update(self._matrix.read().received)
            silent[:] = [
                path for path in self._matrix.paths() if received.get(path, (0, 0))[1] < began_ns
            ]
            return not silent

        try:
            wait_until(flowing, deadline_s, "datagrams arrive on every path")
        except TimeoutError as exc:
            names = ", ".join(
                f"{self.endpoints[path.source]} to {self.endpoints[path.target]} IPv{path.version}"
                for path in silent
            )
            raise TimeoutError(f"nothing arrives within {deadline_s:g} s from {names}") from exc
        for path in self._matrix.paths():
            self._expected.setdefault(path, received[path][1])
        return (time.monotonic_ns() - began_ns) / 1e9

    def wait_streams(self, deadline_s: float) -> None:
        """Wait until a block sent after this call has arrived on every stream.

        Raises:
            TimeoutError: it did not.
        """
        began_ns = time.monotonic_ns()
        wait_until(
            lambda: all(last_ns > began_ns for last_ns in self._streams.collect().values()),
            deadline_s,
            "blocks arrive on every TCP stream",
        )

    def judge(self, cuts: Sequence[Cut] = ()) -> Verdict:
        """Judge all that was seen since the last call, or since the beginning."""
        until_ns = time.monotonic_ns()
        self._matrix.collect()
        self._streams.collect()
        evidence = Evidence(
            self._matrix.new_losses(self.endpoints, self._expected),
            self._matrix.strays,
            self._streams.events,
        )
        drops, overruns = _machine_drops(), self._matrix.overruns
        evidence.machine_drops = drops - self._drops
        evidence.overruns = overruns - self._overruns
        self._drops, self._overruns = drops, overruns
        self._matrix.strays, self._streams.events = [], []
        self._judged_ns = until_ns
        return judge(evidence, cuts, self.endpoints, self._period_ns)

    def stop(self) -> None:
        """End it all."""
        self._matrix.stop()
        self._streams.stop()

    def _change(self, come: Sequence[Member], gone: list[Endpoint]) -> None:
        now_ns = time.monotonic_ns()
        for endpoint in gone:
            endpoint.ended_ns = now_ns if endpoint.member.container.is_alive() else self._judged_ns
            self._present.remove(endpoint)
            self._matrix.remove(endpoint)
        for network in {endpoint.member.network for endpoint in gone}:
            # One that is made anew is another one.
            if not any(found.member.network == network for found in self._present):
                del self._network_ids[network]
        newcomers = [self._make_endpoint(member, now_ns) for member in come]
        for endpoint in newcomers:
            self._matrix.add(endpoint)
        self._streams.change(newcomers, gone)

    def _make_endpoint(self, member: Member, now_ns: int) -> Endpoint:
        addresses = [
            ip_interface(member.document[key]).ip
            for key in ("address", "address6")
            if member.document.get(key)
        ]
        network_id = self._network_ids.setdefault(member.network, next(self._ids))
        endpoint = Endpoint(
            next(self._ids),
            member,
            network_id,
            {address.version: str(address) for address in addresses},
            now_ns,
        )
        self.endpoints[endpoint.id] = endpoint
        self._present.append(endpoint)
        return endpoint


def _machine_drops() -> int:
    """Packets that per-CPU queues had no room for, of the whole machine, since it started."""
    # Second column: `dropped` of struct softnet_data (net/core/net-procfs.c).
    return sum(int(line.split()[1], 16) for line in _SOFTNET.read_text().splitlines())
