"""The kernel: what meshnet asks of one host's network stack.

The `Kernel` protocol is synchronous: the agent calls it from one thread of its own, because
netlink sockets and network namespaces belong to threads.  `meshnet.kernel.netlink` is the real
one; `meshnet.kernel.fakes.kernel` is a verified fake that passes the same contract tests
(``tests/contract/test_kernel.py``) and can be told to fail.

Objects that are not ours are neither reported nor touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from meshnet.backends import Underlay, UnderlayPath
    from meshnet.model import Endpoint, IpAddress, IpNetwork
    from meshnet.state import KernelState
    from meshnet.tables import Failure, Op


class EndpointWiring(NamedTuple):
    """How to connect a namespace: the endpoint, and what it is connected to.

    Attributes:
        uplink: link of the host that the endpoint hangs on: its macvlan's parent if it has one,
            else the bridge that its host-side end becomes a port of.
        routes: destinations to reach through the gateway of their IP version; used only if that
            version's default route does not lead through this endpoint.
        gso_max_bytes: the largest super-packet that the namespace's link takes; None: the kernel's
            default.
    """

    endpoint: Endpoint
    uplink: str
    routes: Sequence[IpNetwork]
    gso_max_bytes: int | None = None


class Kernel(Protocol):
    """One host's network stack.  Not thread-safe."""

    @property
    def writes(self) -> int:
        """Requests that changed, or tried to change, something since start."""
        ...

    def observe(self, underlay_ip: IpAddress | None, underlay_dev: str | None) -> Underlay:
        """Look at the underlay: the link that holds `underlay_ip`; `paths` stays empty.

        Args:
            underlay_ip: the address that tunnels start from.
            underlay_dev: the link that holds the address, or a port of that link.  If that link
                does not have `underlay_ip`, its first global address counts.  None: any link.

        Raises:
            NotFoundError: no link holds the address, or the link does not exist or has none.
        """
        ...

    def find_paths(self, addresses: Collection[IpAddress]) -> dict[IpAddress, UnderlayPath]:
        """The path to each underlay address; one without a route is missing.

        The links' names and MTUs are those that the last `observe` or `dump` saw.
        """
        ...

    def link_indices(self) -> Mapping[str, int]:
        """Interface indices by name of all links, whoever made them.

        As the last `dump` or `observe` saw them, updated by what `apply` made and removed since.
        """
        ...

    def dump(self) -> KernelState:
        """All our objects, as of now."""
        ...

    def apply(
        self, ops: Sequence[Op], on_written: Callable[[int], None] | None = None
    ) -> list[Failure]:
        """Carry out operations in order; a failed one stops only those that need it.

        Args:
            on_written: called from the calling thread, at least once for every 500 operations, with
                how many were finished (carried out, refused or not tried) since the last call.
        """
        ...

    def close(self) -> None:
        """Close sockets; the data path stays."""
        ...


class Wiring(Protocol):
    """Connects namespaces to the host.  Not thread-safe; independent of `Kernel`'s thread."""

    @property
    def writes(self) -> int:
        """Requests that changed, or tried to change, something since start."""
        ...

    def connect(self, netns_fd: int, wiring: EndpointWiring) -> tuple[int, ...]:
        """Bring an endpoint up in a namespace, or leave everything as it was.

        The firewall knows the endpoint's addresses before its link is up.

        Returns:
            The IP versions whose default route leads through the endpoint: if
            `endpoint.default_route` asks for that, those of which the namespace had none.

        Raises:
            ConflictError: the namespace has a link of that name or holds the address.
            NotFoundError: the uplink or the namespace is gone.
            KernelRefusedError: anything else the kernel refused.
        """
        ...

    def disconnect(self, endpoint: Endpoint) -> None:
        """Remove an endpoint's links, and with them its addresses and routes.  Idempotent.

        Raises:
            KernelRefusedError: a link is there and cannot be removed.
        """
        ...

    def lead_default(self, netns_fd: int, endpoint: Endpoint) -> tuple[int, ...]:
        """Lead the namespace's default route through an endpoint that is connected.

        Returns:
            The IP versions that have led elsewhere, or nowhere, and lead there now: those of which
            the namespace had none.

        Raises:
            KernelRefusedError: the namespace or its link is gone, or the kernel refused.
        """
        ...

    def holds(self, netns_fd: int, endpoint: Endpoint) -> bool:
        """Whether a namespace has the macvlan of an endpoint: one with its MAC, under any name.

        Raises:
            KernelRefusedError: the namespace cannot be entered or its links not be listed.
        """
        ...

    def adopt(self, endpoint: Endpoint) -> None:
        """Take over an endpoint that an earlier agent connected; writes nothing."""
        ...

    def remove_link(self, name: str) -> None:
        """Remove an endpoint link by name.  Idempotent."""
        ...

    def has_link(self, name: str) -> bool:
        """Whether this host has a link of that name now, whoever made it."""
        ...

    def list_endpoint_links(self) -> list[str]:
        """Names of all endpoint links on this host, whoever made them."""
        ...

    def drops(self) -> dict[str, int]:
        """Packets that the firewall dropped, by reason; empty without our tables."""
        ...

    def close(self) -> None:
        """Close sockets; endpoints stay."""
        ...
