"""The containers of this host by name and id, and what others see of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from meshnet.errors import ConflictError, KernelRefusedError, NotFoundError, UsageError
from meshnet_agent.containers.record import ContainerRecord, State, save

if TYPE_CHECKING:
    from meshnet.model import Endpoint
    from meshnet_agent.containers.bundle.bundle import Bundle
    from meshnet_agent.containers.networking import Networking


class Container:
    """One container and what is under way with it.

    Attributes:
        lock: held during a step of its life.
        ended: set when it has ended for good, restarts included, and everything is put away.
        trouble: what could not be done at its end, and is tried again; None: nothing.
    """

    def __init__(self, record: ContainerRecord, bundle: Bundle) -> None:
        self.record = record
        self.bundle = bundle
        self.lock = trio.Lock()
        self.ended = trio.Event()
        self.trouble: str | None = None
        self._writing = trio.Lock()

    def note(self, **fields: object) -> None:
        """Change the record in memory only, where what is on disk leads to the same clean-up."""
        self.record = replace(self.record, **fields)  # type: ignore[arg-type]

    async def change(self, **fields: object) -> None:
        """Change the record, here and on disk.

        Raises:
            KernelRefusedError: the disk refused; here it is changed all the same.
        """
        await self._change(fields, keep=True)

    async def change_for_this_boot(self, **fields: object) -> None:
        """The same, for what means nothing after a power cut, which may undo it."""
        await self._change(fields, keep=False)

    async def _change(self, fields: dict[str, object], *, keep: bool) -> None:
        self.note(**fields)
        async with self._writing:  # two writers at once would share a draft
            write = partial(save, self.bundle.state, self.record, keep=keep)
            try:
                await trio.to_thread.run_sync(write)
            except OSError as error:
                raise KernelRefusedError(
                    f"container {self.record.name} cannot be recorded in {self.bundle.state}: "
                    f"{error.strerror}: make room on that file system, or see what it says"
                ) from error


class ContainerDirectory:
    """All containers of this host."""

    def __init__(self) -> None:
        self._containers: dict[str, Container] = {}

    def add(self, container: Container) -> None:
        """Add a container.

        Raises:
            ConflictError: another has its name.
        """
        record = container.record
        if any(c.record.name == record.name for c in self._containers.values()):
            raise ConflictError(
                f"container name {record.name} is taken: choose another, or remove that one"
            )
        self._containers[record.id] = container

    def report(self) -> list[str]:
        """What could not be done at the end of a container, and is tried again."""
        return [c.trouble for c in self._containers.values() if c.trouble is not None]

    def drop(self, container: Container) -> None:
        """Forget one.  Idempotent."""
        self._containers.pop(container.record.id, None)

    def __contains__(self, container: Container) -> bool:
        return container.record.id in self._containers

    def all(self) -> list[Container]:
        """All containers."""
        return list(self._containers.values())

    def records(self) -> list[ContainerRecord]:
        """The records of all containers."""
        return [c.record for c in self._containers.values()]

    def find(self, name: str) -> Container:
        """A container by its name, its id, or the beginning of the id.

        Raises:
            NotFoundError: there is no such container.
            UsageError: several ids begin with it.
        """
        for container in self._containers.values():
            if name in (container.record.name, container.record.id):
                return container
        found = [c for i, c in self._containers.items() if name and i.startswith(name)]
        if not found:
            raise NotFoundError(f"container {name} does not exist: meshnet ps -a lists them")
        if len(found) > 1:
            raise UsageError(f"{len(found)} containers' ids begin with {name}: give more of it")
        return found[0]

    def running(self, name: str) -> Container:
        """A container that runs.

        Raises:
            NotFoundError: there is no such container.
            ConflictError: it does not run.
        """
        container = self.find(name)
        if container.record.state is not State.RUNNING or container.record.process is None:
            raise ConflictError(f"container {name} does not run: meshnet ps -a shows its state")
        return container


@dataclass(frozen=True, slots=True)
class ContainerView:
    """One container at one moment.

    Attributes:
        endpoints: those in its network namespace, whoever made them; none if the namespace is not
            its own.
    """

    record: ContainerRecord
    bundle: Bundle
    endpoints: tuple[Endpoint, ...]

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks it is on; without a process or namespace of its own, those it asks for."""
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
