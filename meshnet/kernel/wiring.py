"""Endpoints: a link in a namespace, all of it or nothing.

It is one end of a veth pair whose other end is a port of a bridge of the host, or a macvlan on a
link of the host: then nothing of it is in the host's own namespace.

The order inside the namespace matters: router advertisements and duplicate address detection are
switched off before the link goes up, so that a packet can be sent with the first scheduling of the
process and a neighbour on the bridge can not hand it a default route (CVE-2020-10749).
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
from meshnet.kernel.wire import bulk, links, rtnl
from meshnet.kernel.wire.nftnl import NftSocket
from meshnet.state import ENDPOINT_LINK, LinkKind, endpoint_link_name
from meshnet.tables import Op, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.kernel import EndpointWiring
    from meshnet.kernel.elements import WiredElements
    from meshnet.model import Endpoint, IpAddress, IpNetwork

RTPROT_STATIC = 4
_MAC_TRIES, _MAC_PAUSE_S = 40, 0.05


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
        """The same of nftables' elements."""
        return self._nft.port_id

    def connect(self, netns_fd: int, wiring: EndpointWiring) -> bool:
        """See `meshnet.kernel.Wiring`."""
        endpoint = wiring.endpoint
        self._must(self._rtnl, [_encode_link(netns_fd, wiring)], endpoint)
        is_new = False
        try:
            if endpoint.parent is None:
                index = socket.if_nametoindex(endpoint_link_name(endpoint.id))
                # A courtesy that a kernel without IPv6, or a link with a small MTU, has no use for.
                self._rtnl.send_batch([links.encode_no_link_local(index)])
                self._must(self._rtnl, [links.encode_hairpin(index)], endpoint)
                is_new = self._allow(endpoint)
            with inside(netns_fd):
                return self._configure(wiring)
        except BaseException as error:
            if endpoint.parent is None:
                self._rtnl.send_batch([links.encode_link_delete(endpoint_link_name(endpoint.id))])
            else:
                with inside(netns_fd):
                    self._remove_macvlan(endpoint)
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
        """The calling thread is in the namespace that has it."""
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
        """Let an endpoint send from what is its own; returns whether that is news."""
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
            # Without tables there is nothing to add to or delete from: the pass that loads them
            # loads what is connected then.
            if failure.errno != errno.ENOENT:
                raise KernelRefusedError(str(failure))

    def _configure(self, wiring: EndpointWiring) -> bool:
        """The half inside the namespace: the calling thread is in it."""
        endpoint = wiring.endpoint
        with contextlib.closing(rtnl.RtnlSocket()) as inner:
            if endpoint.parent is not None:
                index = socket.if_nametoindex(endpoint_link_name(endpoint.id))
                self._must(inner, [links.encode_link_rename(index, endpoint.ifname)], endpoint)
            index = socket.if_nametoindex(endpoint.ifname)
            _set_ipv6(endpoint)
            if wiring.announce:
                # The kernel sends a gratuitous ARP packet when the link goes up.
                Path(f"/proc/sys/net/ipv4/conf/{endpoint.ifname}/arp_notify").write_text("1")
            _check_addresses(inner, endpoint)
            self._must(
                inner, [links.encode_address(a, index) for a in endpoint.addresses], endpoint
            )
            self._set_up(inner, index, endpoint)
            default = endpoint.default_route and bool(endpoint.gateways)
            default = default and not _has_default_route(inner)
            routes = []
            for gateway in endpoint.gateways:
                targets = [r for r in wiring.routes if r.version == gateway.version]
                routes += _encode_routes([None] if default else targets, gateway, index)
            self._must(inner, routes, endpoint)
        for address in endpoint.addresses if wiring.announce else ():
            if isinstance(address, IPv6Interface):
                announce(endpoint.ifname, address.ip, endpoint.mac)
        return default

    def _set_up(self, inner: rtnl.RtnlSocket, index: int, endpoint: Endpoint) -> None:
        """Set a link up, once nobody else on its parent has its MAC.

        An endpoint that ended is still there until the kernel has removed its namespace, and the
        next one with its address has its MAC (``macvlan_open`` in drivers/net/macvlan.c).
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
        # By a name of ours at first: older kernels refuse one that this namespace has, although the
        # link is for another.
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


def _find_macvlan(inner: rtnl.RtnlSocket, endpoint: Endpoint) -> str | None:
    """Name of an endpoint's macvlan in the namespace of a socket, which may have renamed it."""
    for message in inner.dump(rtnl.RTM_GETLINK, links.link_dump()):
        link = links.decode_link(message)
        if link.kind is LinkKind.MACVLAN and link.mac == endpoint.mac:
            return link.name
    return None


