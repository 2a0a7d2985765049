"""Endpoints: a link in a namespace, all of it or nothing.

The link is one end of a veth pair, whose other end is a port of a bridge of the host; or a macvlan
on a link of the host, of which nothing is in the host's own namespace.

The order inside the namespace matters.  Router advertisements and duplicate address detection are
switched off before the link goes up: so the process can send at once, and a neighbour on the bridge
cannot hand it a default route (CVE-2020-10749).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from ipaddress import IPv6Interface
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import ConflictError, KernelRefusedError, MeshnetError, NotFoundError
from meshnet.firewall.elements import source_elements
from meshnet.kernel.address_probe import announce
from meshnet.kernel.netns import inside, open_by_id
from meshnet.kernel.wire import links, rtnl
from meshnet.kernel.wire.inner_routes import encode_inner_routes, has_default_route
from meshnet.kernel.wire.nftnl import NftSocket
from meshnet.state import ENDPOINT_LINK, LinkKind, endpoint_link_name
from meshnet.tables import Op, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.kernel import EndpointWiring
    from meshnet.kernel.elements import WiredElements
    from meshnet.model import Endpoint, IpNetwork

_MAC_TRIES, _MAC_PAUSE_S = 40, 0.05
"""For a macvlan whose MAC an ending one still has: 2 s in all (`NetlinkWiring._set_up`)."""


class NetlinkWiring:
    """`meshnet.kernel.Wiring` on Linux; use it from the thread that made it.

    Args:
        wired: told of the endpoints that are connected; shared with the host's `NetlinkKernel`.

    Raises:
        OSError: a netlink socket cannot be had.
    """

    def __init__(self, wired: WiredElements) -> None:
        self._rtnl = rtnl.RtnlSocket()
        try:
            self._nft = NftSocket()
        except BaseException:
            self._rtnl.close()
            raise
        self._wired = wired
        self.writes = 0

    def close(self) -> None:
        """See `meshnet.kernel.Wiring`."""
        self._rtnl.close()
        self._nft.close()

    @property
    def port_id(self) -> int:
        """Netlink address of its socket: the sender in notifications of its own writes."""
        return self._rtnl.port_id

    @property
    def nft_port_id(self) -> int:
        """The same for the elements of nftables sets."""
        return self._nft.port_id

    def connect(self, netns_fd: int, wiring: EndpointWiring) -> tuple[int, ...]:
        """See `meshnet.kernel.Wiring`."""
        endpoint = wiring.endpoint
        self._must(self._rtnl, [_encode_link(netns_fd, wiring)], endpoint)
        is_new = False
        try:
            if endpoint.parent is None:
                index = socket.if_nametoindex(endpoint_link_name(endpoint.id))
                # The host's end needs no address.  May fail: a kernel without IPv6, or a link with
                # an MTU below IPv6's minimum, knows no such setting.
                self._rtnl.send_batch([links.encode_no_link_local(index)])
                self._must(self._rtnl, [links.encode_hairpin(index)], endpoint)
                # Before the namespace's end goes up: the firewall drops what it does not know, and
                # the process's first packet must not be lost.
                is_new = self._allow(endpoint)
            with inside(netns_fd):
                return self._configure(wiring)
        except BaseException as error:
            # Removing the host's end removes the other, with its addresses and routes.
            if endpoint.parent is None:
                self._rtnl.send_batch([links.encode_link_delete(endpoint_link_name(endpoint.id))])
            else:
                with inside(netns_fd):
                    self._remove_macvlan(endpoint)
            # Elements that were there before stay: they come from an earlier connection of the
            # same endpoint.
            if is_new:
                self._forbid(endpoint)
            if isinstance(error, OSError):
                raise KernelRefusedError(
                    f"endpoint {endpoint.name} in {endpoint.sandbox}: {error}"
                ) from error
            raise

    def disconnect(self, endpoint: Endpoint) -> None:
        """See `meshnet.kernel.Wiring`."""
        if endpoint.parent is None:
            self.remove_link(endpoint_link_name(endpoint.id))
            self._forbid(endpoint)
            return
        netns_fd = open_by_id(endpoint.sandbox.netns)
        if netns_fd is None:
            return
        try:
            with inside(netns_fd):
                self._remove_macvlan(endpoint)
        except OSError as error:
            raise KernelRefusedError(f"link of endpoint {endpoint.name}: {error}") from error
        finally:
            os.close(netns_fd)

    def holds(self, netns_fd: int, endpoint: Endpoint) -> bool:
        """See `meshnet.kernel.Wiring`."""
        try:
            with inside(netns_fd), contextlib.closing(rtnl.RtnlSocket()) as inner:
                return _find_macvlan(inner, endpoint) is not None
        except OSError as error:
            raise KernelRefusedError(f"link of endpoint {endpoint.name}: {error}") from error

    def adopt(self, endpoint: Endpoint) -> None:
        """See `meshnet.kernel.Wiring`."""
        with self._wired.lock:
            self._wired.add(source_elements(endpoint))

    def remove_link(self, name: str) -> None:
        """See `meshnet.kernel.Wiring`."""
        self.writes += 1
        errors = self._rtnl.send_batch([links.encode_link_delete(name)])
        if errors and errors[0].errno != errno.ENODEV:
            raise KernelRefusedError(f"endpoint link {name}: {errors[0]}")

    def has_link(self, name: str) -> bool:
        """See `meshnet.kernel.Wiring`."""
        try:
            socket.if_nametoindex(name)
        except OSError:  # without a number: Python does not pass the errno on
            return False
        return True

    def list_endpoint_links(self) -> list[str]:
        """See `meshnet.kernel.Wiring`."""
        messages = self._rtnl.dump(rtnl.RTM_GETLINK, links.link_dump())
        names = [links.decode_link(m).name for m in messages]
        return [name for name in names if ENDPOINT_LINK.fullmatch(name)]

    def _remove_macvlan(self, endpoint: Endpoint) -> None:
        """Remove an endpoint's macvlan from the namespace that the calling thread is in."""
        with contextlib.closing(rtnl.RtnlSocket()) as inner:
            name = _find_macvlan(inner, endpoint)
            if name is None:
                return
            self.writes += 1
            errors = inner.send_batch([links.encode_link_delete(name)])
            if errors and errors[0].errno != errno.ENODEV:
                raise KernelRefusedError(f"link {name} of endpoint {endpoint.name}: {errors[0]}")

    def drops(self) -> dict[str, int]:
        """See `meshnet.kernel.Wiring`."""
        return {name: count.packets for name, count in self._nft.dump_counters().items()}

    def _allow(self, endpoint: Endpoint) -> bool:
        """Let an endpoint send from its own addresses; returns whether it could not before."""
        elements = source_elements(endpoint)
        with self._wired.lock:
            is_new = self._wired.add(elements)
            self._write_elements(
                [Op(Table.ELEMENT, key, value, False) for key, value in elements.items()]
            )
        return is_new

    def _forbid(self, endpoint: Endpoint) -> None:
        elements = source_elements(endpoint)
        with self._wired.lock:
            self._wired.remove(elements)
            self._write_elements([Op(Table.ELEMENT, key, None, True) for key in elements])

    def _write_elements(self, ops: Sequence[Op]) -> None:
        self.writes += len(ops)
        for failure in self._nft.write_elements(ops):
            # Without tables there is nothing to write to.  The pass that loads them takes the
            # elements from `WiredElements`, so nothing is missed.
            if failure.errno != errno.ENOENT:
                raise KernelRefusedError(str(failure))

    def lead_default(self, netns_fd: int, endpoint: Endpoint) -> tuple[int, ...]:
        """See `meshnet.kernel.Wiring`."""
        try:
            with inside(netns_fd), contextlib.closing(rtnl.RtnlSocket()) as inner:
                index = socket.if_nametoindex(endpoint.ifname)
                free = _free_defaults(inner, endpoint)
                for gateway in endpoint.gateways:
                    if gateway.version in free:
                        self._must(inner, encode_inner_routes([None], gateway, index), endpoint)
        except OSError as error:
            raise KernelRefusedError(
                f"default route of {endpoint.sandbox} through endpoint {endpoint.name}: {error}"
            ) from error
        return free

    def _configure(self, wiring: EndpointWiring) -> tuple[int, ...]:
        """Configure the link inside the namespace, which the calling thread is in."""
        endpoint = wiring.endpoint
        # A socket belongs to the namespace it was made in, so this one cannot be kept for reuse.
        with contextlib.closing(rtnl.RtnlSocket()) as inner:
            if endpoint.parent is not None:
                index = socket.if_nametoindex(endpoint_link_name(endpoint.id))
                self._must(inner, [links.encode_link_rename(index, endpoint.ifname)], endpoint)
            index = socket.if_nametoindex(endpoint.ifname)
            _set_ipv6(endpoint)
            # The kernel sends a gratuitous ARP packet when the link goes up.
            Path(f"/proc/sys/net/ipv4/conf/{endpoint.ifname}/arp_notify").write_text("1")
            _check_addresses(inner, endpoint)
            self._must(
                inner, [links.encode_address(a, index) for a in endpoint.addresses], endpoint
            )
            self._set_up(inner, index, endpoint)
            default = _free_defaults(inner, endpoint)
            routes = []
            for gateway in endpoint.gateways:
                targets: list[IpNetwork | None] = [None]
                if gateway.version not in default:
                    targets = [r for r in wiring.routes if r.version == gateway.version]
                routes += encode_inner_routes(targets, gateway, index)
            self._must(inner, routes, endpoint)
        # Whoever talked to the last holder of an address sends to that one's MAC for half a minute.
        for address in endpoint.addresses:
            if isinstance(address, IPv6Interface):
                announce(endpoint.ifname, address.ip, endpoint.mac)
        return default

    def _set_up(self, inner: rtnl.RtnlSocket, index: int, endpoint: Endpoint) -> None:
        """Set a link up, once no other link on its parent has its MAC.

        An endpoint's MAC follows from its address, and a macvlan is there until the kernel has
        removed its namespace: so the next holder of the address may meet the last one's, and get
        EADDRINUSE (``macvlan_open`` in drivers/net/macvlan.c).
        """
        up = links.encode_link_up(index)
        for _ in range(_MAC_TRIES):
            self.writes += 1
            errors = inner.send_batch([up])
            if not errors:
                return
            if errors[0].errno != errno.EADDRINUSE:
                break
            time.sleep(_MAC_PAUSE_S)
        raise _translate(up, errors[0], endpoint)

    def _must(
        self, target: rtnl.RtnlSocket, requests: Sequence[rtnl.Request], endpoint: Endpoint
    ) -> None:
        self.writes += len(requests)
        errors = target.send_batch(requests) if requests else {}
        if errors:
            raise _translate(requests[min(errors)], errors[min(errors)], endpoint)


