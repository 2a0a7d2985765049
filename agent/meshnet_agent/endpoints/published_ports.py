"""Published ports of this host: who has which, and how the host's own processes are kept off.

A packet for a published port is translated before it reaches any socket, so a process of the host
that listens there would silently hear nothing.  So the agent refuses a port that a process has, and
holds each published port by a bound socket that does not listen: a process that wants the port
later gets an error from the kernel.  The sockets never see a packet.  A publication works without
them, and so outlives the agent.  If a process took a port while no agent ran, the next agent says
so in ``status`` and tries again until the port is free (docs/design/published-ports.md).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import structlog
import trio

from meshnet.errors import ConflictError, KernelRefusedError, NotFoundError
from meshnet.model import Protocol as Transport
from meshnet.ports import ANY_PORT, Binding, bindings_of, check_count
from meshnet_agent.tasks.flag import Flag

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from meshnet.model import Endpoint, IpAddress, PublishedPort
    from meshnet_agent.dataplane.view import DataplaneView

_log = structlog.get_logger()
_SETTLE_S = 30.0
"""Many times what a pass over everything takes; after that the agent gives up."""
_HOLD_AGAIN_S = 2.0
"""Time between two tries to hold a port that a process has: it may close it at any time."""
_TRIES = 16
"""How many ports to try where any will do: one may be free in a single IP version only."""
_TCP_TIME_WAIT = 6
"""linux/tcp_states.h: the connection is over, and no process has it."""


class HeldPort(Protocol):
    """A port that the kernel gives to nobody else until it is closed."""

    @property
    def port(self) -> int:
        """Its number."""
        ...

    def close(self) -> None:
        """Let others have it."""
        ...


class HostPorts(Protocol):
    """The ports of the host's own network namespace."""

    def hold(self, binding: Binding) -> HeldPort:
        """Take a port; the number `ANY_PORT` stands for any that is free.

        Raises:
            OSError: EADDRINUSE: somebody has it; EADDRNOTAVAIL: no link has the address.
        """
        ...

    def find_user(self, binding: Binding) -> str | None:
        """Which process has a port, in words; None: not one that the agent may look at."""
        ...


class SocketPort(NamedTuple):
    """A `HeldPort` by a bound socket."""

    socket: socket.socket

    @property
    def port(self) -> int:
        """See `HeldPort`."""
        return int(self.socket.getsockname()[1])

    def close(self) -> None:
        """See `HeldPort`."""
        self.socket.close()


class KernelPorts:
    """`HostPorts` of the calling process's network namespace."""

    def hold(self, binding: Binding) -> SocketPort:
        """See `HostPorts`."""
        # Not with SO_REUSEADDR at once: then the kernel would let another program that sets it bind
        # as well, and only its listen would fail.
        try:
            return self._bind(binding, reuse=False)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or binding.protocol is Transport.UDP:
                raise
            # A connection in TIME_WAIT blocks a port for a minute after its end.  SO_REUSEADDR
            # ignores those, and still fails if a socket listens.
            return self._bind(binding, reuse=True)

    def _bind(self, binding: Binding, *, reuse: bool) -> SocketPort:
        family = socket.AF_INET if binding.address.version == 4 else socket.AF_INET6
        kind = socket.SOCK_STREAM if binding.protocol is Transport.TCP else socket.SOCK_DGRAM
        made = socket.socket(family, kind | socket.SOCK_CLOEXEC)
        try:
            if family == socket.AF_INET6:
                # Otherwise a socket bound to :: would take IPv4's port, too.
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            made.bind((str(binding.address), binding.port))
            # Off again at once: while it is on, a second program that sets it could bind, too.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, False)
        except BaseException:
            made.close()
            raise
        return SocketPort(made)

    def find_user(self, binding: Binding) -> str | None:
        """See `HostPorts`."""
        inodes = set(_socket_inodes(binding))
        own = str(os.getpid())
        for pid in (e for e in os.listdir("/proc") if e.isdigit() and e != own):
            with contextlib.suppress(OSError):
                if not inodes.isdisjoint(_descriptors(pid)):
                    name = Path(f"/proc/{pid}/comm").read_text().strip()
                    return f"process {name} (pid {pid})"
        return None


