"""What all drivers share: sockets in one network namespace, and its links as last seen."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from meshnet.kernel.drivers.iproute import LinkSocket
from meshnet.kernel.wire import links, rtnl
from meshnet.kernel.wire.nftnl import NftSocket

if TYPE_CHECKING:
    from meshnet.kernel.events import NeighbourId
    from meshnet.kernel.wire.links import LinkInfo


class HostNamespace:
    """The calling thread's network namespace.

    Attributes:
        rtnl: for tables with thousands of rows (`meshnet.kernel.wire.bulk`).
        nft: for elements and counters.
        iproute: for links and single addresses.
        indices: of all links by name, as last dumped, updated by what was made and removed since.
        by_index: all links as last dumped.
        forwarding_links: names of the host's own links that packets may come by.
        ra_links: those that listen to router advertisements, and "default".
        writes: requests that changed, or tried to change, something.
        deleted: see `meshnet.kernel.netlink.NetlinkKernel`.

    Raises:
        OSError: a netlink socket cannot be had.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as undo:
            self.rtnl = rtnl.RtnlSocket()
            undo.callback(self.rtnl.close)
            self.nft = NftSocket()
            undo.callback(self.nft.close)
            self.iproute = LinkSocket()
            undo.pop_all()
        self.indices: dict[str, int] = {}
        self.by_index: dict[int, LinkInfo] = {}
        self.forwarding_links: tuple[str, ...] = ()
        self.ra_links: tuple[str, ...] = ()
        self.writes = 0
        self.deleted: set[NeighbourId] = set()

    def close(self) -> None:
        """Close the sockets."""
        self.rtnl.close()
        self.nft.close()
        self.iproute.close()

    def look_at_links(self) -> None:
        """Dump all links, whoever made them."""
        messages = self.rtnl.dump(rtnl.RTM_GETLINK, links.link_dump())
        self.by_index = {link.ifindex: link for link in map(links.decode_link, messages)}
        self.indices = {link.name: link.ifindex for link in self.by_index.values()}

    def names(self) -> dict[int, str]:
        """Names of all links by index, as last dumped."""
        return {ifindex: link.name for ifindex, link in self.by_index.items()}
