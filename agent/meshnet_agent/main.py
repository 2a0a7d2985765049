"""``meshnet-agent``: reads its settings, opens the real parts and runs the agent.

The only ``trio.run`` of the agent.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import resource
import secrets
import signal
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

import structlog
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve

from meshnet.arguments import Parser
from meshnet.config import SETTINGS, AgentConfig, load_config
from meshnet.errors import MeshnetError, UsageError
from meshnet.group import open_to_group
from meshnet.kernel.address_probe import WireProber
from meshnet.kernel.elements import WiredElements
from meshnet.kernel.events import EventFilter
from meshnet.kernel.takeover.process import TakeoverProcesses
from meshnet.kernel.vteps import VtepProcesses
from meshnet.model import Datapath
from meshnet.runtime.spec.id_ranges import parse_range
from meshnet.vtep.native import library
from meshnet_agent.api.app import make_app, raw_refusal
from meshnet_agent.api.overload import refuse_clients
from meshnet_agent.api.service import Service
from meshnet_agent.containers.images import Images
from meshnet_agent.containers.lifecycle import Containers
from meshnet_agent.daemon import Agent
from meshnet_agent.dataplane.monitor import listen
from meshnet_agent.endpoints.published_ports import KernelPorts
from meshnet_agent.logs import configure_logs
from meshnet_agent.notify import Notifier
from meshnet_agent.state_dir import StateDir, hold_namespace, hold_run_dir
from meshnet_agent.tasks.worker import open_worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from hypercorn.typing import ASGIFramework

    from meshnet.store import Store

_log = structlog.get_logger()
SOCKET_NAME = "agent.sock"
_USES_VXLAN = {"auto": None, "kernel": True, "userspace": False}
_SWITCH_S = 0.0001
"""How long a thread may keep the interpreter while another wants it."""
_COLLECTED = 10_000, 20, 50
"""How many objects gather before it is looked for garbage in cycles (`gc.set_threshold`).

