"""The document of ``meshnet status`` (docs/cli.md); `meshnet_agent.api.status` builds it."""

from __future__ import annotations

from typing import Literal

import msgspec

from meshnet.model import NetworkName  # noqa: TC001  (msgspec reads it)
from meshnet.modes import Mode  # noqa: TC001  (msgspec reads it)


class StatusHostDocument(msgspec.Struct, frozen=True, kw_only=True):
    """This host.

    Attributes:
        vtep_engine: what carries the packets of userspace VTEPs that are started from now on; None:
            it can have none.
    """

    id: str
    underlay_ip: str
    vtep_engine: str | None


class StoreDocument(msgspec.Struct, frozen=True, kw_only=True):
    """How well this host hears the store.

    Attributes:
        connected: the watch runs, and the lease was renewed.
        lag_s: seconds since the store was last heard from.
        from_disk_s: seconds since what this agent goes by was saved on its disk, while the store
            has not answered since its start; else None.
        error: why the watch does not run.
    """

    connected: bool
    revision: int
    lag_s: float
    from_disk_s: int | None
    error: str | None


class FallenDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A peer in fallback, why, and for how many seconds."""

    host: str
    why: str
    since_s: float


class RoundTripDocument(msgspec.Struct, frozen=True, kw_only=True):
    """Round trips of the last probe to each peer, in milliseconds; None before the first answer."""

    p50: float | None
    max: float | None


class ProbesDocument(msgspec.Struct, frozen=True, kw_only=True):
    """VXLAN probes of a network since the agent started."""

    sent: int
    lost: int
    rtt_ms: RoundTripDocument


class NetworkStatusDocument(msgspec.Struct, frozen=True, kw_only=True):
    """How a network is doing on this host.

    Attributes:
        peers: other hosts with a subnet of it.
        endpoints: of this host.
        pending: work that is left, counted over all networks.
        probes: None without a fallback.
    """

    name: str
    mode: Mode
    peers: int
    endpoints: int
    in_sync: bool
    pending: int
    errors: list[str]
    fallen: list[FallenDocument]
    probes: ProbesDocument | None


class SetAsideDocument(msgspec.Struct, frozen=True, kw_only=True):
    """An address that a machine outside the mesh answered for, and that machine's MAC."""

    network: NetworkName
    address: str
    mac: str


class BadValueDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A key of the store whose value cannot be used, and why."""

    key: str
    reason: str


class LastPassDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The last pass, and where its time went."""

    scope: Literal["all", "part"]
    seconds: float
    observe_s: float
    dump_s: float
    plan_s: float
    diff_s: float
    apply_s: float


class KernelDocument(msgspec.Struct, frozen=True, kw_only=True):
    """Passes and writes since the agent started."""

    passes: int
    full_passes: int
    writes: int
    last: LastPassDocument


class StatusDocument(msgspec.Struct, frozen=True, kw_only=True):
    """How a host is doing.

    Attributes:
        errors: failures outside of any network, and why no pass can run.
        notes: what an operator should know but is not an error.
        drops: packets that the host's firewall dropped, by reason.
    """

    host: StatusHostDocument
    store: StoreDocument
    networks: list[NetworkStatusDocument]
    set_aside: list[SetAsideDocument]
    bad_values: list[BadValueDocument]
    errors: list[str]
    notes: list[str]
    drops: dict[str, int]
    kernel: KernelDocument
