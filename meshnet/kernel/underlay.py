"""Looking at what is below the networks: the underlay's address and link, and paths to peers."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

from meshnet.backends import HostLink, Underlay, UnderlayPath
from meshnet.errors import NotFoundError
from meshnet.kernel.drivers.links import is_ours
from meshnet.kernel.drivers.sysctls import (
    ALL_IPV6_FORWARDING,
    accept_ra,
    forwarding,
    has_sysctl,
    read_sysctl,
)
from meshnet.kernel.occupants import dump_occupants
from meshnet.kernel.wire import links, route_lookups, rtnl
from meshnet.kernel.wire.host_routes import decode_found_route

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from meshnet.kernel.capabilities import Capabilities
    from meshnet.kernel.drivers.namespace import HostNamespace
    from meshnet.kernel.wire.links import AddressInfo, LinkInfo
    from meshnet.model import IpAddress

_OUTSIDE = (IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1"))
"""Documentation addresses (RFC 5737, RFC 3849): their route is that of any address outside."""


class UnderlayObserver:
    """Looks at the underlay of a namespace; writes nothing."""

    def __init__(self, namespace: HostNamespace, capabilities: Capabilities) -> None:
        self._namespace = namespace
        self._capabilities = capabilities
        self._heard: set[str] = set()

    def observe(self, underlay_ip: IpAddress | None, underlay_dev: str | None) -> Underlay:
        """See `meshnet.kernel.Kernel`."""
        self._namespace.look_at_links()
        infos = self._dump_global_addresses()
        by_index = self._namespace.by_index
        held = [(ip_address(info.address), by_index[info.ifindex]) for info in infos]
        ip, link = self._find_underlay(held, underlay_ip, underlay_dev)
        outside = map(decode_found_route, filter(None, self._look_up(_OUTSIDE)))
        self._find_forwarding_links(held)
        return Underlay(
            ip=ip,
            dev=link.name,
            mtu_bytes=link.mtu_bytes,
            links=self._host_links(held),
            occupied=dump_occupants(self._namespace, infos, filter(None, outside), link.name),
            forwarding_links=self._namespace.forwarding_links,
            ra_links=self._namespace.ra_links,
            ipv6=has_sysctl(ALL_IPV6_FORWARDING),
            strict_rp_filter=read_sysctl("net/ipv4/conf/all/rp_filter") == "1",
            nexthop_objects=self._capabilities.has_nexthop_objects(),
            kernel_vxlan=self._capabilities.has_vxlan(),
        )

    def _find_forwarding_links(self, held: Iterable[tuple[IpAddress, LinkInfo]]) -> None:
        """Look which links packets may come by, and which of them hear routers.

        A port of a bridge or bond brings packets to its master.  (What a VRF masters has addresses
        of its own.)  Links that are down count once they are up.
        """
        with_address = {link.name for _, link in held}
        found = [
            link
            for link in self._namespace.by_index.values()
            if link.name != "lo" and not is_ours(link.name)
            if not link.master or link.name in with_address
        ]
        self._namespace.forwarding_links = tuple(
            sorted(link.name for link in found if link.up and has_sysctl(forwarding(link.name)))
        )
        listens = read_sysctl(ALL_IPV6_FORWARDING) == "0"
        # "default" is for links that come later.
        names = [*sorted(link.name for link in found), "default"]
        values = {name: read_sysctl(accept_ra(name)) for name in names}
        # Where it was 2, and is 1 again, somebody has put settings back: 2 was meant.
        self._heard = {n for n, v in values.items() if v == "2" or (v == "1" and n in self._heard)}
        self._namespace.ra_links = tuple(
            name
            for name, value in values.items()
            if name in self._heard or (value == "1" and listens)
        )

    def find_paths(self, addresses: Collection[IpAddress]) -> dict[IpAddress, UnderlayPath]:
        """See `meshnet.kernel.Kernel`."""
        return self._to_paths(addresses, self._look_up(addresses))

    def _look_up(self, addresses: Collection[IpAddress]) -> list[bytes | None]:
        """The route to each address, as the kernel tells it; None: there is none."""
        packed = [a.packed for a in addresses]
        socket = self._namespace.rtnl
        answers = socket.ask(route_lookups.encode_route_lookups(packed, socket.next_sequence))
        return [answer if isinstance(answer, bytes) else None for answer in answers]

    def _to_paths(
        self, addresses: Collection[IpAddress], answers: Sequence[bytes | None]
    ) -> dict[IpAddress, UnderlayPath]:
        # Thousands of peers are behind a few routes, and for all peers behind one the kernel's
        # answer is the same, byte for byte: it is decoded once.
        routes = {answer for answer in answers if answer is not None}
        found_by = {route: route_lookups.decode_route_lookup(route) for route in routes}
        known = self._namespace.by_index.keys()
        if not known >= {lookup[0] for lookup in found_by.values() if lookup is not None}:
            self._namespace.look_at_links()
        by_route = {route: self._to_path(found) for route, found in found_by.items() if found}
        found = {}
        for address, answer in zip(addresses, answers, strict=True):
            path = by_route.get(answer) if answer is not None else None
            if path is not None:
                found[address] = path
        return found

    def _to_path(self, lookup: tuple[int, bool, int]) -> UnderlayPath | None:
        ifindex, on_link, mtu_bytes = lookup
        out = self._namespace.by_index.get(ifindex)
        # A route over a link of ours is not a path to a peer, whose address happens to be in a
        # network: our own MTU would come back as the underlay's, smaller with every pass.
        if out is None or is_ours(out.name):
            return None
        return UnderlayPath(out.name, on_link, mtu_bytes or out.mtu_bytes)

    def _host_links(self, held: Iterable[tuple[IpAddress, LinkInfo]]) -> dict[str, HostLink]:
        addresses: dict[str, set[IpAddress]] = {}
        for ip, link in held:
            addresses.setdefault(link.name, set()).add(ip)
        return {
            link.name: HostLink(link.mtu_bytes, frozenset(addresses.get(link.name, ())))
            for link in self._namespace.by_index.values()
            if not is_ours(link.name)
        }

    def _dump_global_addresses(self) -> list[AddressInfo]:
        """All addresses of global scope, of links that are known."""
        by_index = self._namespace.by_index
        messages = self._namespace.rtnl.dump(rtnl.RTM_GETADDR, links.address_dump())
        return [
            info
            for info in links.decode_addresses(messages)
            if info.ifindex in by_index and info.scope == rtnl.RT_SCOPE_UNIVERSE
        ]

    def _find_underlay(
        self,
        held: list[tuple[IpAddress, LinkInfo]],
        wanted: IpAddress | None,
        dev: str | None,
    ) -> tuple[IpAddress, LinkInfo]:
        # The wanted address first, if the link has it: a second address must not move the tunnels.
        for ip, link in sorted(held, key=lambda item: (item[0] != wanted, item[0].version)):
            if ip == wanted if dev is None else self._is_or_has_port(link, dev):
                return ip, link
        if dev is None:
            raise NotFoundError(
                f"underlay address {wanted} is on no link of this host: "
                "give --underlay-ip an address that `ip addr` shows"
            )
        raise NotFoundError(
            f"link {dev} does not exist or has no global address: "
            "give --underlay-dev a link that `ip addr` shows with one"
        )

    def _is_or_has_port(self, link: LinkInfo, dev: str) -> bool:
        """Whether the link is `dev`, or a bridge that has `dev` as a port, and so its addresses.

        That is how a link is found again after its takeover.
        """
        by_index = self._namespace.by_index
        return link.name == dev or any(
            port.name == dev and by_index.get(port.master) is link for port in by_index.values()
        )
