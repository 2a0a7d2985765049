"""One host of a lab, and a container on it.

May import only the standard library, `meshnet.errors` and the lab's lower modules.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import AgentUnreachableError, ConflictError, KernelRefusedError, NotFoundError
from meshnet.lab.agent import is_ready, log_tail, spawn_agent
from meshnet.lab.commands import Children, Namespace
from meshnet.lab.netns import enter_argv, netns_name, netns_path
from meshnet.lab.poll import wait_until
from meshnet.lab.process import (
    NetnsId,
    ProcessRef,
    end_processes,
    identify,
    netns_id,
    own_netns_id,
    process_netns_id,
)
from meshnet.lab.state import (
    ContainerRecord,
    LabFile,
    agent_socket,
    host_dir,
    host_environment,
)
from meshnet.lab.teardown import end_everything

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from ipaddress import IPv4Address, IPv6Address
    from typing import TextIO

AGENT_READY_DEADLINE_S = 30.0
_AGENT_STOP_DEADLINE_S = 15.0
_SPAWN_DEADLINE_S = 10.0
_CONTAINER_END_DEADLINE_S = 2.0

# Waits for a line before it becomes the container's command, so that lab.json has the process
# before the command runs.  If we are killed first, the pipe ends, and with it the process.
_GATE = 'read -r _ && exec "$@" </dev/null'


@dataclass(frozen=True, slots=True)
class LabContext:
    """What hosts and containers need of their lab.

    Attributes:
        name: of the lab.
        base_dir: the lab's directory.
        etcd_url: URLs of all members of etcd, with commas between.
        agent_args: options of every agent.
        file: the lab's state.
        children: the processes that this program has started.
    """

    name: str
    base_dir: Path
    etcd_url: str
    agent_args: tuple[str, ...]
    file: LabFile
    children: Children

    def record(self, record: ContainerRecord) -> None:
        """Add a container's process to the lab's state, or update it; drop those that ended."""
        with self.file.edit() as document:
            document.containers = [
                *(
                    known
                    for known in document.containers
                    if known.ref != record.ref and known.ref.is_alive()
                ),
                record,
            ]

    def forget(self, ref: ProcessRef) -> None:
        """Remove a process that has ended from the lab's state."""
        with self.file.edit() as document:
            document.containers = [known for known in document.containers if known.ref != ref]


