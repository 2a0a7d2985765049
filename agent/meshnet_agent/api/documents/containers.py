"""Documents of containers and of the programs that run in them (docs/cli.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from meshnet.runtime.engine.oci_runtime import exit_status_of
from meshnet.runtime.spec.id_ranges import IdRange  # noqa: TC001  (msgspec reads it)
from meshnet.runtime.spec.mount_points import MountPoint  # noqa: TC001  (msgspec reads it)
from meshnet.runtime.spec.options import ContainerOptions, parse_label
from meshnet_agent.api.documents.endpoints import EndpointDocument, endpoint_document

if TYPE_CHECKING:
    from typing import Any

    from meshnet.runtime.engine.cgroups import Usage
    from meshnet.runtime.engine.conmon import StartError
    from meshnet_agent.containers.directory import ContainerView
    from meshnet_agent.containers.execs import ExecSession
    from meshnet_agent.containers.record import ContainerRecord


class ContainerDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A container, as ``ps`` shows it."""

    id: str
    name: str
    pid: int | None
    state: str
    exit_code: int | None
    image: str | None
    networks: tuple[str, ...]
    command: tuple[str, ...]
    labels: dict[str, str]
    endpoints: tuple[EndpointDocument, ...]
    restarts: int
    error: str | None
    created_s: float
    started_s: float | None
    finished_s: float | None


class ContainerDetails(ContainerDocument, frozen=True, kw_only=True):
    """A container, with all that the agent knows of it: ``inspect``."""

    options: ContainerOptions
    image_id: str | None
    ids: IdRange | None
    mount_points: tuple[MountPoint, ...]
    log: str
    attach: str
    window: str
    exit_file: str


class UsageDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What a running container uses: ``stats``."""

    name: str
    cpu_s: float
    throttled: int
    throttled_s: float
    memory_bytes: int
    memory_limit_bytes: int | None
    pids: int
    rx_bytes: int
    tx_bytes: int


class EndedDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A container that has ended for good: ``wait``."""

    name: str
    exit_code: int | None


class NotStartedDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A program that could not be started, and the status that says so."""

    failed: str
    exit_status: int


class ExecDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A program that waits for its client in a container."""

    id: str
    attach: str
    window: str
    exit_file: str


class ExecStartedDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A program that was started in a container."""

    pid: int


class ExecEndedDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A program that has ended in a container."""

    exit_code: int | None


def container_document(view: ContainerView) -> ContainerDocument:
    """The container, as ``ps`` shows it."""
    return ContainerDocument(**_fields(view))


def container_details(view: ContainerView) -> ContainerDetails:
    """The container, as ``inspect`` shows it."""
    record, bundle = view.record, view.bundle
    return ContainerDetails(
        **_fields(view),
        options=record.options,
        image_id=record.image_id,
        ids=record.ids,
        mount_points=record.mount_points,
        log=str(bundle.log),
        attach=str(bundle.attach),
        window=str(bundle.window),
        exit_file=str(bundle.exit_file),
    )


def _fields(view: ContainerView) -> dict[str, Any]:
    """What both documents of a container have."""
    record = view.record
    return {
        "id": record.id,
        "name": record.name,
        "pid": record.process.pid if record.process is not None else None,
        "state": record.state,
        "exit_code": record.exit_code,
        "image": record.options.image or record.options.rootfs,
        "networks": view.networks,
        "command": record.args,
        "labels": dict(map(parse_label, record.options.labels)),
        "endpoints": tuple(map(endpoint_document, view.endpoints)),
        "restarts": record.restarts,
        "error": record.error,
        "created_s": record.created_s,
        "started_s": record.started_s,
        "finished_s": record.finished_s,
    }


def usage_document(record: ContainerRecord, usage: Usage) -> UsageDocument:
    """What a container uses."""
    return UsageDocument(
        name=record.name,
        cpu_s=usage.cpu_s,
        throttled=usage.throttled,
        throttled_s=usage.throttled_s,
        memory_bytes=usage.memory_bytes,
        memory_limit_bytes=usage.memory_limit_bytes,
        pids=usage.pids,
        rx_bytes=usage.rx_bytes,
        tx_bytes=usage.tx_bytes,
    )


def ended_document(record: ContainerRecord) -> EndedDocument:
    """How a container ended."""
    return EndedDocument(name=record.name, exit_code=record.exit_code)


def not_started_document(error: StartError) -> NotStartedDocument:
    """Why a program could not be started; an ordinary answer, not an error of the API."""
    return NotStartedDocument(failed=str(error), exit_status=exit_status_of(str(error)))


def exec_document(session: ExecSession) -> ExecDocument:
    """Where the client of a program attaches."""
    return ExecDocument(
        id=session.id,
        attach=str(session.attach),
        window=str(session.window),
        exit_file=str(session.exit_file),
    )
