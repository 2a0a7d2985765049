"""Hosts to test kernels on: a fake one, and two real network namespaces joined by a veth pair.

The real one's code runs in a thread that has entered the namespace; the thread that runs the tests
never leaves its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from meshnet.firewall.rules import FAMILIES
from meshnet.kernel.elements import WiredElements
from meshnet.kernel.fakes.kernel import MemoryKernel
from meshnet.kernel.netlink import NetlinkKernel
from meshnet.kernel.netns import inside
from tests.values import underlay_ip

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from meshnet.backends import Underlay, UnderlayPath
    from meshnet.kernel import Kernel
    from meshnet.kernel.events import NeighbourId
    from meshnet.model import IpAddress
    from meshnet.state import KernelState
    from meshnet.tables import Failure, Op

T = TypeVar("T")
R = TypeVar("R")
UNDERLAY_DEV = "und0"
UNDERLAY_IPS = (underlay_ip(1, 4), underlay_ip(1, 6))
OUR_TABLES = tuple(f"{family} meshnet {{" for family in FAMILIES)
_counter = itertools.count()


def ip(*arguments: str, script: str = "") -> str:
    """Run iproute2's ``ip``; returns what it prints."""
    done = subprocess.run(
        ["ip", *arguments], input=script, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"ip {arguments} {script}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def namespace() -> Iterator[tuple[str, int]]:
    """Make a network namespace; give its name and descriptor, and remove it at the end."""
    name = f"mnt{os.getpid()}x{next(_counter)}"
    ip("netns", "add", name)
    try:
        fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield name, fd
        finally:
            os.close(fd)
    finally:
        ip("netns", "del", name)


@contextlib.contextmanager
def host_namespace() -> Iterator[tuple[str, int]]:
    """A namespace with an underlay: ``und0``, with a neighbour at the other end."""
    with namespace() as (name, fd), namespace() as (peer, _):
        ip("-n", name, "link", "add", UNDERLAY_DEV, "type", "veth", "peer", "und1", "netns", peer)
        ip("-n", peer, "link", "set", "und1", "up")
        ip(
            "-n", name, "-batch", "-",
            script=f"link set lo up\n"
            f"address add {UNDERLAY_IPS[0]}/24 dev {UNDERLAY_DEV}\n"
            f"address add {UNDERLAY_IPS[1]}/64 dev {UNDERLAY_DEV} nodad\n"
            f"link set {UNDERLAY_DEV} up\n"
            f"route add 10.99.0.0/16 via 10.9.0.254 mtu 1400\n",
        )  # fmt: skip
        yield name, fd


class Inside(Generic[T]):
    """A thread in a network namespace that owns one object."""

    def __init__(self, fd: int, make: Callable[[], T]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._stack = contextlib.ExitStack()
        try:
            self._pool.submit(self._stack.enter_context, inside(fd)).result()
            self._owned = self._pool.submit(make).result()
        except BaseException:
            self._pool.shutdown()
            raise

    def call(self, function: Callable[[T], R]) -> R:
        return self._pool.submit(function, self._owned).result()

    def close(self, close: Callable[[T], None]) -> None:
        self.call(close)
        self._pool.submit(self._stack.close).result()
        self._pool.shutdown()


class HostUnderTest(Protocol):
    """A kernel, and what a test needs to do behind its back."""

    kernel: Kernel

    @property
    def wired(self) -> WiredElements:
        """What its wiring would tell it of endpoints."""
        ...

    def by_hand(self, *commands: str, in_memory: Callable[[MemoryKernel], None]) -> None:
        """Change something as another program would."""
        ...

    def others(self) -> str:
        """All that is not meshnet's, as text to compare."""
        ...


class RealHost:
    """`NetlinkKernel` in a namespace; it is a `Kernel` itself, callable from any thread."""

    def __init__(
        self, name: str, fd: int, directory: Path, *, nexthop_objects: bool | None = None
    ) -> None:
        self.name = name
        self.wired = WiredElements()
        self._thread = Inside(
            fd,
            lambda: NetlinkKernel(
                directory / "firewall.json", self.wired, nexthop_objects=nexthop_objects
            ),
        )
        self.kernel: Kernel = self

    @property
    def writes(self) -> int:
        return self._thread.call(lambda k: k.writes)

    def observe(self, underlay_ip: IpAddress | None, underlay_dev: str | None) -> Underlay:
        return self._thread.call(lambda k: k.observe(underlay_ip, underlay_dev))

    def find_paths(self, addresses: Collection[IpAddress]) -> dict[IpAddress, UnderlayPath]:
        return self._thread.call(lambda k: k.find_paths(addresses))

    def link_indices(self) -> Mapping[str, int]:
        return self._thread.call(lambda k: k.link_indices())

    def dump(self) -> KernelState:
        return self._thread.call(lambda k: k.dump())

    def apply(
        self, ops: Sequence[Op], on_written: Callable[[int], None] | None = None
    ) -> list[Failure]:
        return self._thread.call(lambda k: k.apply(ops, on_written))

    @property
    def port_id(self) -> int:
        return self._thread.call(lambda k: k.port_id)

    @property
    def nft_port_id(self) -> int:
        return self._thread.call(lambda k: k.nft_port_id)

    @property
    def deleted(self) -> set[NeighbourId]:
        return self._thread.call(lambda k: k.deleted)

    def close(self) -> None:
        self._thread.close(lambda k: k.close())

    def shell(self, command: str) -> None:
        """Run a command in the namespace."""
        self._thread.call(lambda _: subprocess.run(["sh", "-ec", command], check=True))

    def by_hand(self, *commands: str, in_memory: Callable[[MemoryKernel], None]) -> None:
        for command in commands:
            self.shell(command)

    def others(self) -> str:
        found = ip("-n", self.name, "-o", "link", "show", "type", "tun")
        for family in ("-4", "-6"):
            found += ip("-n", self.name, family, "route", "show", "table", "all", "proto", "42")
        found += ip("-n", self.name, "nexthop", "show", "proto", "42")
        ruleset = self._thread.call(
            lambda _: (
                subprocess.run(
                    ["nft", "list", "ruleset"], capture_output=True, text=True, check=True
                ).stdout
            )
        )
        tables = f"\n{ruleset}".split("\ntable ")[1:]
        return found + "".join(t.strip() for t in tables if not t.startswith(OUR_TABLES))


class MemoryHost:
    """`MemoryKernel`, with the same underlay."""

    def __init__(self, *, nexthop_objects: bool = True) -> None:
        self.memory = MemoryKernel(*UNDERLAY_IPS, dev=UNDERLAY_DEV, nexthop_objects=nexthop_objects)
        self.kernel: Kernel = self.memory

    @property
    def wired(self) -> WiredElements:
        return self.memory.wired

    def by_hand(self, *commands: str, in_memory: Callable[[MemoryKernel], None]) -> None:
        in_memory(self.memory)

    def others(self) -> str:
        return repr(self.memory.foreign)


@contextlib.contextmanager
def real_host(directory: Path, *, nexthop_objects: bool | None = None) -> Iterator[RealHost]:
    with host_namespace() as (name, fd):
        host = RealHost(name, fd, directory, nexthop_objects=nexthop_objects)
        try:
            yield host
        finally:
            host.close()