class PublishedPorts:
    """All published ports of this host's endpoints.

    Args:
        host: the ports of the host.
        dataplane: asked to bring to the kernel what endpoints publish.
    """

    def __init__(self, host: HostPorts, dataplane: DataplaneView) -> None:
        self._host = host
        self._dataplane = dataplane
        self._owners: dict[Binding, Endpoint] = {}
        self._held: dict[Binding, HeldPort] = {}
        self._users: dict[Binding, str] = {}
        self._not_held = Flag()

    async def run(self) -> None:
        """Try forever to hold the ports that a process took while no agent ran."""
        while True:
            await self._not_held.wait()
            while self._users:
                await trio.sleep(_HOLD_AGAIN_S)
                self._hold_again()

    def _hold_again(self) -> None:
        for binding in list(self._users):
            with contextlib.suppress(OSError):
                self._held[binding] = self._host.hold(binding)
                del self._users[binding]

    async def acquire(
        self, endpoint: Endpoint, wanted: Sequence[PublishedPort]
    ) -> tuple[PublishedPort, ...]:
        """Get ports for an endpoint, all of them or none; returns them with chosen numbers.

        Raises:
            ConflictError: another endpoint or a process of the host has one.
            NotFoundError: the host has no such address.
            UsageError: they are too many, or of an IP version that the endpoint does not have.
        """
        check_count([*endpoint.published, *wanted])
        acquired: list[PublishedPort] = []
        try:
            for port in wanted:
                acquired.append(await self._acquire_one(endpoint, port))
        except BaseException:
            self.release(endpoint, acquired)
            raise
        return tuple(acquired)

    async def take_over(self, endpoint: Endpoint) -> None:
        """Hold the ports that an endpoint already had when the agent started.

        One that a process took meanwhile stays published, and is named in `report`.
        """
        for port in endpoint.published:
            for binding in bindings_of(endpoint, port):
                self._owners[binding] = endpoint
                try:
                    self._held[binding] = self._host.hold(binding)
                except OSError as error:
                    user = await self._describe_user(binding, error)
                    self._users[binding] = user
                    self._not_held.set()
                    _log.warning("published port not held", port=str(port), by=user)

    def release(self, endpoint: Endpoint, ports: Iterable[PublishedPort]) -> None:
        """Give back ports of an endpoint; one that it does not have is ignored."""
        for port in ports:
            for binding in bindings_of(endpoint, port):
                if self._owners.pop(binding, None) is not None:
                    self._users.pop(binding, None)
                    held = self._held.pop(binding, None)
                    if held is not None:
                        held.close()

    async def bring_to_kernel(self, endpoint: Endpoint) -> None:
        """Wait until the kernel handles packets to an endpoint's ports as it should now.

        UDP flows follow the ports (`meshnet.kernel.drivers.firewall`); open TCP connections go on
        as they are.  Cancelling waits, too: a pass may bring what is recorded to the kernel at any
        time, so only the end of one says what the kernel has.

        Raises:
            KernelRefusedError: the kernel may or may not have it; passes go on trying.
        """
        with trio.move_on_after(_SETTLE_S, shield=True) as waiting:
            await self._dataplane.settle()
        if waiting.cancelled_caught:
            raise KernelRefusedError(
                f"no pass brought the ports of {_name(endpoint)} to the kernel within "
                f"{_SETTLE_S:.0f} s: see meshnet status"
            )

    def report(self) -> list[str]:
        """What an operator should know: ports that a process took while the agent was away."""
        return [
            f"port {_describe(binding)} is published for {_name(self._owners[binding])}, which "
            f"gets its packets, but was taken by {user} while no agent ran: stop that, or "
            "unpublish the port"
            for binding, user in self._users.items()
        ]

    async def _acquire_one(self, endpoint: Endpoint, port: PublishedPort) -> PublishedPort:
        for _ in range(_TRIES if port.host_port == ANY_PORT else 0):
            with contextlib.suppress(ConflictError):
                return await self._try(endpoint, port)
        return await self._try(endpoint, port)

    async def _try(self, endpoint: Endpoint, port: PublishedPort) -> PublishedPort:
        held: dict[Binding, HeldPort] = {}
        try:
            for binding in bindings_of(endpoint, port):
                # A port is the same for both IP versions: the first one's bind may choose it.
                number = next((h.port for h in held.values()), binding.port)
                wanted = binding._replace(port=number)
                self._check_free(wanted)
                made = await self._hold(wanted)
                held[wanted._replace(port=made.port)] = made
        except BaseException:
            for made in held.values():
                made.close()
            raise
        self._held |= held
        self._owners |= dict.fromkeys(held, endpoint)
        return port._replace(host_port=next(iter(held)).port)

    def _check_free(self, wanted: Binding) -> None:
        for binding, owner in self._owners.items():
            if binding.overlaps(wanted):
                raise ConflictError(
                    f"port {_describe(binding)} is published for {_name(owner)} already: choose "
                    f"another, or take it away (meshnet endpoint unpublish {owner.name} "
                    f"{binding.port}/{binding.protocol})"
                )

    async def _hold(self, wanted: Binding) -> HeldPort:
        try:
            return self._host.hold(wanted)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                user = await self._describe_user(wanted, error)
                raise ConflictError(
                    f"port {_describe(wanted)} of this host is taken by {user}: choose another, or "
                    "stop that"
                ) from error
            if error.errno == errno.EADDRNOTAVAIL:
                raise NotFoundError(
                    f"address {wanted.address} is on no link of this host: publish at one that "
                    "`ip addr` shows, or leave it out to publish at all of them"
                ) from error
            raise KernelRefusedError(
                f"port {_describe(wanted)} of this host cannot be taken: {error.strerror}"
            ) from error

    async def _describe_user(self, binding: Binding, error: OSError) -> str:
        if error.errno != errno.EADDRINUSE:
            return f"nobody, but not available ({error.strerror})"
        found = await trio.to_thread.run_sync(self._host.find_user, binding)
        return found or "the kernel, or a process that the agent may not look at"