def _translate(request: rtnl.Request, error: rtnl.KernelError, endpoint: Endpoint) -> MeshnetError:
    """The kernel's errno in the words of whoever asked for the endpoint."""
    exists = error.errno == errno.EEXIST
    if exists and request.kind in (rtnl.RTM_NEWLINK, rtnl.RTM_SETLINK):
        return ConflictError(
            f"{endpoint.sandbox} has a link {endpoint.ifname} already: "
            "choose another name with --ifname"
        )
    if exists:
        return ConflictError(
            f"{endpoint.sandbox} has a route that endpoint {endpoint.name} needs for network "
            f"{endpoint.network} already: remove it"
        )
    return KernelRefusedError(
        f"endpoint {endpoint.name} of network {endpoint.network} in {endpoint.sandbox}: {error}"
    )


def _set_ipv6(endpoint: Endpoint) -> None:
    """Settings of the calling thread's namespace (/proc/sys/net is that of whoever opens it)."""
    settings = Path("/proc/sys/net/ipv6/conf") / endpoint.ifname
    if not settings.exists():
        return
    (settings / "accept_ra").write_text("0")
    (settings / "accept_dad").write_text("0")
    # The link-local address that the firewall expects is the one made of the MAC.
    (settings / "addr_gen_mode").write_text("0")
    if any(a.version == 6 for a in endpoint.addresses):
        # Docker and others start namespaces with IPv6 off.
        (settings / "disable_ipv6").write_text("0")


def _check_addresses(inner: rtnl.RtnlSocket, endpoint: Endpoint) -> None:
    """The kernel itself lets two links of a namespace have one address."""
    messages = inner.dump(rtnl.RTM_GETADDR, links.address_dump())
    held = {info.address for info in links.decode_addresses(messages)}
    for address in endpoint.addresses:
        if address.ip.packed in held:
            raise ConflictError(
                f"{endpoint.sandbox} holds the address {address.ip} already: "
                "choose another with --ip"
            )


def _has_default_route(inner: rtnl.RtnlSocket) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        body = rtnl.RTMSG.pack(family, 0, 0, 0, bulk.RT_TABLE_MAIN, 0, 0, 0, 0)
        for data, start, _ in inner.dump(rtnl.RTM_GETROUTE, body):
            header = rtnl.RTMSG.unpack_from(data, start)
            length, table, kind = header[1], header[4], header[7]
            if not length and table == bulk.RT_TABLE_MAIN and kind == bulk.RTN_UNICAST:
                return True
    return False


def _encode_routes(
    targets: Sequence[IpNetwork | None], gateway: IpAddress, index: int
) -> list[rtnl.Request]:
    """Routes through a gateway in a namespace; None stands for the default route."""
    family = bulk.family_of(gateway.packed)
    requests = []
    for target in targets:
        header = rtnl.RTMSG.pack(
            family,
            target.prefixlen if target else 0,
            0,
            0,
            bulk.RT_TABLE_MAIN,
            RTPROT_STATIC,
            bulk.RT_SCOPE_UNIVERSE,
            bulk.RTN_UNICAST,
            0,
        )
        body = header + rtnl.attr(bulk.RTA_GATEWAY, gateway.packed)
        body += rtnl.attr(bulk.RTA_OIF, rtnl.U32.pack(index))
        if target is not None:
            body += rtnl.attr(bulk.RTA_DST, target.network_address.packed)
        flags = rtnl.NLM_F_CREATE | rtnl.NLM_F_EXCL
        requests.append(rtnl.Request(rtnl.RTM_NEWROUTE, flags, body))
    return requests