def _encode_link(netns_fd: int, wiring: EndpointWiring) -> rtnl.Request:
    endpoint = wiring.endpoint
    try:
        uplink = socket.if_nametoindex(wiring.uplink)
    except OSError as error:
        raise NotFoundError(
            f"link {wiring.uplink} of network {endpoint.network} is not up on this host: "
            "see meshnet status"
        ) from error
    if endpoint.parent is not None:
        # Under a name of ours at first: older kernels refuse a name that the host's namespace has
        # (eth0), although the link is for another namespace.
        return links.encode_macvlan(
            endpoint_link_name(endpoint.id),
            lower=uplink,
            mtu_bytes=endpoint.mtu_bytes,
            mac=endpoint.mac,
            netns_fd=netns_fd,
        )
    return links.encode_veth(
        endpoint_link_name(endpoint.id),
        master=uplink,
        mtu_bytes=endpoint.mtu_bytes,
        peer_name=endpoint.ifname,
        peer_mac=endpoint.mac,
        peer_netns_fd=netns_fd,
        peer_gso_max_bytes=wiring.gso_max_bytes,
    )


def _free_defaults(inner: rtnl.RtnlSocket, endpoint: Endpoint) -> tuple[int, ...]:
    """The IP versions whose default route an endpoint is to have, and may.

    A namespace keeps the default route that it has: another attachment may have made it.
    """
    if not endpoint.default_route:
        return ()
    versions = [gateway.version for gateway in endpoint.gateways]
    return tuple(version for version in versions if not has_default_route(inner, version))


