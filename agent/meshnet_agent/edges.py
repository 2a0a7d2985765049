"""Opens the real things that the agent depends on: store, kernel, disk, processes."""

from __future__ import annotations

import contextlib
import random
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from meshnet.errors import NotFoundError, UsageError
from meshnet.kernel.address_probe import WireProber
from meshnet.kernel.elements import WiredElements
from meshnet.kernel.events import EventFilter
from meshnet.kernel.takeover.process import TakeoverProcesses
from meshnet.kernel.vteps import VtepProcesses
from meshnet.model import Datapath
from meshnet.vtep.native import library
from meshnet_agent.dataplane.monitor import NetlinkEvents
from meshnet_agent.endpoints.published_ports import KernelPorts
from meshnet_agent.host_firewalls.firewalld import Firewalld
from meshnet_agent.host_firewalls.iptables import IptablesChains
from meshnet_agent.mesh.saver import SnapshotFile
from meshnet_agent.mesh.store_addresses import StoreAddresses
from meshnet_agent.state_dir import StateDir
from meshnet_agent.tasks.worker import open_worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from meshnet.backends import Occupant
    from meshnet.config import AgentConfig
    from meshnet.kernel import Kernel, Wiring
    from meshnet.kernel.address_probe import AddressProber
    from meshnet.model import IpAddress
    from meshnet.store import Store
    from meshnet_agent.dataplane.monitor import KernelEvents
    from meshnet_agent.dataplane.takeovers import TakeoverRunner
    from meshnet_agent.endpoints.published_ports import HostPorts
    from meshnet_agent.host_firewalls import HostFirewall
    from meshnet_agent.state_dir import RuntimeDir
    from meshnet_agent.tasks.worker import Worker

