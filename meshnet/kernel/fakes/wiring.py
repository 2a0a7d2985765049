"""The wiring of endpoints in memory: a verified fake of `meshnet.kernel.wiring.NetlinkWiring`.

A namespace is whatever file the caller has a descriptor of: two descriptors of one inode are one
namespace, so both a test's own file and a real namespace will do.  This passes the same contract
tests as the real one (``tests/contract/test_wiring.py``).  Place: tests only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import TYPE_CHECKING

from meshnet.errors import ConflictError, KernelRefusedError, MeshnetError, NotFoundError
from meshnet.firewall.elements import source_elements
from meshnet.firewall.rules import COUNTERS
from meshnet.kernel.elements import WiredElements
from meshnet.kernel.netns import netns_id
from meshnet.state import ENDPOINT_LINK, Link, LinkKind, endpoint_link_name
from meshnet.tables import Op, Table
from meshnet.wire.mtu import DEFAULT_GSO_MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshnet.kernel import EndpointWiring
    from meshnet.kernel.fakes.kernel import MemoryKernel
    from meshnet.model import Endpoint, IpAddress, IpInterface, IpNetwork
    from meshnet.sandbox import NetnsId

_DEFAULT = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}


@dataclass
class NamespaceLink:
    """One link in a namespace.

    Attributes:
        peer: name of its other end on the host, or of the host's link that it is a macvlan on; "":
            it does not belong to an endpoint.
        routes: gateways by destination.
        gso_max_bytes: the largest super-packet that it takes.
    """

    mac: bytes = b""
    mtu_bytes: int = 1500
    peer: str = ""
    addresses: tuple[IpInterface, ...] = ()
    routes: dict[IpNetwork, IpAddress] = field(default_factory=dict)
    gso_max_bytes: int = DEFAULT_GSO_MAX_BYTES


class MemoryWiring:
    """`meshnet.kernel.Wiring` in memory, on the links of a `MemoryKernel`."""

    def __init__(self, kernel: MemoryKernel) -> None:
        self.writes = 0
        self._kernel = kernel
        kernel.wired = WiredElements()  # as after a restart: a new process knows of no endpoint
        self._namespaces: dict[NetnsId, dict[str, NamespaceLink]] = {}
        self._failure: MeshnetError | None = None

    def close(self) -> None:
        """See `meshnet.kernel.Wiring`."""

    def fail_next(self, error: MeshnetError) -> None:
        """Fault injection: the next `connect` raises `error`."""
        self._failure = error

    def namespace(self, netns_fd: int) -> dict[str, NamespaceLink]:
        """The links of a namespace by name, for tests to look at and to add to.

        An endpoint's link is there as long as what it hangs on is.
        """
        return self._links(netns_id(netns_fd))

    def _links(self, netns: NetnsId) -> dict[str, NamespaceLink]:
        links = self._namespaces.setdefault(netns, {})
        on_host = self._kernel.dump().links.keys() | self._kernel.host_links
        for name in [n for n, link in links.items() if link.peer and link.peer not in on_host]:
            del links[name]
        return links

    def connect(self, netns_fd: int, wiring: EndpointWiring) -> tuple[int, ...]:
        """See `meshnet.kernel.Wiring`."""
        self.writes += 1
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        endpoint = wiring.endpoint
        uplinks = self._kernel.dump().links if endpoint.parent is None else self._kernel.host_links
        if wiring.uplink not in uplinks:
            raise NotFoundError(f"link {wiring.uplink} is not up on this host")
        links = self.namespace(netns_fd)
        if endpoint.ifname in links:
            raise ConflictError(f"{endpoint.sandbox} already has a link {endpoint.ifname}")
        held = {a.ip for link in links.values() for a in link.addresses}
        for address in endpoint.addresses:
            if address.ip in held:
                raise ConflictError(f"{endpoint.sandbox} already holds the address {address.ip}")
        present = {target for link in links.values() for target in link.routes}
        default = _free_defaults(endpoint, links)
        routes: dict[IpNetwork, IpAddress] = {}
        for gateway in endpoint.gateways:
            targets = [t for t in wiring.routes if t.version == gateway.version]
            leads = [_DEFAULT[gateway.version]] if gateway.version in default else targets
            routes |= dict.fromkeys(leads, gateway)
        if present & routes.keys():
            raise ConflictError(
                f"{endpoint.sandbox} already has a route that {endpoint.name} needs"
            )
        name = wiring.uplink
        if endpoint.parent is None:
            name = endpoint_link_name(endpoint.id)
            host_side = Link(
                LinkKind.VETH,
                endpoint.mtu_bytes,
                b"\2\0\0\0\0\1",
                master=wiring.uplink,
                hairpin=True,
            )
            self._kernel.add_endpoint_link(name, host_side)
            elements = source_elements(endpoint)
            self._kernel.wired.add(elements)
            self._kernel.write_elements(
                [Op(Table.ELEMENT, k, v, False) for k, v in elements.items()]
            )
        links[endpoint.ifname] = NamespaceLink(
            endpoint.mac,
            endpoint.mtu_bytes,
            name,
            endpoint.addresses,
            routes,
            wiring.gso_max_bytes or DEFAULT_GSO_MAX_BYTES,
        )
        return default

    def lead_default(self, netns_fd: int, endpoint: Endpoint) -> tuple[int, ...]:
        """See `meshnet.kernel.Wiring`."""
        links = self.namespace(netns_fd)
        if endpoint.ifname not in links:
            raise KernelRefusedError(f"link {endpoint.ifname} of {endpoint.name} is gone")
        free = _free_defaults(endpoint, links)
        for gateway in endpoint.gateways:
            if gateway.version in free:
                links[endpoint.ifname].routes[_DEFAULT[gateway.version]] = gateway
        return free

    def disconnect(self, endpoint: Endpoint) -> None:
        """See `meshnet.kernel.Wiring`."""
        if endpoint.parent is None:
            self.remove_link(endpoint_link_name(endpoint.id))
            elements = source_elements(endpoint)
            self._kernel.wired.remove(elements)
            self._kernel.write_elements([Op(Table.ELEMENT, key, None, True) for key in elements])
            return
        self.writes += 1
        links = self._links(endpoint.sandbox.netns)
        for name in [n for n, link in links.items() if _is_of(link, endpoint)]:
            del links[name]

    def holds(self, netns_fd: int, endpoint: Endpoint) -> bool:
        """See `meshnet.kernel.Wiring`."""
        return any(_is_of(link, endpoint) for link in self.namespace(netns_fd).values())

    def adopt(self, endpoint: Endpoint) -> None:
        """See `meshnet.kernel.Wiring`."""
        self._kernel.wired.add(source_elements(endpoint))

    def drops(self) -> dict[str, int]:
        """See `meshnet.kernel.Wiring`."""
        return dict.fromkeys(COUNTERS, 0) if self._kernel.dump().firewall else {}

    def remove_link(self, name: str) -> None:
        """See `meshnet.kernel.Wiring`."""
        self.writes += 1
        self._kernel.remove_endpoint_link(name)

    def has_link(self, name: str) -> bool:
        """See `meshnet.kernel.Wiring`."""
        return name in self._kernel.link_indices()

    def list_endpoint_links(self) -> list[str]:
        """See `meshnet.kernel.Wiring`."""
        return [name for name in self._kernel.dump().links if ENDPOINT_LINK.fullmatch(name)]


def _free_defaults(endpoint: Endpoint, links: Mapping[str, NamespaceLink]) -> tuple[int, ...]:
    present = {target for link in links.values() for target in link.routes}
    versions = [gateway.version for gateway in endpoint.gateways if endpoint.default_route]
    return tuple(version for version in versions if _DEFAULT[version] not in present)


def _is_of(link: NamespaceLink, endpoint: Endpoint) -> bool:
    return link.peer == endpoint.parent and link.mac == endpoint.mac
