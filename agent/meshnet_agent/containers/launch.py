"""From a container's record to a process that waits, its networks attached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from meshnet.errors import ConflictError
from meshnet.ports import parse_all_published
from meshnet.runtime.engine.cgroups import has_unified_io, set_blkio_weight
from meshnet.runtime.engine.conmon import ATTACH, CONMON_PID, WINDOW_SIZE, Shim
from meshnet.runtime.spec.options import NO_NETWORKS, ContainerOptions, shared_with
from meshnet.runtime.spec.userns import parse_userns
from meshnet_agent.containers.bundle import Bundle, open_to_group
from meshnet_agent.containers.processes import identify
from meshnet_agent.containers.record import Record, State
from meshnet_agent.endpoints.request import AttachRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from meshnet.runtime.engine.oci_runtime import OciRuntime
    from meshnet_agent.api.documents import Document
    from meshnet_agent.containers.directory import Container, Registry

    Attach = Callable[[int, AttachRequest], Awaitable[Document]]


async def launch(
    container: Container, runtime: OciRuntime, registry: Registry, attach: Attach
) -> None:
    """Make the process; the caller holds the container's lock.

    Args:
        registry: of the containers whose namespaces it may join.
        attach: puts a process on a network.

    Raises:
        MeshnetError: a step failed; what was made is in the record and in the bundle.
    """
    record, bundle = container.record, container.bundle
    await trio.to_thread.run_sync(bundle.make)
    namespaces, etc = _namespaces(record, registry)
    await trio.to_thread.run_sync(bundle.mount, record, namespaces, etc, runtime.cgroup(record.id))
    pid = await _shim(container, runtime).create()
    await container.change_for_this_boot(
        process=identify(pid),
        shim=identify(int((bundle.run / CONMON_PID).read_text())),
    )
    if record.options.blkio_weight is not None and not has_unified_io():
        set_blkio_weight(pid, record.options.blkio_weight)
    for file, mode in ((ATTACH, 0o770), (WINDOW_SIZE, 0o660)):
        open_to_group(bundle.run / file, mode)
    await _attach_networks(container, pid, attach)
    if etc is None:
        await trio.to_thread.run_sync(bundle.write_etc, container.record)
    await container.change_for_this_boot(state=State.CREATED, exit_code=None, finished_s=None)


def _shim(container: Container, runtime: OciRuntime) -> Shim:
    return Shim(
        runtime=runtime,
        identity=container.record.id,
        bundle=container.bundle.run,
        log=container.bundle.log,
        exits=container.bundle.exits,
        tty=container.record.options.tty,
        stdin=container.record.options.interactive,
        log_max_bytes=container.record.options.log_max_bytes,
    )


async def _attach_networks(container: Container, pid: int, attach: Attach) -> None:
    record = container.record
    for number, network in enumerate(_own_networks(record.options)):
        name = record.name if number == 0 else f"{record.name}.{network}"[:63]
        request = AttachRequest(
            network=network,
            ifname=f"eth{number}",
            name=name,
            default_route=number == 0,
            publish=parse_all_published(record.options.publish) if number == 0 else (),
        )
        endpoint = await attach(pid, request)
        container.note(endpoints=(*container.record.endpoints, endpoint))


def _namespaces(record: Record, registry: Registry) -> tuple[dict[str, str | None], Bundle | None]:
    """Namespaces to join (see `Surroundings`), and whose files of /etc are shared."""
    options = record.options
    found: dict[str, str | None] = {}
    network = options.networks[0] if len(options.networks) == 1 else None
    for kind, file, word in (
        ("network", "net", network),
        ("pid", "pid", options.pid),
        ("ipc", "ipc", options.ipc),
        ("uts", "uts", options.uts),
    ):
        other = shared_with(word)
        found[kind] = None if word == "host" else ""
        if other is not None:
            process = registry.running(other).record.process
            assert process is not None
            found[kind] = f"/proc/{process.pid}/ns/{file}"
            if record.ids not in (None, registry.find(other).record.ids):
                raise ConflictError(
                    f"{kind} namespace of container {other} belongs to another user namespace: "
                    f"add --userns container:{other}"
                )
    if record.ids is not None:
        found["user"] = _user_namespace(record, registry)
    other = shared_with(network)
    return found, registry.find(other).bundle if other is not None else None


def _user_namespace(record: Record, registry: Registry) -> str:
    """That of another container, or empty: a new one."""
    other = parse_userns(record.options.userns).container
    if other is None:
        return ""
    joined = registry.running(other).record
    if joined.ids != record.ids:
        raise ConflictError(
            f"container {other} has other ids than before: remove {record.name}, whose files "
            "have those"
        )
    assert joined.process is not None
    return f"/proc/{joined.process.pid}/ns/user"


def _own_networks(options: ContainerOptions) -> tuple[str, ...]:
    words = options.networks
    return tuple(w for w in words if w not in NO_NETWORKS and shared_with(w) is None)
