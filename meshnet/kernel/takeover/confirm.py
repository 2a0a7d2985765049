"""Whether the world still answers: the gateway by ARP or neighbour discovery, etcd by TCP."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import trio

from meshnet.errors import KernelRefusedError
from meshnet.kernel.address_probe import WireProber

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.model import IpAddress

ETCD = "etcd"
_AGAIN_S = 0.05


async def find_silent(
    link: str, gateways: Sequence[IpAddress], etcd: Sequence[tuple[str, int]], deadline_s: float
) -> list[str]:
    """Those that should answer within a time and do not, as `name_of` and `ETCD` name them.

    Args:
        link: the link by which to ask the gateways.
        etcd: host and port of its members, of which one is enough; empty: etcd is not asked.
    """
    silent = {name_of(gateway) for gateway in gateways} | ({ETCD} if etcd else set())

    async def ask_gateway(gateway: IpAddress) -> None:
        while True:
            if await _answers(link, gateway):
                break
            await trio.sleep(_AGAIN_S)
        silent.discard(name_of(gateway))

    async def ask_etcd() -> None:
        for host, port in itertools.cycle(etcd):
            if await _connects(host, port):
                break
            await trio.sleep(_AGAIN_S)
        silent.discard(ETCD)

    with trio.move_on_after(deadline_s):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_etcd)
            for gateway in gateways:
                nursery.start_soon(ask_gateway, gateway)
    return sorted(silent)


def name_of(gateway: IpAddress) -> str:
    """A gateway in words."""
    return f"gateway {gateway}"


async def _answers(link: str, gateway: IpAddress) -> bool:
    try:
        return await WireProber().probe(link, gateway) is not None
    except KernelRefusedError:
        return False


async def _connects(host: str, port: int) -> bool:
    try:
        with trio.fail_after(1):
            await (await trio.open_tcp_stream(host, port)).aclose()
    except (OSError, trio.TooSlowError):
        return False
    return True