def _describe(binding: Binding) -> str:
    port = f"{binding.port}/{binding.protocol}"
    if binding.address.is_unspecified:
        return port
    return f"{port} at {binding.address}"


def _name(endpoint: Endpoint) -> str:
    return f"endpoint {endpoint.name} of network {endpoint.network}"


def _descriptors(pid: str) -> Iterator[str]:
    """The link targets of a process's descriptors."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(f"/proc/{pid}/fd/{fd}")


def _socket_inodes(binding: Binding) -> list[str]:
    """Link targets of the descriptors of all sockets that block a binding (proc_pid_net(5))."""
    found = []
    for version, suffix in ((4, ""), (6, "6")):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            lines = Path(f"/proc/thread-self/net/{binding.protocol}{suffix}").read_text()
            for line in lines.splitlines()[1:]:
                fields = line.split()
                address, port = _local_address(fields[1], version)
                # A socket bound to :: may have IPv4's port, too: the file does not say.
                same = Binding(binding.protocol, address, port).overlaps(binding)
                both = version == 6 and address.is_unspecified and port == binding.port
                if (same or both) and int(fields[3], 16) != _TCP_TIME_WAIT:
                    found.append(f"socket:[{fields[9]}]")
    return found


def _local_address(field: str, version: int) -> tuple[IpAddress, int]:
    """Parse ``0100007F:1F90``: 32-bit words in the machine's byte order, in hex, and the port."""
    words, _, port = field.partition(":")
    raw = bytes.fromhex(words)
    ordered = (int.from_bytes(raw[i : i + 4], "big") for i in range(0, len(raw), 4))
    packed = b"".join(word.to_bytes(4, sys.byteorder) for word in ordered)
    return ip_address(packed), int(port, 16)
