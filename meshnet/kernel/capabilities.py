"""What this kernel can do: found out once, by asking it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from meshnet.kernel.drivers.iproute import RequestError
from meshnet.kernel.wire import bulk, rtnl
from meshnet.state import LinkKind

if TYPE_CHECKING:
    from meshnet.kernel.drivers.namespace import HostNamespace

_PROBE = "mnprobe"


class Capabilities:
    """What the kernel of a namespace can do.

    Args:
        vxlan: None: find out whether it has VXLAN; False: do not use it.
        nexthop_objects: None: find out whether it has them; False: act as if it had none.
    """

    def __init__(
        self, namespace: HostNamespace, *, vxlan: bool | None, nexthop_objects: bool | None
    ) -> None:
        self._namespace = namespace
        self._vxlan = vxlan
        self._nexthop_objects = nexthop_objects

    def has_nexthop_objects(self) -> bool:
        """Whether routes can share nexthop objects."""
        if self._nexthop_objects is None:
            # An id that nobody has: Linux before 5.3 does not even know the type of the message.
            socket = self._namespace.rtnl
            (answer,) = socket.ask([bulk.encode_nexthop_probe(socket.next_sequence)])
            refusal = answer.errno if isinstance(answer, rtnl.KernelError) else 0
            self._nexthop_objects = refusal != errno.EOPNOTSUPP
        return self._nexthop_objects

    def has_vxlan(self) -> bool:
        """Whether it can make a VXLAN device: found out by making one, if none is there."""
        # Making one is also what loads the module; to look for a loaded module would not do.
        if self._vxlan is None:
            seen = self._namespace.by_index.values()
            self._vxlan = any(link.kind is LinkKind.VXLAN for link in seen) or None
        if self._vxlan is None:
            iproute = self._namespace.iproute
            try:
                iproute.link("add", ifname=_PROBE, kind="vxlan", vxlan_id=1, vxlan_port=1)
                iproute.link("del", ifname=_PROBE)
            except RequestError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENODEV):
                    # Another reason, which may pass (a left-over of that name, a lack of memory):
                    # assume VXLAN for now and ask again next time.
                    return True
                self._vxlan = False
            else:
                self._vxlan = True
        return self._vxlan