_USES_VXLAN = {"auto": None, "kernel": True, "userspace": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """What the agent depends on: the real things (`open_edges`), or fakes.

    Attributes:
        kernel: the thread that observes, dumps and applies, for the reconciler.
        wiring: the thread that makes and removes endpoints' links, so that an attach never waits
            for a pass.
        snapshot: the thread that keeps the mesh on this host's disk.
        underlay_ip: this host's address on the underlay.
        occupied: what this host's links and routes lead to, at the start (`Underlay.occupied`).
        store_addresses: where etcd is.
        datapath: what forwards this host's packets on networks that the kernel could carry.
        vteps: this host's userspace VTEPs; None: it cannot have any.
        prober: asks on the physical network whether an address is free.
        host_ports: holds published ports, so that no process of this host can take them.
        takeovers: takes over the links of this host that networks have as their parent.
        firewalls: others' firewalls on this host, which may be told to let our packets pass.
        kernel_events: the kernel's notifications, filtered by `event_filter`.
    """

    store: Store
    kernel: Worker[Kernel]
    wiring: Worker[Wiring]
    state_dir: StateDir
    snapshot: Worker[SnapshotFile]
    underlay_ip: IpAddress
    event_filter: EventFilter
    kernel_events: KernelEvents
    prober: AddressProber
    host_ports: HostPorts
    takeovers: TakeoverRunner
    firewalls: Sequence[HostFirewall] = ()
    vteps: VtepProcesses | None = None
    datapath: Datapath = Datapath.KERNEL
    occupied: tuple[Occupant, ...] = ()
    store_addresses: StoreAddresses = field(default_factory=StoreAddresses)


@contextlib.asynccontextmanager
async def open_edges(config: AgentConfig, run_dir: RuntimeDir) -> AsyncIterator[Edges]:
    """Lock the state directory and open everything; closed when the block ends.

    Raises:
        ConflictError: another agent holds the state directory.
        MeshnetError: a setting cannot be used on this host, or the kernel refused.
    """
    # Imported here because pyroute2 takes 0.2 s to import, and --help does not need it.
    from meshnet.kernel.netlink import NetlinkKernel
    from meshnet.kernel.wiring import NetlinkWiring
    from meshnet.store.etcd import target

    def make_kernel() -> NetlinkKernel:
        return NetlinkKernel(disk.firewall, wired, vteps=vteps, vxlan=_USES_VXLAN[config.vxlan])

    with contextlib.ExitStack() as stack:
        disk = StateDir(Path(config.state_dir), lambda: secrets.token_hex(8))
        stack.callback(disk.close)
        vteps = _make_vteps(config, run_dir)
        wired = WiredElements()
        etcd = [target(url) for url in config.etcd]
        takeovers = TakeoverProcesses(disk.path, etcd, config.takeover_confirm_s)
        # First of all: a takeover that was cut short may have left this host without a way to etcd.
        await takeovers.settle()
        async with (
            open_worker("kernel", make_kernel, NetlinkKernel.close) as kernel,
            open_worker("wiring", lambda: NetlinkWiring(wired), NetlinkWiring.close) as wiring,
            open_worker("snapshot", lambda: SnapshotFile(disk.snapshot), _keep_open) as snapshot,
            _open_store(config) as store,
        ):
            underlay = await kernel.run(
                lambda k: k.observe(config.underlay_ip, config.underlay_dev)
            )
            ports = [await kernel.run(lambda k: k.port_id), await wiring.run(lambda w: w.port_id)]
            nft_ports = [
                await kernel.run(lambda k: k.nft_port_id),
                await wiring.run(lambda w: w.nft_port_id),
            ]
            yield Edges(
                store=store,
                kernel=kernel,
                wiring=wiring,
                state_dir=disk,
                snapshot=snapshot,
                underlay_ip=underlay.ip,
                event_filter=EventFilter(await kernel.run(lambda k: k.deleted)),
                kernel_events=NetlinkEvents(ports, nft_ports),
                prober=WireProber(),
                host_ports=KernelPorts(),
                takeovers=takeovers,
                firewalls=(IptablesChains(), Firewalld()),
                vteps=vteps,
                occupied=underlay.occupied,
                store_addresses=StoreAddresses(t.rpartition(":")[0].strip("[]") for t in etcd),
                datapath=Datapath.KERNEL if underlay.kernel_vxlan else Datapath.USERSPACE,
            )


def _keep_open(_file: SnapshotFile) -> None:
    """A file that is replaced whole is open only while it is written."""


def _make_vteps(config: AgentConfig, run_dir: RuntimeDir) -> VtepProcesses:
    """The userspace VTEPs, with the engine that is asked for, or the best that there is.

    Raises:
        NotFoundError: it is not built: said at the start, and not for each network.
    """
    if config.vtep_engine != "auto":
        if config.vtep_engine == "native":
            library.load()
        return VtepProcesses(run_dir.vtep, config.vtep_engine)
    engine = "native"
    try:
        library.load()
    except NotFoundError:
        engine = "python"
    # An upgrade that brings the other engine must not interrupt what runs.
    return VtepProcesses(run_dir.vtep, engine, replaced=False)


@contextlib.asynccontextmanager
async def _open_store(config: AgentConfig) -> AsyncIterator[Store]:
    from meshnet.store.etcd import EtcdConfig, EtcdStore

    store = EtcdStore(
        EtcdConfig(
            # Shuffled: otherwise all hosts would use the first member, and all would move to the
            # second one when the first fails (docs/design/etcd-load.md).
            endpoints=tuple(random.sample(config.etcd, len(config.etcd))),
            ca_file=_path(config.etcd_ca),
            cert_file=_path(config.etcd_cert),
            key_file=_path(config.etcd_key),
            user=config.etcd_user,
            password=_read_password(config),
        )
    )
    try:
        yield store
    finally:
        with trio.move_on_after(2, shield=True):
            await store.aclose()


def _read_password(config: AgentConfig) -> str | None:
    if config.etcd_password_file is None:
        return config.etcd_password
    try:
        return Path(config.etcd_password_file).read_text().splitlines()[0]
    except UnicodeDecodeError:
        reason = "it is not UTF-8"  # Python's own error would quote the password
    except IndexError:
        reason = "it is empty"
    except OSError as error:
        reason = str(error)
    raise UsageError(f"etcd-password-file {config.etcd_password_file} cannot be read: {reason}")


def _path(text: str | None) -> Path | None:
    return Path(text) if text is not None else None
