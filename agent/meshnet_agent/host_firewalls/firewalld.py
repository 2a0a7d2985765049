"""firewalld: our links go into its zone "trusted", and tunnels' ports into the underlay's zone.

It is told over D-Bus, by ``busctl``, which is there with systemd.  What is changed is its runtime
configuration, which a reload forgets; nothing of ours is written to its files.

The agent may be in another network namespace than the firewalld that the bus leads to, as in a lab.
So firewalld's table must be in this one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from meshnet.state import NETWORK_LINK
from meshnet_agent.host_firewalls.programs import run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet_agent.host_firewalls import Openings
    from meshnet_agent.host_firewalls.rules import ForeignChain

_NAME = "org.fedoraproject.FirewallD1"
_PATH = "/org/fedoraproject/FirewallD1"
TRUSTED = "trusted"
TABLE = "firewalld"


class _RefusedError(Exception):
    """firewalld refused a call, or is not there; says why."""


class Firewalld:
    """`HostFirewall` of firewalld with its nftables backend."""

    async def bring(
        self, chains: Sequence[ForeignChain], wanted: Openings, before: Openings
    ) -> list[str]:
        """See `HostFirewall`."""
        if not any(chain.table == TABLE for chain in chains):
            return []
        try:
            await self._bring_links(wanted)
            await self._bring_ports(wanted, before)
        except _RefusedError as refused:
            return [f"firewalld drops packets of networks, and cannot be told otherwise: {refused}"]
        return [
            f"firewalld rejects what hosts send directly to endpoints of network {name}: allow its "
            "addresses in the underlay's zone, or create the network without --direct-routing"
            for name in wanted.direct
        ]

    async def _bring_links(self, wanted: Openings) -> None:
        held = await _call("zone", "getInterfaces", "s", TRUSTED)
        for link in wanted.links:
            # A zone that the operator has chosen stays.
            if not await _call("zone", "getZoneOfInterface", "s", link):
                await _call("zone", "addInterface", "ss", TRUSTED, link)
        for link in held:
            if NETWORK_LINK.fullmatch(link) and link not in wanted.links:
                await _call("zone", "removeInterface", "ss", TRUSTED, link)

    async def _bring_ports(self, wanted: Openings, before: Openings) -> None:
        gone = [port for port in before.ports if port not in wanted.ports]
        dev = wanted.underlay_dev or before.underlay_dev
        if not dev:
            return
        zone = await _call("zone", "getZoneOfInterface", "s", dev)
        zone = zone or await _call("", "getDefaultZone")
        for port in wanted.ports:
            if not await _call("zone", "queryPort", "sss", zone, str(port), "udp"):
                await _call("zone", "addPort", "sssi", zone, str(port), "udp", "0")
        for port in gone:
            if await self._is_ours(zone, str(port)):
                await _call("zone", "removePort", "sss", zone, str(port), "udp")

    async def _is_ours(self, zone: str, port: str) -> bool:
        """Whether an open port is not of the permanent configuration, which is the operator's."""
        if not await _call("zone", "queryPort", "sss", zone, port, "udp"):
            return False
        path = await _call("config", "getZoneByName", "s", zone, path=f"{_PATH}/config")
        return not await _call("config.zone", "queryPort", "ss", port, "udp", path=path)


async def _call(interface: str, method: str, *arguments: str, path: str = _PATH) -> Any:  # noqa: ANN401
    """Call a method of firewalld (firewalld.dbus(5)); returns what it returns.

    Raises:
        _RefusedError: it refused, or is not there.
    """
    full = f"{_NAME}.{interface}" if interface else _NAME
    argv = ["busctl", "--system", "--json=short", "--timeout=10", "call", _NAME, path, full, method]
    done = await run([*argv, *arguments])
    if not done.ok:
        raise _RefusedError(done.error)
    try:
        return json.loads(done.output)["data"][0]
    except (ValueError, LookupError, TypeError) as error:
        raise _RefusedError(f"busctl printed something else: {error}") from error
