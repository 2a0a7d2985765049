"""The control protocol: one JSON object a line, each way, over a Unix stream socket.

Request: ``{"v": 1, "op": OP, …}``; an ``id`` of any kind comes back in the answer.

=============  ==========================================  ====================================
``op``         further keys                                answer, beside ``v``, ``ok``, ``id``
=============  ==========================================  ====================================
``replace``    ``peers``: all of them                      ``peers``: how many there are
``update``     ``set``: peers, ``remove``: underlay IPs    ``peers``
``peers``                                                  ``peers``: the list
``counters``                                               ``peers``: list, ``drops``, totals
``probe``      ``send``: probes                            ``answers``: those since the last
``status``                                                 ``pid``, ``config``, ``peers``, …
``quit``                                                   nothing; the process ends
=============  ==========================================  ====================================

A peer is ``{"underlay_ip", "mac", "subnets": [CIDR, …], "port"?, "offload"?}``.  ``port`` is by
default the process's own.  ``offload``: the peer takes unfinished inner checksums (remote checksum
offload, `meshnet.wire.vxlan`): a peer that is this program does, and a kernel's VXLAN device that
was made with ``remcsumrx``; others do not.

A probe is ``[id, underlay_ip, "udp" or "vxlan", bytes]`` and an answer ``[id, underlay_ip, ms]``
(`meshnet.vtep.probe_exchange`).

An error is ``{"v": 1, "ok": false, "error": TEXT}``, and nothing was changed.  The connection stays
open, except after a line that is too long.

Pure: `answer` does no I/O; the caller owns the sockets.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from meshnet.errors import MeshnetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.vtep.counters import Counters
    from meshnet.vtep.peers import PeerTable
    from meshnet.vtep.probe_exchange import ProbeExchange

VERSION = 1
MAX_LINE_BYTES = 64 << 20
"""30,000 peers are about 5 MB."""


class Control:
    """Answers requests.

    Attributes:
        quitting: somebody asked the process to end.
    """

    def __init__(
        self,
        table: PeerTable,
        counters: Counters,
        status: dict[str, Any],
        probes: ProbeExchange,
        collect: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        """Take what requests are about.

        Args:
            status: what ``status`` is to say beside the number of peers.
            collect: called before members are changed, or counters looked at.
            changed: called after the members changed.
        """
        self._table, self._counters, self._status = table, counters, status
        self._probes, self._collect, self._changed = probes, collect, changed
        self.quitting = False

    def answer(self, line: bytes) -> bytes:
        """The answer to a line, with its newline.  Never raises for what is in the line."""
        found: dict[str, Any] = {"v": VERSION}
        try:
            request = self._parse(line)
            if "id" in request:
                found["id"] = request["id"]
            found |= {"ok": True, **self._do(request)}
        except MeshnetError as error:
            found |= {"ok": False, "error": str(error)}
        return json.dumps(found, separators=(",", ":")).encode() + b"\n"

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"request is not JSON: {str(error)[:80]}") from error
        if not isinstance(request, dict):
            raise UsageError("request is not a JSON object")
        if request.get("v") != VERSION:
            raise UsageError(f"request version {request.get('v')!r:.40}: this process speaks 1")
        return request

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        op = request.get("op")
        if op in ("replace", "update", "counters"):
            self._collect()
        if op == "replace":
            self._table.replace(_list(request, "peers"))
        elif op == "update":
            if "set" not in request and "remove" not in request:
                raise UsageError("update: give 'set', 'remove' or both")
            self._table.update(
                _list(request, "set", default=True), _list(request, "remove", default=True)
            )
        elif op == "peers":
            return {"peers": [peer.document for peer in self._table.by_underlay.values()]}
        elif op == "counters":
            return self._count()
        elif op == "probe":
            self._probes.send(_list(request, "send"))
            return {"answers": self._probes.drain_answers()}
        elif op == "status":
            return {**self._status, "peers": len(self._table.by_underlay)}
        elif op == "quit":
            self.quitting = True
            return {}
        else:
            raise UsageError(
                f"op {op!r:.40}: use replace, update, peers, counters, probe, status or quit"
            )
        self._changed()
        return {"peers": len(self._table.by_underlay)}

    def _count(self) -> dict[str, Any]:
        peers = [peer.counters() for peer in self._table.by_underlay.values()]
        totals: dict[str, Any] = {
            key: sum(peer[key] for peer in peers)
            for key in ("rx_packets", "rx_bytes", "rx_calls", "tx_packets", "tx_bytes", "tx_calls")
        }
        for way in ("rx", "tx"):
            calls = totals[f"{way}_calls"]
            totals[f"{way}_packets_per_call"] = totals[f"{way}_packets"] / calls if calls else 0.0
        return {"peers": peers, "drops": self._counters.drops, "totals": totals}


def _list(request: dict[str, Any], key: str, *, default: bool = False) -> list[Any]:
    value = request.get(key, [] if default else None)
    if not isinstance(value, list):
        raise UsageError(f"{request.get('op')}: {key!r} is not a list")
    return value