def _find_macvlan(inner: rtnl.RtnlSocket, endpoint: Endpoint) -> str | None:
    """Name of an endpoint's macvlan in the namespace of a socket, which may have renamed it."""
    for message in inner.dump(rtnl.RTM_GETLINK, links.link_dump()):
        link = links.decode_link(message)
        if link.kind is LinkKind.MACVLAN and link.mac == endpoint.mac:
            return link.name
    return None


def _translate(request: rtnl.Request, error: rtnl.KernelError, endpoint: Endpoint) -> MeshnetError:
    """The kernel's errno as an error that tells the user what to do."""
    exists = error.errno == errno.EEXIST
    if exists and request.kind in (rtnl.RTM_NEWLINK, rtnl.RTM_SETLINK):
        return ConflictError(
            f"{endpoint.sandbox} already has a link {endpoint.ifname}: "
            "choose another name with --ifname"
        )
    if exists:
        return ConflictError(
            f"{endpoint.sandbox} already has a route that endpoint {endpoint.name} needs for "
            f"network {endpoint.network}: remove it"
        )
    return KernelRefusedError(
        f"endpoint {endpoint.name} of network {endpoint.network} in {endpoint.sandbox}: {error}"
    )


def _set_ipv6(endpoint: Endpoint) -> None:
    """Set IPv6 up for a link of the calling thread's namespace.

    /proc/sys/net shows the namespace of the thread that opens it.
    """
    settings = Path("/proc/sys/net/ipv6/conf") / endpoint.ifname
    if not settings.exists():
        return
    (settings / "accept_ra").write_text("0")
    (settings / "accept_dad").write_text("0")
    # EUI-64: the firewall admits the link-local address made of the MAC, and no other.
    (settings / "addr_gen_mode").write_text("0")
    if any(a.version == 6 for a in endpoint.addresses):
        # Docker and others start namespaces with IPv6 off.
        (settings / "disable_ipv6").write_text("0")


def _check_addresses(inner: rtnl.RtnlSocket, endpoint: Endpoint) -> None:
    """Refuse addresses that another link of the namespace has: the kernel itself would not."""
    messages = inner.dump(rtnl.RTM_GETADDR, links.address_dump())
    held = {info.address for info in links.decode_addresses(messages)}
    for address in endpoint.addresses:
        if address.ip.packed in held:
            raise ConflictError(
                f"{endpoint.sandbox} already holds the address {address.ip}: "
                "choose another with --ip"
            )