class LabContainer(Namespace):
    """A process in a network namespace of its own, whose only link is ``lo``, down.

    Made by `LabHost.spawn_container`; put on a network with ``meshnet attach PID``.

    Attributes:
        pid: its process id.
        host: name of its host.
        netns_path: ``/proc/PID/ns/net``.
    """

    def __init__(self, record: ContainerRecord, context: LabContext) -> None:
        super().__init__(Path(f"/proc/{record.ref.pid}/ns/net"), context.children)
        self.pid = record.ref.pid
        self.host = record.host
        self._record = record
        self._context = context

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._record.ref.is_alive()

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: int | TextIO = subprocess.DEVNULL,
        stdout: int | TextIO = subprocess.PIPE,
        stderr: int | TextIO = subprocess.STDOUT,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command here; see `Namespace.popen`."""
        child = super().popen(argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env)
        # It is not in a host's namespace, so teardown finds it only by its pid.
        self._context.record(ContainerRecord(identify(child.pid), self.host))
        return child

    def end(self) -> None:
        """End the process and all others in its namespace (SIGTERM, after 2 s SIGKILL)."""
        end_everything([], [], [self._record], deadline_s=_CONTAINER_END_DEADLINE_S)
        self._context.children.reap(self.pid)
        self._context.forget(self._record.ref)


class LabHost(Namespace):
    """One host: a network namespace with ``eth0`` on the underlay, and an agent.

    Commands run with MESHNET_SOCKET and MESHNET_ETCD set.

    Attributes:
        name: its name in the lab, and the agent's host id.
        netns: name of its namespace.
        netns_path: the namespace's path.
        underlay_ip: address of its ``eth0``.
        socket_path: the agent's socket.
        run_dir: the agent's run directory.
        state_dir: the agent's state directory.
        log_path: file with what the agent prints.
    """

    def __init__(
        self, name: str, underlay_ip: IPv4Address | IPv6Address, context: LabContext
    ) -> None:
        self.name = name
        self.netns = netns_name(context.name, name)
        super().__init__(
            netns_path(self.netns),
            context.children,
            host_environment(context.base_dir, name, context.etcd_url),
        )
        self.underlay_ip = underlay_ip
        directory = host_dir(context.base_dir, name)
        self.socket_path = agent_socket(context.base_dir, name)
        self.run_dir = self.socket_path.parent
        self.state_dir = directory / "state"
        self.log_path = directory / "agent.log"
        self._containers_log = directory / "containers.log"
        self._context = context

    @classmethod
    def from_state(cls, name: str, context: LabContext) -> LabHost:
        """Build a host from the lab's state.

        Raises:
            NotFoundError: the lab is not up, or has no such host.
        """
        record = context.file.read().host(name)
        return cls(name, ip_address(record.underlay_ip), context)

    def make_dirs(self) -> None:
        """Make the host's directories; those of an earlier host of this name are kept."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.state_dir.mkdir(exist_ok=True)

    def _agent(self) -> ProcessRef | None:
        ref = self._context.file.read().host(self.name).agent
        return ref if ref is not None and ref.is_alive() else None

    def is_agent_running(self) -> bool:
        """Tell whether the agent's process exists; it need not be ready."""
        return self._agent() is not None

    @property
    def agent_pid(self) -> int:
        """Process id of the agent.

        Raises:
            NotFoundError: it does not run.
        """
        ref = self._agent()
        if ref is None:
            raise NotFoundError(
                f"no agent runs on lab host {self.name}: start it, or see {self.log_path}"
            )
        return ref.pid

    def start_agent(
        self,
        extra_args: Sequence[str] = (),
        *,
        wait: bool = True,
        by_link: bool = False,
        deadline_s: float = AGENT_READY_DEADLINE_S,
    ) -> None:
        """Start the host's agent with the lab's options and these.

        Args:
            extra_args: further options, after the lab's `agent_args`.
            wait: return only when it is ready; otherwise call `wait_agent_ready`.
            by_link: tell it the underlay's link instead of the address on it.
            deadline_s: see `wait_agent_ready`.

        Raises:
            ConflictError: it runs already.
            AgentUnreachableError: it ended, or is not ready in time; the message has the end of
                its log.
        """
        running = self._agent()
        if running is not None:
            raise ConflictError(
                f"the agent of lab host {self.name} runs already (pid {running.pid}): stop it first"
            )
        options = [
            *("--etcd", self._context.etcd_url),
            *(("--underlay-dev", "eth0") if by_link else ("--underlay-ip", str(self.underlay_ip))),
            *("--host-id", self.name),
            *("--run-dir", str(self.run_dir)),
            *("--state-dir", str(self.state_dir)),
            *self._context.agent_args,
            *extra_args,
        ]
        child = spawn_agent(enter_argv(self.netns_path), options, self.log_path)
        self._context.children.add(child)
        ref = identify(child.pid)
        with self._context.file.edit() as document:
            document.host(self.name).agent = ref
        if wait:
            self.wait_agent_ready(deadline_s)

    def wait_agent_ready(self, deadline_s: float = AGENT_READY_DEADLINE_S) -> None:
        """Block until the agent answers GET /readyz with 200.

        Raises:
            AgentUnreachableError: it ended, or did not answer so within `deadline_s` seconds; the
                message has the end of its log.
        """

        def ready_or_ended() -> bool:
            return is_ready(self.socket_path) or not self.is_agent_running()

        try:
            wait_until(ready_or_ended, deadline_s, "ready")
        except TimeoutError as exc:
            raise self._agent_error(f"is not ready after {deadline_s:g} s") from exc
        if not self.is_agent_running():
            raise self._agent_error("ended while starting")

    def _agent_error(self, what: str) -> AgentUnreachableError:
        return AgentUnreachableError(
            f"the agent of lab host {self.name} {what}; the end of {self.log_path}:\n"
            f"{log_tail(self.log_path)}"
        )

    def stop_agent(self, deadline_s: float = _AGENT_STOP_DEADLINE_S) -> int | None:
        """Stop the agent in order (SIGTERM) and wait until it is gone; harmless without one.

        Args:
            deadline_s: seconds after which it is killed.

        Returns:
            Its exit status, negative for a signal (-9: it was killed); None if it did not run or
            another program started it.
        """
        ref = self._agent()
        if ref is None:
            return None
        end_processes([ref], deadline_s=deadline_s)
        return self._context.children.reap(ref.pid)

    def kill_agent(self) -> None:
        """Kill the agent (SIGKILL) and wait until it is gone; harmless without one."""
        self.stop_agent(deadline_s=0)

    def spawn_container(self, argv: Sequence[str] | None = None) -> LabContainer:
        """Start a process on this host, in a new network namespace.

        On return it is in that namespace.  Its output goes to ``containers.log`` in the host's
        directory; its stdin is empty.

        Args:
            argv: what to run; the default sleeps for ever.

        Raises:
            KernelRefusedError: it ended before it was in its namespace.
        """
        command = ["sleep", "infinity"] if argv is None else list(argv)
        with self._containers_log.open("ab") as log:
            child = subprocess.Popen(
                [
                    *enter_argv(self.netns_path),
                    *("unshare", "--net", "--"),
                    *("sh", "-c", _GATE, "sh"),
                    *command,
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._context.children.add(child)
        record = ContainerRecord(identify(child.pid), self.name)
        self._context.record(record)
        try:
            netns = self._wait_until_entered(child)
            record = ContainerRecord(record.ref, self.name, netns)
            self._context.record(record)
            assert child.stdin is not None  # it is a pipe
            child.stdin.write(b"\n")
            child.stdin.close()
        except BaseException:
            end_processes([record.ref], deadline_s=0)
            self._context.children.reap(child.pid)
            raise
        return LabContainer(record, self._context)

    def _wait_until_entered(self, child: subprocess.Popen[bytes]) -> NetnsId:
        # It starts in our namespace, nsenter takes it to the host's, and unshare to a new one.
        passed = {own_netns_id(), netns_id(self.netns_path)}

        def entered() -> NetnsId | None:
            if child.poll() is not None:
                raise KernelRefusedError(
                    f"a container of lab host {self.name} ended with status {child.returncode} "
                    f"before it had its namespace; the end of {self._containers_log}:\n"
                    f"{log_tail(self._containers_log)}"
                )
            found = process_netns_id(child.pid)
            return None if found in passed else found

        found = wait_until(entered, _SPAWN_DEADLINE_S, f"process {child.pid} has its own namespace")
        assert found is not None  # wait_until returns only what is true
        return found
