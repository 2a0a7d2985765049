"""Makes of a container's record a process that waits, with its networks attached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from meshnet.errors import ConflictError
from meshnet.ports import parse_all_published
from meshnet.runtime.engine.cgroups import has_unified_io, set_blkio_weight
from meshnet.runtime.engine.conmon import CONMON_PID, Shim
from meshnet.runtime.spec.options import NO_NETWORKS, ContainerOptions, shared_with
from meshnet.runtime.spec.userns import parse_userns
from meshnet.system.group import open_to_group
from meshnet_agent.containers.bundle.etc import write_etc
from meshnet_agent.containers.processes import identify
from meshnet_agent.containers.record import ContainerEndpoint, ContainerRecord, State
from meshnet_agent.endpoints.request import AttachRequest

if TYPE_CHECKING:
    from meshnet.runtime.engine.oci_runtime import OciRuntime
    from meshnet_agent.containers.bundle.bundle import Bundle
    from meshnet_agent.containers.directory import Container, ContainerDirectory
    from meshnet_agent.containers.networking import Networking


async def launch(
    container: Container,
    runtime: OciRuntime,
    directory: ContainerDirectory,
    networking: Networking,
) -> None:
    """Make the process; the caller holds the container's lock.

    Args:
        directory: the containers whose namespaces this one may join.

    Raises:
        MeshnetError: a step failed; what was made is in the record and in the bundle.
    """
    record, bundle = container.record, container.bundle
    await trio.to_thread.run_sync(bundle.make)
    namespaces, etc = _namespaces(record, directory)
    await trio.to_thread.run_sync(bundle.mount, record, namespaces, etc, runtime.cgroup(record.id))
    pid = await _shim(container, runtime).create()
    # On disk before anything else: an agent that is killed now must find the process again.
    await container.change_for_this_boot(
        process=identify(pid),
        shim=identify(int((bundle.run / CONMON_PID).read_text())),
    )
    # Not left to the runtime: crun knows only the scheduler cfq, which Linux 5.0 removed.
    if record.options.blkio_weight is not None and not has_unified_io():
        set_blkio_weight(pid, record.options.blkio_weight)
    open_to_group(bundle.attach, 0o770)
    open_to_group(bundle.window, 0o660)
    await _attach_networks(container, pid, networking)
    if etc is None:
        # Again, since the addresses are known only now.
        await trio.to_thread.run_sync(write_etc, bundle.state, container.record)
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


async def _attach_networks(container: Container, pid: int, networking: Networking) -> None:
    record = container.record
    for number, network in enumerate(_own_networks(record.options)):
        name = record.name if number == 0 else f"{record.name}.{network}"[:63]  # the longest name
        request = AttachRequest(
            network=network,
            ifname=f"eth{number}",
            name=name,
            publish=parse_all_published(record.options.publish) if number == 0 else (),
        )
        endpoint = await networking.attach(pid, request)
        made = ContainerEndpoint(
            id=endpoint.id,
            network=endpoint.network,
            pid=pid,
            addresses=tuple(str(a.ip) for a in endpoint.addresses),
        )
        # Not written yet: after a crash the endpoint goes with its process all the same.
        container.note(endpoints=(*container.record.endpoints, made))


def _namespaces(
    record: ContainerRecord, directory: ContainerDirectory
) -> tuple[dict[str, str | None], Bundle | None]:
    """Namespaces to join (see `Surroundings`), and the bundle whose files of /etc to share."""
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
            process = directory.running(other).record.process
            assert process is not None
            found[kind] = f"/proc/{process.pid}/ns/{file}"
            if record.ids not in (None, directory.find(other).record.ids):
                # The kernel lets a process join a namespace only with rights in its owner.
                raise ConflictError(
                    f"{kind} namespace of container {other} belongs to another user namespace: "
                    f"add --userns container:{other}"
                )
    if record.ids is not None:
        found["user"] = _user_namespace(record, directory)
    other = shared_with(network)
    return found, directory.find(other).bundle if other is not None else None


def _user_namespace(record: ContainerRecord, directory: ContainerDirectory) -> str:
    """The user namespace of another container; empty: a new one."""
    other = parse_userns(record.options.userns).container
    if other is None:
        return ""
    joined = directory.running(other).record
    if joined.ids != record.ids:
        raise ConflictError(
            f"container {other} has other ids than before, and the files of {record.name} still "
            f"have the old ones: remove {record.name} and run it again"
        )
    assert joined.process is not None
    return f"/proc/{joined.process.pid}/ns/user"


def _own_networks(options: ContainerOptions) -> tuple[str, ...]:
    words = options.networks
    return tuple(w for w in words if w not in NO_NETWORKS and shared_with(w) is None)
