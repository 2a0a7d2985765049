"""The program: ``python -m meshnet.vtep --tun mnv4097 --vni 4097 …``.

It serves one network in the network namespace it is started in, until SIGTERM or ``quit``, whoever
started it.  It becomes leader of a session of its own, and makes or takes up the TUN.  Once the
control socket answers, packets flow.

On the way out the TUN stays, with its addresses and routes, for the next process.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import select
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from meshnet.errors import MeshnetError, UsageError
from meshnet.vtep.control import Control
from meshnet.vtep.counters import Counters
from meshnet.vtep.engine import ENGINES, Parts
from meshnet.vtep.peers import Own, PeerTable, parse_ip, parse_unicast_mac
from meshnet.vtep.probe_exchange import ProbeExchange
from meshnet.vtep.rundir import RunDir
from meshnet.vtep.server import Server
from meshnet.vtep.tun import bring_up, open_tun
from meshnet.vtep.underlay_socket import open_underlay

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.vtep.engine import Engine

_SAVE_AFTER_S = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to end; returns the exit status (docs/cli.md)."""
    options = _parser().parse_args(argv)
    try:
        with contextlib.suppress(PermissionError):  # it leads a session already
            os.setsid()
        _Process(options).run()
    except MeshnetError as error:
        print(f"meshnet.vtep: {error}", file=sys.stderr)
        return error.exit_status
    return 0


class _Process:
    """Everything that is open, and the loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        version, _, local = parse_ip(options.local)
        if not 0 < options.vni < 1 << 24 or not 0 < options.port < 1 << 16:
            raise UsageError(f"VNI {options.vni} or port {options.port} is out of range")
        if not 576 <= options.mtu <= 65_457:
            raise UsageError(f"MTU {options.mtu} is not 576 to 65457")
        own = Own(options.vni, parse_unicast_mac(options.mac, "--mac"), options.port, version)
        self._rundir = RunDir(options.run_dir)
        self._table = PeerTable(own)
        problem = self._rundir.load(self._table)
        if problem is not None:
            print(f"meshnet.vtep: starting without members: {problem}", file=sys.stderr)
        tun = open_tun(options.tun)
        bring_up(options.tun, options.mtu)
        underlay = open_underlay(local, options.port)
        counters = Counters()
        self._tun, self._underlay = tun, underlay
        self._probes = ProbeExchange(underlay.socket, self._table, counters, options.vxlan_dev)
        self._poll = select.epoll()
        parts = Parts(
            tun, underlay, self._table, counters, options.mtu, self._probes, self._poll.fileno()
        )
        self._engine = _make_engine(options.engine, parts)
        status = {
            "pid": os.getpid(),
            "config": {
                "tun": options.tun,
                "vni": options.vni,
                "port": options.port,
                "local": local,
                "mac": own.mac.hex(":"),
                "mtu": options.mtu,
                "engine": options.engine,
            },
            "offloads": {
                "uso": tun.uso,
                "udp_segment": underlay.segmenting,
                "udp_gro": underlay.receiving_trains,
            },
        }
        self._control = Control(
            self._table, counters, status, self._probes, self._engine.collect, self._changed
        )
        self._save_at: float | None = None
        self._server = Server(self._rundir.control_path, self._poll, self._control.answer)

    def run(self) -> None:
        """Carry packets until told to end."""
        wake, waker = socket.socketpair()
        wake.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        # Nothing on a packet's way makes cycles; a collection would only stop the traffic.
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            self._loop(wake)
        finally:
            signal.set_wakeup_fd(-1)
            wake.close()
            waker.close()
            self.close()

    def close(self) -> None:
        """Close everything; the TUN and the members stay."""
        self._save()
        self._server.close()
        self._engine.close()
        self._poll.close()
        self._probes.close()
        self._underlay.socket.close()
        os.close(self._tun.fd)
        self._rundir.close()

    def _loop(self, wake: socket.socket) -> None:
        """Packets are the engine's; what else happens is dealt with in between."""
        wake_fd, probes = wake.fileno(), self._probes.packet_socket
        probe_fd = wake_fd if probes is None else probes.fileno()
        for fd in {wake_fd, probe_fd}:
            self._poll.register(fd, select.EPOLLIN)
        while True:
            left = None if self._save_at is None else max(0.0, self._save_at - time.monotonic())
            self._engine.run(left)
            for fd, events in self._poll.poll(0):
                if fd == wake_fd:
                    return
                if fd == probe_fd:
                    self._probes.receive()
                    continue
                self._server.handle(fd, events)
                if self._control.quitting:
                    return
            if self._save_at is not None and time.monotonic() >= self._save_at:
                self._save()

    def _changed(self) -> None:
        """The members changed: write them down soon, all changes of a moment at once."""
        self._engine.members_changed()
        if self._save_at is None:
            self._save_at = time.monotonic() + _SAVE_AFTER_S

    def _save(self) -> None:
        if self._save_at is not None:
            self._save_at = None
            try:
                self._rundir.save(self._table)
            except OSError as error:
                print(f"meshnet.vtep: members not written down: {error}", file=sys.stderr)


def _make_engine(name: str, parts: Parts) -> Engine:
    """The engine of that name, one of `ENGINES`.

    Raises:
        NotFoundError: the native one is not built.
        KernelRefusedError: the kernel refused.
    """
    # Each is imported only where it is wanted: the one in Python needs neither ctypes nor hashlib,
    # and the process is to start within milliseconds.
    if name == "python":
        from meshnet.vtep.python.engine import PythonEngine

        return PythonEngine(parts)
    from meshnet.vtep.native.engine import NativeEngine

    return NativeEngine(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m meshnet.vtep", description=__doc__)
    parser.add_argument("--tun", required=True, help="name of the TUN device")
    parser.add_argument("--vni", required=True, type=int, help="VXLAN network identifier")
    parser.add_argument("--port", type=int, default=4789, help="UDP port, here and at peers")
    parser.add_argument("--local", required=True, help="underlay address of this host")
    parser.add_argument("--mac", required=True, help="MAC address of this VTEP")
    parser.add_argument("--mtu", required=True, type=int, help="MTU of the overlay")
    parser.add_argument("--vxlan-dev", help="the kernel's VXLAN device, for probes by it")
    parser.add_argument("--engine", choices=ENGINES, default="python", help="what carries packets")
    parser.add_argument("--run-dir", required=True, help="lock, control socket and state")
    return parser
