"""Addresses on our links."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshnet.kernel.drivers.writing import write_each
from meshnet.kernel.wire import links, rtnl
from meshnet.state import AddressKey, LinkKind, format_ip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.kernel.drivers.namespace import HostNamespace
    from meshnet.state import KernelState
    from meshnet.tables import Failure, Op


class AddressDriver:
    """`meshnet.kernel.drivers.Driver` of addresses of global scope."""

    def __init__(self, namespace: HostNamespace) -> None:
        self._namespace = namespace

    def dump(self, state: KernelState) -> None:
        """See `meshnet.kernel.drivers.Driver`."""
        names = self._namespace.names()
        messages = self._namespace.rtnl.dump(rtnl.RTM_GETADDR, links.address_dump())
        for info in links.decode_addresses(messages):
            if info.scope != rtnl.RT_SCOPE_UNIVERSE:
                continue
            dev = names.get(info.ifindex, "")
            if dev in state.links and state.links[dev].kind is not LinkKind.VETH:
                state.addresses[AddressKey(dev, info.address, info.prefix_length)] = True

    def write(self, ops: Sequence[Op]) -> list[Failure]:
        """See `meshnet.kernel.drivers.Driver`."""
        return write_each(self._namespace, self._write, ops)

    def _write(self, op: Op) -> None:
        key: AddressKey = op.key
        delete = op.value is None
        options: dict[str, Any] = {
            "index": self._namespace.indices[key.dev],
            "address": format_ip(key.address),
            "prefixlen": key.prefix_length,
        }
        if len(key.address) == 16 and not delete:
            # No duplicate address detection: nobody else can have the address, and it could not be
            # used for a second or two.
            options["flags"] = links.IFA_F_NODAD
        self._namespace.iproute.address("del" if delete else "add", **options)
