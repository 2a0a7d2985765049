"""Routes in an endpoint's namespace: those through its gateways, and who has the default route.

linux/rtnetlink.h.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from meshnet.kernel.wire import bulk, rtnl
from meshnet.kernel.wire.host_routes import RTPROT_STATIC

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.model import IpAddress, IpNetwork

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


def has_default_route(inner: rtnl.RtnlSocket, version: int) -> bool:
    """Whether the namespace of a socket has a default route of an IP version, whoever made it."""
    body = rtnl.RTMSG.pack(_FAMILIES[version], 0, 0, 0, bulk.RT_TABLE_MAIN, 0, 0, 0, 0)
    for data, start, _ in inner.dump(rtnl.RTM_GETROUTE, body):
        header = rtnl.RTMSG.unpack_from(data, start)
        length, table, kind = header[1], header[4], header[7]
        if not length and table == bulk.RT_TABLE_MAIN and kind == bulk.RTN_UNICAST:
            return True
    return False


def encode_inner_routes(
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
            rtnl.RT_SCOPE_UNIVERSE,
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
