"""The userspace VTEPs of this host: starting, asking, telling and ending their processes.

Job: the client's side of `meshnet.vtep.control`, for `meshnet.kernel.netlink`.  A process outlives
the agent that started it; the one that holds a TUN's run directory serves that TUN.  Calls block
the kernel's thread, at most `_TIMEOUT_S` at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any, NamedTuple

from meshnet.errors import KernelRefusedError
from meshnet.state import Member, MemberKey, Vxlan, format_ip, format_mac
from meshnet.wire.mac import parse_mac

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from meshnet.tables import Op

_TIMEOUT_S = 2.0
_START_S = 20.0
"""An emulated machine, or one that boots, takes 6 s to start Python; a healthy one 0.2 s."""


class Vtep(NamedTuple):
    """A running process, as it describes itself."""

    pid: int
    vxlan: Vxlan
    mac: bytes
    mtu_bytes: int
    engine: str


class VtepProcesses:
    """The processes, by the names of their TUNs.

    Args:
        directory: holds a run directory for each, with a socket in it, so its path must be short
            (``sun_path`` has 108 bytes).
        engine: what carries the packets of new ones (`meshnet.vtep.engine`).
        replaced: whether processes that run with another engine are replaced.

    Attributes:
        engine: as in Args.
    """

    def __init__(self, directory: Path, engine: str = "python", *, replaced: bool = True) -> None:
        self._directory, self.engine = directory.absolute(), engine
        self._replaced = replaced
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def look(self, tun: str) -> Vtep | None:
        """The process that serves a TUN; None: no process answers."""
        try:
            status = self._ask(tun, {"op": "status"})
            config = status["config"]
            return Vtep(
                int(status["pid"]),
                Vxlan(config["vni"], config["port"], ip_address(config["local"]).packed),
                parse_mac(config["mac"]),
                config["mtu"],
                config.get("engine", "python"),  # one that an older agent started says nothing
            )
        except (OSError, KernelRefusedError, ValueError, KeyError, TypeError):
            return None

    def accepts(self, vtep: Vtep) -> bool:
        """Whether a running process has an engine that it may keep."""
        return vtep.engine == self.engine or not self._replaced

    def members(self, tun: str) -> dict[MemberKey, Member]:
        """The members that the process of a TUN talks to; empty if it does not answer."""
        try:
            peers = self._ask(tun, {"op": "peers"})["peers"]
            return dict(_from_document(tun, peer) for peer in peers)
        except (OSError, KernelRefusedError, ValueError, KeyError, TypeError):
            return {}

    def counters(self, tun: str) -> dict[str, Any]:
        """What the process has counted (`meshnet.vtep.control`); empty if it does not answer."""
        try:
            return self._ask(tun, {"op": "counters"})
        except (OSError, KernelRefusedError, ValueError):
            return {}

    def probe(
        self, tun: str, requests: Sequence[tuple[int, str, str, int]]
    ) -> list[tuple[int, str, float]]:
        """Have probes sent, and fetch the answers since the last call.

        `meshnet.vtep.probe_exchange` is the other end.

        Returns:
            Nothing if the process does not answer.
        """
        try:
            answers = self._ask(tun, {"op": "probe", "send": requests})["answers"]
            return [(int(i), str(ip), float(ms)) for i, ip, ms in answers]
        except (OSError, KernelRefusedError, ValueError, KeyError, TypeError):
            return []

    def start(self, tun: str, vxlan: Vxlan, mac: bytes, mtu_bytes: int) -> None:
        """Start a process that serves a TUN, in place of the one that did, if any.

        Raises:
            KernelRefusedError: it did not come up; the message has its last line of log.
        """
        # First: a new process refuses to start while another holds the run directory.
        self.stop(tun)
        argv, log_path = self.prepare(tun, vxlan, mac, mtu_bytes)
        with log_path.open("wb") as log:
            child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._children[tun] = child
        deadline = time.monotonic() + _START_S
        while self.look(tun) is None:
            if child.poll() is not None or time.monotonic() > deadline:
                words = log_path.read_text(errors="replace").strip().splitlines()
                if not words and child.poll() is None:
                    raise KernelRefusedError(
                        f"userspace VTEP of {tun} is not ready after {_START_S:.0f} s: this host "
                        "is busy, and it is tried again"
                    )
                reason = words[-1] if words else f"it ended with status {child.poll()}"
                raise KernelRefusedError(f"userspace VTEP of {tun} did not start: {reason}")
            time.sleep(0.005)

    def prepare(self, tun: str, vxlan: Vxlan, mac: bytes, mtu_bytes: int) -> tuple[list[str], Path]:
        """Make the run directory of a TUN; returns the command to serve it, and a file to log to.

        Benchmarks start the process themselves; everybody else calls `start`.
        """
        run_dir = self._directory / tun
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        argv = [
            *(sys.executable, "-m", "meshnet.vtep", "--tun", tun),
            *("--vni", str(vxlan.vni), "--port", str(vxlan.port)),
            *("--local", format_ip(vxlan.local), "--mac", format_mac(mac)),
            *("--mtu", str(mtu_bytes), "--run-dir", str(run_dir), "--engine", self.engine),
            *("--vxlan-dev", f"mnv{vxlan.vni}"),
        ]
        return argv, run_dir / "log"

    def stop(self, tun: str) -> None:
        """End the process of a TUN, if there is one; the device stays."""
        running = self.look(tun)
        if running is not None:
            with contextlib.suppress(OSError, KernelRefusedError, ValueError):
                self._ask(tun, {"op": "quit"})
            _wait_for_end(running.pid)
        child = self._children.pop(tun, None)
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=_TIMEOUT_S)

    def update(self, tun: str, ops: Iterable[Op]) -> None:
        """Carry out operations on members, all or none.

        Raises:
            KernelRefusedError: the process refused them, or does not answer.
        """
        sets = [_to_document(op.key, op.value) for op in ops if op.value is not None]
        removed = [format_ip(op.key.underlay_ip) for op in ops if op.value is None]
        try:
            self._ask(tun, {"op": "update", "set": sets, "remove": removed})
        except (OSError, ValueError) as error:
            raise KernelRefusedError(f"userspace VTEP of {tun} does not answer: {error}") from error

    def _ask(self, tun: str, request: Mapping[str, Any]) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(_TIMEOUT_S)
            control.connect(str(self._directory / tun / "control.sock"))
            control.sendall(json.dumps({"v": 1, **request}).encode() + b"\n")
            with control.makefile("rb") as lines:
                answer: dict[str, Any] = json.loads(lines.readline() or b"null") or {}
        if not answer.get("ok"):
            raise KernelRefusedError(
                f"userspace VTEP of {tun}: {answer.get('error', 'it ended before it answered')}"
            )
        return answer


def _wait_for_end(pid: int) -> None:
    """Wait until a process has ended, and kill it if it takes too long."""
    # A pidfd: it may be an earlier agent's child, so waitpid(2) does not help, and a pid may be
    # reused before the signal.
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        ended = select.poll()
        ended.register(fd, select.POLLIN)
        if not ended.poll(_TIMEOUT_S * 1000):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            ended.poll(_TIMEOUT_S * 1000)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)


def _to_document(key: MemberKey, member: Member) -> dict[str, Any]:
    return {
        "underlay_ip": format_ip(key.underlay_ip),
        "mac": format_mac(member.mac),
        "subnets": [f"{format_ip(prefix)}/{length}" for prefix, length in member.subnets],
        "port": member.port,
        "offload": member.offload,
    }


def _from_document(tun: str, document: Mapping[str, Any]) -> tuple[MemberKey, Member]:
    subnets = [ip_network(subnet) for subnet in document["subnets"]]
    member = Member(
        parse_mac(document["mac"]),
        tuple((s.network_address.packed, s.prefixlen) for s in subnets),
        document["port"],
        document["offload"],
    )
    return MemberKey(tun, ip_address(document["underlay_ip"]).packed), member
