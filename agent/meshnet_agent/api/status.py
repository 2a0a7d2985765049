"""From a report on all parts to the document of ``meshnet status``.

Pure: reads nothing but the report.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from meshnet.model import EndpointId
from meshnet.plan import NetworkOutcome
from meshnet.state import endpoint_link_name
from meshnet_agent.api.documents.status import (
    BadValueDocument,
    FallenDocument,
    KernelDocument,
    LastPassDocument,
    NetworkStatusDocument,
    ProbesDocument,
    RoundTripDocument,
    SetAsideDocument,
    StatusDocument,
    StatusHostDocument,
    StoreDocument,
)
from meshnet_agent.dataplane.problems import sort_failures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.model import Network
    from meshnet.tables import Failure
    from meshnet_agent.api.reports import StatusReport
    from meshnet_agent.dataplane.fallback import FallbackReport, Statistics
    from meshnet_agent.dataplane.reconciler import PassesReport

_SHOWN_ERRORS = 20
_SHOWN_HOSTS = 5
_NO_NEXTHOP_OBJECTS = (
    "this kernel has no nexthop objects: routes name their gateways, which takes Linux ever longer "
    "the more hosts there are; run Linux 5.3 or newer"
)


def status_document(report: StatusReport) -> StatusDocument:
    """The document of how a host is doing."""
    snapshot, store, host = report.snapshot, report.store, report.membership.host
    networks = snapshot.networks.values()
    per_network, other = sort_failures(report.passes.result.failures, networks)
    bad_values = {**snapshot.bad_values, **report.pool.bad_values}
    return StatusDocument(
        host=StatusHostDocument(
            id=host.id, underlay_ip=str(host.underlay_ip), vtep_engine=report.vtep_engine
        ),
        store=StoreDocument(
            connected=store.connected and report.membership.lease_ok,
            revision=snapshot.revision,
            lag_s=round(store.lag_s, 3),
            from_disk_s=round(store.from_disk_s) if store.from_disk_s is not None else None,
            error=store.error,
        ),
        networks=[
            _network_document(report, network, per_network[network.name])
            for network in snapshot.networks.values()
        ],
        set_aside=[
            SetAsideDocument(network=name, address=str(address), mac=mac.hex(":"))
            for name, address, mac in report.pool.set_aside
        ],
        bad_values=[BadValueDocument(key=key, reason=why) for key, why in bad_values.items()],
        errors=[
            *([report.passes.blocked] if report.passes.blocked else []),
            *map(_unreadable, sorted(report.endpoints.unreadable)),
            *report.container_errors,
            *(f"nothing is deleted while {key} cannot be read" for key in snapshot.holes),
            *_some([str(f) for f in other]),
        ],
        notes=_notes(report),
        drops=dict(report.drops),
        kernel=_kernel_document(report.passes),
    )


def _network_document(
    report: StatusReport, network: Network, failures: Sequence[Failure]
) -> NetworkStatusDocument:
    outcome = report.passes.result.networks.get(network.name) or NetworkOutcome()
    mine = [e for e in report.endpoints.all if e.network == network.name]
    unhealed = report.endpoints.unhealed
    refusal = report.membership.refusals.get(network.name)
    errors = [
        *([str(refusal)] if refusal is not None else []),
        *outcome.errors,
        *_some(list(outcome.peer_errors.values())),
        *_some([str(f) for f in failures]),
        *report.pool.errors.get(network.name, ()),
        *(f"endpoint {e.name}: {unhealed[e.id]}" for e in mine if e.id in unhealed),
    ]
    found = report.fallback
    return NetworkStatusDocument(
        name=network.name,
        mode=network.mode,
        peers=outcome.peers,
        endpoints=len(mine),
        in_sync=report.passes.in_sync and outcome.plan is not None and not errors,
        pending=report.passes.pending,
        errors=errors,
        fallen=_fallen_documents(network, found),
        probes=_probes_document(found.of(network.name)) if network.fallback else None,
    )


def _fallen_documents(network: Network, found: FallbackReport) -> list[FallenDocument]:
    if not network.fallback:
        return []
    return [
        FallenDocument(host=host, why=fall.why, since_s=round(found.now - fall.since, 1))
        for (name, host), fall in sorted(found.falls.items())
        if name == network.name
    ]


def _probes_document(found: Statistics) -> ProbesDocument:
    return ProbesDocument(
        sent=found.sent,
        lost=found.lost,
        rtt_ms=RoundTripDocument(p50=found.rtt_p50_ms, max=found.rtt_max_ms),
    )


def _kernel_document(passes: PassesReport) -> KernelDocument:
    last = passes.result
    return KernelDocument(
        passes=passes.passes,
        full_passes=passes.full_passes,
        writes=passes.writes,
        last=LastPassDocument(
            scope=last.scope,
            seconds=round(last.seconds, 4),
            **{stage: round(s, 4) for stage, s in asdict(last.stages).items()},
        ),
    )


def _notes(report: StatusReport) -> list[str]:
    """What an operator should know, and is not an error."""
    notes = [*report.port_notes, *report.firewall_notes]
    notes += [f"{name} runs no containers here: {why}" for name, why in report.passed_over.items()]
    dead = sorted(report.dead)
    if dead:
        some = ", ".join(dead[:_SHOWN_HOSTS]) + (", …" if len(dead) > _SHOWN_HOSTS else "")
        notes.append(f"no agent runs on {some}, or it does not reach etcd: see meshnet hosts")
    underlay = report.passes.result.underlay
    if underlay is not None and not underlay.nexthop_objects:
        notes.append(_NO_NEXTHOP_OBJECTS)
    return notes


def _some(errors: list[str]) -> list[str]:
    """The first errors, and how many more there are: one cause can have ten thousand."""
    left = len(errors) - _SHOWN_ERRORS
    return [*errors[:_SHOWN_ERRORS], *([f"and {left} more like these"] if left > 0 else [])]


def _unreadable(identity: str) -> str:
    return (
        f"the record of endpoint {identity} could not be read and is set aside, as {identity}.bad "
        "in the state directory: its packets are dropped; put it right and start the agent anew, "
        f"or end the process behind {endpoint_link_name(EndpointId(identity))}"
    )
