"""The containers of this host by name and id, and as others see one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from meshnet.errors import ConflictError, NotFoundError, UsageError
from meshnet_agent.containers.record import ContainerRecord, State, save

if TYPE_CHECKING:
    from meshnet.model import Endpoint
    from meshnet_agent.containers.bundle.bundle import Bundle
    from meshnet_agent.containers.networking import Networking


class Container:
    """One container and what is going on with it.

    Attributes:
        lock: held while a step of its life is under way.
        ended: set when it has ended for good, restarts included, and everything is put away.
    """

    def __init__(self, record: ContainerRecord, bundle: Bundle) -> None:
        self.record = record
        self.bundle = bundle
        self.lock = trio.Lock()
        self.ended = trio.Event()
        self._writing = trio.Lock()

    def note(self, **fields: object) -> None:
        """Change the record here only, where what is on disk leads to the same clean-up."""
        self.record = replace(self.record, **fields)  # type: ignore[arg-type]

    async def change(self, **fields: object) -> None:
        """Change the record, here and on disk."""
        await self._change(fields, keep=True)

    async def change_for_this_boot(self, **fields: object) -> None:
        """The same, for what means nothing after a power cut: it may be lost in one."""
        await self._change(fields, keep=False)

    async def _change(self, fields: dict[str, object], *, keep: bool) -> None:
        self.note(**fields)
        async with self._writing:  # two writers at once would share a draft
            await trio.to_thread.run_sync(partial(save, self.bundle.state, self.record, keep=keep))


class ContainerDirectory:
    """All containers of this host."""

    def __init__(self) -> None:
        self._containers: dict[str, Container] = {}

    def add(self, container: Container) -> None:
        """Take one in.

        Raises:
            ConflictError: another has its name.
        """
        record = container.record
        if any(c.record.name == record.name for c in self._containers.values()):
            raise ConflictError(
                f"container name {record.name} is taken: choose another, or remove that"
            )
        self._containers[record.id] = container

    def drop(self, container: Container) -> None:
        """Forget one.  Idempotent."""
        self._containers.pop(container.record.id, None)

    def __contains__(self, container: Container) -> bool:
        return container.record.id in self._containers

    def all(self) -> list[Container]:
        """All containers."""
        return list(self._containers.values())

    def records(self) -> list[ContainerRecord]:
        """Of all containers."""
        return [c.record for c in self._containers.values()]

    def find(self, name: str) -> Container:
        """A container by its name, its id, or the beginning of the id.

        Raises:
            NotFoundError: there is none.
            UsageError: several ids begin so.
        """
        for container in self._containers.values():
            if name in (container.record.name, container.record.id):
                return container
        found = [c for i, c in self._containers.items() if name and i.startswith(name)]
        if not found:
            raise NotFoundError(f"container {name} does not exist: meshnet ps -a lists them")
        if len(found) > 1:
            raise UsageError(f"{name} begins {len(found)} containers' ids: give more of it")
        return found[0]

    def running(self, name: str) -> Container:
        """A container that runs.

        Raises:
            NotFoundError, ConflictError: there is none, or it does not run.
        """
        container = self.find(name)
        if container.record.state is not State.RUNNING or container.record.process is None:
            raise ConflictError(f"container {name} does not run: meshnet ps -a shows its state")
        return container


@dataclass(frozen=True, slots=True)
class ContainerView:
    """One container at one moment.

    Attributes:
        endpoints: those in its network namespace, whoever made them; none where that is not its
            own.
    """

    record: ContainerRecord
    bundle: Bundle
    endpoints: tuple[Endpoint, ...]

    @property
    def networks(self) -> tuple[str, ...]:
        """Those it is on; while it has no process or no namespace of its own, those it asks for."""
        wanted = self.record.options.networks
        if self.record.process is None or self.record.shares_network:
            return wanted
        attached = tuple(e.network for e in self.endpoints)
        return attached or tuple(n for n in wanted if n == "none")


def view_of(container: Container, networking: Networking) -> ContainerView:
    """The container now."""
    record = container.record
    endpoints: tuple[Endpoint, ...] = ()
    if record.process is not None and not record.shares_network:
        endpoints = tuple(networking.endpoints_of(record.process.pid))
    return ContainerView(record, container.bundle, endpoints)
