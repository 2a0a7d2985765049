"""Counts what may grow in a mesh: memory, descriptors, threads, kernel objects, keys in etcd."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from meshnet.errors import MeshnetError
from meshnet.kernel.netns import inside
from meshnet.lab.process import netns_id, process_netns_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType
    from typing import Self

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

Points = list[tuple[float, float]]
Series = dict[str, Points]
"""By name ("h1: agent, RSS KiB"), seconds since the start and values."""

_PERIOD_S = 1.0
_COMMAND_EVERY = 5
"""Gauges that need a command are read only every so many samples."""
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024
_AF_BRIDGE = 7
_DUMPS = {
    # linux/rtnetlink.h: the request, and the family that its header begins with.
    "links": (18, socket.AF_UNSPEC),
    "addresses": (22, socket.AF_UNSPEC),
    "routes": (26, socket.AF_UNSPEC),
    "neighbours": (30, socket.AF_UNSPEC),
    "FDB entries": (30, _AF_BRIDGE),
    "nexthops": (106, socket.AF_UNSPEC),
}
_NLM_F_DUMP = 0x301  # with NLM_F_REQUEST
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr

TOLERANCES = {
    "RSS KiB": (0.1, 6144),
    "descriptors": (0.1, 8),
    "threads": (0.1, 4),
    "keys": (0.1, 8),
}
"""By kind of series, what it may grow by: a part of what it was, and so much more."""
_TOLERANCE_OF_OBJECTS = (0.1, 8)


def count_objects(sock: socket.socket, request: int, family: int) -> int:
    """How many objects a dump of the kernel has."""
    # Any of the requests' own headers begins with the family; 28 bytes are enough for the longest.
    body = struct.pack("=B27x", family)
    sock.send(_HEADER.pack(_HEADER.size + len(body), request, _NLM_F_DUMP, 1, 0) + body)
    count = 0
    while True:
        received, at = sock.recv(1 << 17), 0
        while at < len(received):
            length, kind, *_ = _HEADER.unpack_from(received, at)
            if kind == _NLMSG_DONE:
                return count
            if kind == _NLMSG_ERROR:
                raise OSError(-struct.unpack_from("=i", received, at + _HEADER.size)[0], "netlink")
            count += 1
            at += (length + 3) & ~3


def drifts(series: Series, seconds: float) -> list[str]:
    """Describe every series that is not flat, each in a sentence.

    Flat: the median of the last quarter is no more above that of the second quarter than its kind
    may be.  The first quarter is for what an agent learns and keeps.  What was hardly there (a
    host that came for a visit, a userspace VTEP of a network that did) is passed over.

    Args:
        seconds: how long it all took.
    """
    sentences = []
    all_samples = max(map(len, series.values()), default=0)
    for name, points in sorted(series.items()):
        early = _values(points, 0.25 * seconds, 0.5 * seconds)
        late = _values(points, 0.75 * seconds, seconds)
        kind = name.partition(": ")[2]
        most = max(len(other) for key, other in series.items() if key.partition(": ")[2] == kind)
        if min(len(early), len(late)) < max(most / 8, all_samples / (8 * _COMMAND_EVERY)):
            continue
        part, more = TOLERANCES.get(name.rpartition(", ")[2], _TOLERANCE_OF_OBJECTS)
        before, after = median(early), median(late)
        if after > before * (1 + part) + more:
            sentences.append(f"{name} grew from {before:g} to {after:g}")
    return sentences


def _values(points: Points, from_s: float, to_s: float) -> list[float]:
    return [value for at, value in points if from_s <= at < to_s]


class Gauges:
    """Reads all of a lab's gauges every second, in a thread, while it is entered.

    Attributes:
        series: what was read.
        seconds: how long it took.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gauges", daemon=True)
        self._sockets: dict[str, tuple[tuple[int, int] | None, socket.socket]] = {}
        self._began = time.monotonic()
        self.series: Series = {}
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._began
        for _, sock in self._sockets.values():
            sock.close()

    def _run(self) -> None:
        number = 0
        while not self._over.wait(_PERIOD_S):
            # What is gone, or does not answer, because of a fault is not read this time.
            with contextlib.suppress(OSError, MeshnetError, subprocess.SubprocessError):
                self._sample(commands=number % _COMMAND_EVERY == 0)
            number += 1

    def _sample(self, *, commands: bool) -> None:
        for host in self._lab.hosts:
            with contextlib.suppress(OSError, MeshnetError, subprocess.SubprocessError):
                self._enter(host.name, self._of_host(host))
                if commands:
                    self._enter(host.name, {"nftables, elements and rules": _nft(host)})
        if commands:
            keys = self._lab.etcd.ctl("get", "", "--prefix", "--keys-only").split()
            self._enter("etcd", {"etcd, keys": len(keys)})

    def _enter(self, place: str, values: Mapping[str, float]) -> None:
        at = round(time.monotonic() - self._began, 1)
        for name, value in values.items():
            self.series.setdefault(f"{place}: {name}", []).append((at, value))

    def _of_host(self, host: LabHost) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, pid in _processes(host):
            directory = Path(f"/proc/{pid}")
            pages = int((directory / "statm").read_text().split()[1])
            values |= {
                f"{name}, RSS KiB": pages * _PAGE_KIB,
                f"{name}, descriptors": len(os.listdir(directory / "fd")),
                f"{name}, threads": len(os.listdir(directory / "task")),
            }
        sock = self._socket(host)
        for name, (request, family) in _DUMPS.items():
            values[f"kernel, {name}"] = count_objects(sock, request, family)
        return values

    def _socket(self, host: LabHost) -> socket.socket:
        """One in a host's namespace, made anew when the host was."""
        namespace = netns_id(host.netns_path)
        known = self._sockets.get(host.name)
        if known is not None and known[0] == namespace:
            return known[1]
        if known is not None:
            known[1].close()
        fd = os.open(host.netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with inside(fd):
                sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        finally:
            os.close(fd)
        sock.settimeout(5)
        self._sockets[host.name] = (namespace, sock)
        return sock


def _processes(host: LabHost) -> Iterator[tuple[str, int]]:
    """The agent and the VTEPs of a host."""
    yield "agent", host.agent_pid
    namespace = netns_id(host.netns_path)
    for name in os.listdir("/proc"):
        if not name.isdigit() or process_netns_id(int(name)) != namespace:
            continue
        command = Path(f"/proc/{name}/cmdline").read_bytes()
        if b"meshnet.vtep" in command:
            yield "VTEP", int(name)


def _nft(host: LabHost) -> int:
    document = json.loads(host.run(["nft", "-j", "list", "ruleset"]).stdout)
    sets = [item["set"] for item in document["nftables"] if "set" in item]
    maps = [item["map"] for item in document["nftables"] if "map" in item]
    rules = sum("rule" in item for item in document["nftables"])
    return rules + sum(len(found.get("elem", ())) for found in (*sets, *maps))