A client leaves about 30, and what gathers is memory: with 50,000 an agent grew for ten minutes.
Too often is slow: listing 10,000 hosts makes 100,000 objects, and none of them is garbage.
"""
_BACKLOG = 4096
"""Clients that may wait to be served; where more come at once, Linux refuses them (``EAGAIN``)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent; returns its exit status."""
    try:
        config = _read_config(arguments)
        configure_logs(config.log_level, config.log_format)
        trio.run(_run, config)
    except MeshnetError as error:
        return _fail(error)
    except BaseExceptionGroup as group:
        ours, rest = group.split(MeshnetError)
        if ours is None or rest is not None:
            raise
        return _fail(_first(ours))
    return 0


def _fail(error: MeshnetError) -> int:
    print(f"meshnet-agent: {error}", file=sys.stderr)
    return error.exit_status


def _first(error: MeshnetError | BaseExceptionGroup[MeshnetError]) -> MeshnetError:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _read_config(arguments: Sequence[str] | None) -> AgentConfig:
    parser = Parser(
        prog="meshnet-agent",
        description="The meshnet agent: one on every host, as root.",
        epilog="Every option is also an environment variable (--lease-ttl: MESHNET_LEASE_TTL) and "
        "a key of the TOML file (lease-ttl). Example: meshnet-agent --etcd http://10.0.0.1:2379 "
        "--underlay-dev eth0",
    )
    for setting in SETTINGS:
        if not setting.secret:
            default = f" (default: {setting.default})" if setting.default else ""
            parser.add_argument(
                f"--{setting.name}",
                metavar=setting.metavar,
                help=setting.help + default,
                choices=setting.choices or None,
            )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    parser.add_argument(
        "--version", action="version", version=f"meshnet-agent {version('meshnet')}"
    )
    given = sys.argv[1:] if arguments is None else arguments
    for setting in SETTINGS:
        if setting.secret and f"--{setting.name}" in {word.partition("=")[0] for word in given}:
            raise UsageError(  # the parser's own message would repeat it
                f"--{setting.name} is no option, for ps would show it: use --{setting.name}-file"
            )
    parsed = vars(parser.parse_args(given))
    path = parsed.pop("config") or os.environ.get("MESHNET_CONFIG")
    text = None
    if path is not None:
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"config file {path} cannot be read: {error}") from error
    config = load_config(
        {s.name: parsed.get(s.field) for s in SETTINGS},
        os.environ,
        text,
        hostname=socket.gethostname(),
        toml_name=path or "",
    )
    for setting in SETTINGS:
        if setting.secret:
            os.environ.pop(setting.variable, None)  # userspace VTEPs would inherit it
    return config


async def _run(config: AgentConfig) -> None:
    notifier = Notifier()
    id_pool = parse_range(config.userns_range, "userns-range")
    # One pidfd an endpoint: the usual soft limit of 1,024 is soon reached.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.set_threshold(*_COLLECTED)
    # A pass is busy in a thread for a while; others must not wait 5 ms for every turn of theirs.
    sys.setswitchinterval(_SWITCH_S)
    # Imported here: pyroute2 takes 0.2 s, and --help needs none of it.
    from meshnet.kernel.netlink import NetlinkKernel
    from meshnet.kernel.wiring import NetlinkWiring
    from meshnet.store.etcd import target

    def make_kernel() -> NetlinkKernel:
        return NetlinkKernel(
            disk.path / "firewall.json", wired, vteps=vteps, vxlan=_USES_VXLAN[config.vxlan]
        )

    with contextlib.ExitStack() as stack:
        stack.enter_context(hold_namespace())
        stack.callback(os.close, hold_run_dir(Path(config.run_dir)))
        disk = StateDir(Path(config.state_dir), lambda: secrets.token_hex(8))
        stack.callback(disk.close)
        if config.vtep_engine == "native":
            library.load()  # to say now, and not of each network, that it is not built
        vteps = VtepProcesses(Path(config.run_dir, "vtep"), config.vtep_engine)
        wired = WiredElements()
        etcd = [target(url) for url in config.etcd]
        takeovers = TakeoverProcesses(disk.path.absolute(), etcd, config.takeover_confirm_s)
        # Before anybody is asked for: what was cut short may be in the way.
        await takeovers.settle()
        async with (
            open_worker("kernel", make_kernel, NetlinkKernel.close) as kernel,
            open_worker("wiring", lambda: NetlinkWiring(wired), NetlinkWiring.close) as wiring,
            _open_store(config) as store,
        ):
            underlay = await kernel.run(
                lambda k: k.observe(config.underlay_ip, config.underlay_dev)
            )
            ports = [
                await kernel.run(lambda k: k.port_id),
                await wiring.run(lambda w: w.port_id),
            ]
            nft_ports = [
                await kernel.run(lambda k: k.nft_port_id),
                await wiring.run(lambda w: w.nft_port_id),
            ]
            agent = Agent(
                config,
                store,
                kernel,
                wiring,
                disk,
                underlay.ip,
                EventFilter(await kernel.run(lambda k: k.deleted)),
                WireProber(),
                KernelPorts(),
                takeovers,
                functools.partial(listen, own_ports=ports, own_nft_ports=nft_ports),
                vteps=vteps,
                datapath=Datapath.KERNEL if underlay.kernel_vxlan else Datapath.USERSPACE,
            )
            socket_path = Path(config.run_dir) / SOCKET_NAME
            # Ours alone: the run directory is locked.
            stack.callback(socket_path.unlink, missing_ok=True)
            images = Images(
                disk.path / "images",
                max_bytes=config.image_max_bytes,
                max_entries=config.image_max_entries,
            )
            await images.collect()
            service = Service(agent, images)
            containers = Containers(
                disk.path,
                Path(config.run_dir),
                service.attach,
                service.detach,
                service.endpoints_of,
                service.passed_over,
                id_pool=id_pool,
                systemd_cgroup=config.cgroup_driver == "systemd",
            )
            with _listen(socket_path) as listener:
                await _serve(listener, service, containers, agent, notifier)


@contextlib.asynccontextmanager
async def _open_store(config: AgentConfig) -> AsyncIterator[Store]:
    from meshnet.store.etcd import EtcdConfig, EtcdStore

    store = EtcdStore(
        EtcdConfig(
            # Shuffled: otherwise every host would use the first one, and all of them the next when
            # that fails.
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
        reason = "it is not UTF-8"  # and the error quotes it
    except IndexError:
        reason = "it is empty"
    except OSError as error:
        reason = str(error)
    raise UsageError(f"etcd-password-file {config.etcd_password_file} cannot be read: {reason}")


def _path(text: str | None) -> Path | None:
    return Path(text) if text is not None else None


async def _serve(
    listener: socket.socket,
    service: Service,
    containers: Containers,
    agent: Agent,
    notifier: Notifier,
) -> None:
    """Run all parts until a signal.

    Containers stop first: a container that ends is put away by the agent's help, which is not
    there any more otherwise.  The API is the last.
    """
    hypercorn = HypercornConfig()
    hypercorn.bind = [f"fd://{os.dup(listener.fileno())}"]  # it closes what it is given
    hypercorn.backlog = _BACKLOG
    hypercorn.graceful_timeout = 1.0
    hypercorn.loglevel = "ERROR"
    stopping = trio.Event()
    app = make_app(service, lambda: agent.ready and not stopping.is_set(), containers)

    async def serve_api(task_status: trio.TaskStatus[list[str]]) -> None:
        await serve(
            cast("ASGIFramework", app),
            hypercorn,
            shutdown_trigger=stopping.wait,
            task_status=task_status,
        )

    async with trio.open_nursery() as root:
        await root.start(serve_api)
        root.start_soon(refuse_clients, listener, raw_refusal)
        async with trio.open_nursery() as middle:
            with trio.CancelScope() as running:
                root.start_soon(_stop_on_signal, agent, running, notifier)
                await middle.start(agent.run)
                async with trio.open_nursery() as inner:
                    await inner.start(containers.run)
                    notifier.tell("READY=1")
                    _log.info("ready", host=agent.host.id, socket=listener.getsockname())
            middle.cancel_scope.cancel()
        stopping.set()
        root.cancel_scope.cancel()


async def _stop_on_signal(agent: Agent, running: trio.CancelScope, notifier: Notifier) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            _log.info("stopping", signal=signal.Signals(number).name)
            notifier.tell("STOPPING=1")
            agent.ready = False  # from here on requests are refused, not cut off
            running.cancel()


def _listen(path: Path) -> socket.socket:
    """The API's socket: mode 0660, group meshnet where there is one."""
    path.unlink(missing_ok=True)  # ours alone: the run directory is locked
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o117)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise UsageError(
            f"socket {path} cannot be made ({error}): give a shorter --run-dir"
        ) from error
    finally:
        os.umask(before)
    open_to_group(path, 0o660)
    listener.setblocking(False)
    listener.listen(_BACKLOG)
    return listener


if __name__ == "__main__":
    sys.exit(main())
