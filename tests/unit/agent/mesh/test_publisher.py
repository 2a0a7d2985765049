"""Publishing endpoints: what removes their keys while they are listed is made good, too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import trio

from meshnet_agent.mesh.publisher import Publisher
from meshnet_agent.tasks.flag import Flag
from tests.unit.mesh import until
from tests.values import ME, make_endpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class _Registry:
    """The keys of one host; a listing takes until it may end."""

    def __init__(self) -> None:
        self.keys: dict[str, bytes] = {}
        self.listing, self.may_end = trio.Event(), trio.Event()

    async def list_published(self, _network: str, _host: str) -> Mapping[str, bytes]:
        found = dict(self.keys)
        self.listing.set()
        await self.may_end.wait()
        return found

    async def publish(self, puts: Mapping[str, bytes], deletes: Sequence[str]) -> None:
        self.keys |= puts
        for key in deletes:
            del self.keys[key]


async def _checked() -> None:
    await trio.lowlevel.checkpoint()


async def test_a_refresh_while_keys_are_listed_is_not_forgotten() -> None:
    """``host rm`` took the keys away between the listing and its end."""
    registry, changed = _Registry(), Flag()
    mesh: Any = SimpleNamespace(
        connected=True, check_store=_checked, snapshot=SimpleNamespace(networks=["prod"])
    )
    endpoints: Any = SimpleNamespace(all=[make_endpoint()], changed=changed)
    publisher = Publisher(cast("Any", registry), mesh, endpoints, ME)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publisher.run)
        registry.may_end.set()
        changed.set()
        await until(lambda: bool(registry.keys), "the endpoint is published")
        registry.listing, registry.may_end = trio.Event(), trio.Event()
        publisher.refresh()
        await registry.listing.wait()
        registry.keys.clear()
        publisher.refresh()
        registry.may_end.set()
        await until(lambda: bool(registry.keys), "the endpoint is published")
        nursery.cancel_scope.cancel()
