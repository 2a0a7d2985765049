"""pyroute2's IPRoute, typed: for links and single addresses.  Nothing else imports pyroute2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

if TYPE_CHECKING:
    from collections.abc import Callable


class RequestError(OSError):
    """The kernel's answer to a request, in its own words."""

    def __str__(self) -> str:
        return str(self.strerror)


class LinkSocket:
    """Requests on single links and addresses of the calling thread's network namespace.

    Raises:
        OSError: a netlink socket cannot be had.
    """

    def __init__(self) -> None:
        self._iproute: Any = IPRoute()

    def close(self) -> None:
        """Close the socket."""
        self._iproute.close()

    def link(self, verb: str, **options: object) -> None:
        """Add, set or delete ("del") a link, with pyroute2's names for attributes.

        Raises:
            RequestError: the kernel refused.
        """
        _ask(self._iproute.link, verb, options)

    def port(self, verb: str, **options: object) -> None:
        """Set a port of a bridge.

        Raises:
            RequestError: the kernel refused.
        """
        _ask(self._iproute.brport, verb, options)

    def address(self, verb: str, **options: object) -> None:
        """Add or delete ("del") an address.

        Raises:
            RequestError: the kernel refused.
        """
        _ask(self._iproute.addr, verb, options)

    def find_link(self, name: str) -> int | None:
        """Index of a link by its name."""
        found = self._iproute.link_lookup(ifname=name)
        return int(found[0]) if found else None


def _ask(request: Callable[..., object], verb: str, options: dict[str, object]) -> None:
    try:
        request(verb, **options)
    except NetlinkError as error:
        raise RequestError(error.code, str(error.args[-1])) from error
