"""A lab: hosts as network namespaces on one machine, with a switch, etcd and agents.

Job: build it, hand out its parts, take it down and leave nothing.  Place: outside the mesh; it
starts the same agents that run on real hosts, and they program real kernel devices.

A lab outlives the program that made it (``meshnet lab up``): ``lab.json`` (`meshnet.lab.state`) has
what another program needs to use it or take it down.  Everything else is found by its name, which
is made from the lab's:

    namespaces   mnlab-LAB-h1, …-sw, …-etcd   (without LAB- for the lab named "lab")
                 of three members of etcd also …-etcd2 and …-etcd3
    directories  /run/meshnet-lab/LAB/h1/{run/agent.sock,state/,agent.log}

Synchronous: fixtures and the command line call it outside any trio run.  May import only the
standard library, `meshnet.errors` and the lab's own modules.
"""

from __future__ import annotations

import shutil
from ipaddress import ip_address
from typing import TYPE_CHECKING

from meshnet.errors import ConflictError, MeshnetError, UsageError
from meshnet.lab.checks import check_machine, check_socket_path, claim
from meshnet.lab.cluster import MEMBERS, make_etcds, start_etcds
from meshnet.lab.commands import Children, Namespace
from meshnet.lab.host import LabContext, LabHost
from meshnet.lab.netns import (
    DEFAULT_LAB,
    SWITCH,
    add_netns,
    check_host_name,
    check_lab_name,
    delete_netns,
    ip_batch,
    netns_name,
    netns_path,
)
from meshnet.lab.state import (
    HostRecord,
    LabDocument,
    LabFile,
    default_base_dir,
    host_dir,
)
from meshnet.lab.teardown import END_DEADLINE_S, Removed, end_everything, tear_down
from meshnet.lab.underlay import DEFAULT_UNDERLAY, LabUnderlay

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from meshnet.lab.etcd import EtcdServer

_MAX_HOSTS = 200


class Lab:
    """A lab on this machine.  Needs root; touches only its own namespaces.

    As a context manager it is up inside the block and down after it.  Otherwise call `up`, and
    later `down`, from this or any other program.

    Args:
        name: names its namespaces and its directory.
        hosts: how many; they are ``h1``, ``h2`` and so on.
        etcd_members: 1 or 3; agents know all of them.
        underlay: the addressing plan; by default IPv4, an MTU of 1500 bytes, and hosts that have a
            default route to the switch, so that what leaves the overlay can be watched there, and
            `outside_ip` can be reached.
        base_dir: its directory, which must not exist; the default is ``/run/meshnet-lab/NAME``.
        agent_args: further options for every agent.
        start_agents: whether `up` and `add_host` start agents.

    Attributes:
        name: see above.
        base_dir: see above.
        etcd_url: URLs of all members of etcd, with commas between.
        underlay: see above.
        etcds: the members of the lab's etcd, by the names of their ports, for stopping, pausing and
            asking them.  In a lab opened with `attach` only their `ctl` works: the processes are
            another program's children.
        switch: the switch's namespace; its bridge is ``br0``, its ports ``h1``, ``etcd``, …

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        name: str = DEFAULT_LAB,
        *,
        hosts: int = 3,
        etcd_members: int = 1,
        underlay: LabUnderlay = DEFAULT_UNDERLAY,
        base_dir: Path | None = None,
        agent_args: Sequence[str] = (),
        start_agents: bool = True,
    ) -> None:
        check_lab_name(name)
        if not 0 <= hosts <= _MAX_HOSTS:
            raise UsageError(f"{hosts} hosts: give 0 to {_MAX_HOSTS}")
        if etcd_members not in MEMBERS:
            raise UsageError(f"{etcd_members} members of etcd: give 1 or 3")
        self.name = name
        self.base_dir = default_base_dir(name) if base_dir is None else base_dir.absolute()
        self.underlay = underlay
        self.etcd_url = ",".join(self.underlay.etcd_url(index) for index in range(etcd_members))
        self._host_count = hosts
        self._start_agents = start_agents
        self._children = Children()
        self._file = LabFile(self.base_dir)
        self._context = LabContext(
            name=name,
            base_dir=self.base_dir,
            etcd_url=self.etcd_url,
            agent_args=tuple(agent_args),
            file=self._file,
            children=self._children,
        )
        self.switch = Namespace(self._netns_path(SWITCH), self._children)
        self.etcds = make_etcds(name, self.base_dir, self.underlay, etcd_members)

    @classmethod
    def attach(cls, lab_name: str = DEFAULT_LAB, *, base_dir: Path | None = None) -> Lab:
        """Open a lab that another program has brought up.

        Raises:
            NotFoundError: it is not up.
        """
        check_lab_name(lab_name)
        directory = default_base_dir(lab_name) if base_dir is None else base_dir
        document = LabFile(directory).read()
        return cls(
            document.name,
            hosts=0,
            etcd_members=len(document.etcd_url.split(",")),
            underlay=LabUnderlay(
                6 if document.family == 6 else 4, document.mtu_bytes, document.gateway
            ),
            base_dir=directory,
            agent_args=document.agent_args,
        )

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.down()

    @property
    def hosts(self) -> list[LabHost]:
        """All hosts, in the order they were added.

        Raises:
            NotFoundError: the lab is not up.
        """
        return [
            LabHost(name, ip_address(record.underlay_ip), self._context)
            for name, record in self._file.read().hosts.items()
        ]

    @property
    def etcd(self) -> EtcdServer:
        """The first member of the lab's etcd; by default there is no other."""
        return next(iter(self.etcds.values()))

    @property
    def outside_ip(self) -> str:
        """An address that only the switch has: it stands for the Internet."""
        return str(self.underlay.outside_ip)

    def host(self, name: str) -> LabHost:
        """Look a host up.

        Raises:
            NotFoundError: the lab is not up, or has no such host.
        """
        return LabHost.from_state(name, self._context)

    def up(self, progress: Callable[[str], None] | None = None) -> None:
        """Build the lab; on return etcd answers and every agent is ready.

        If anything goes wrong, Ctrl-C included, everything is removed again.

        Args:
            progress: called with a line before every step.

        Raises:
            PolicyRefusedError: the caller is not root.
            ConflictError: a lab of that name exists, or left something.
            NotFoundError: a program that it needs is not installed.
            StoreUnavailableError: etcd does not start.
            AgentUnreachableError: an agent does not; the message has the end of its log.
            KernelRefusedError: the kernel refused a namespace or link.
        """
        say = progress or (lambda _: None)
        check_machine()
        names = [f"h{number}" for number in range(1, self._host_count + 1)]
        for name in names:
            check_socket_path(self.base_dir, name)
        claim(self.name, self.base_dir)
        try:
            self._file.create(self._first_document(names))
            say(f"making {len(names)} hosts, a switch and an underlay")
            self._build_underlay()
            say(f"starting etcd at {self.etcd_url}")
            start_etcds(self.etcds, self._file)
            if self._start_agents:
                say(f"starting {len(names)} agents")
                self._start_all_agents(say)
        except BaseException as exc:
            say("failed: removing what was made")
            try:
                self.down()
            except MeshnetError as undo_error:
                say(f"removing it failed, too: {undo_error}")
                exc.add_note(f"and removing what was made failed: {undo_error}")
            raise

    def down(
        self,
        progress: Callable[[str], None] | None = None,
        *,
        deadline_s: float = END_DEADLINE_S,
    ) -> Removed:
        """Take the lab down, containers and all; harmless when it is not up.

        Args:
            progress: called with a line before every step.
            deadline_s: seconds that agents and containers get to end before they are killed.

        Raises:
            ConflictError: the directory is not this lab's, or the caller is in one of the lab's
                namespaces.
            KernelRefusedError: something cannot be removed.
        """
        for etcd in self.etcds.values():
            if etcd.running:
                # A test may have left it paused, and agents that end want it to answer.
                etcd.resume()
        known = self._children.running()
        removed = tear_down(
            self.name, self.base_dir, known=known, progress=progress, deadline_s=deadline_s
        )
        # tear_down has ended them, and this only reaps.  Not stop(): it expects a running process.
        for etcd in self.etcds.values():
            etcd.kill()
        self._children.reap_all()
        return removed

    def add_host(self, name: str, *, agent: bool = True) -> LabHost:
        """Add a host to a running lab; start its agent if `up` started agents.

        A host ``hN`` always has the same underlay address, also when it was removed and comes back.
        It then has its old state directory if `remove_host` kept it.

        Args:
            name: the host's name.
            agent: False for a machine on the same switch that is not in the mesh.

        Raises:
            UsageError: a host cannot have that name.
            ConflictError: the lab has that host.
            NotFoundError: the lab is not up.
        """
        check_host_name(name)
        check_socket_path(self.base_dir, name)
        with self._file.edit() as document:
            if name in document.hosts:
                raise ConflictError(
                    f"lab {self.name!r} has host {name!r} already: remove it first, or use another"
                )
            index = _free_index(name, document)
            document.hosts[name] = HostRecord(index, str(self.underlay.host_ip(index)))
        host = self.host(name)
        try:
            host.make_dirs()
            add_netns([host.netns])
            ip_batch(self.underlay.port_commands(name, host.netns), netns=self._netns(SWITCH))
            ip_batch(self.underlay.host_commands(host.underlay_ip), netns=host.netns)
            if agent and self._start_agents:
                host.start_agent()
        except BaseException:
            self.remove_host(name)
            raise
        return host

    def remove_host(self, name: str, *, keep_state: bool = False) -> None:
        """Remove a host as a power cut does: kill every process on it, then remove it.

        For an orderly departure, stop its agent first.

        Args:
            keep_state: keep its directories, for `add_host` to find.

        Raises:
            NotFoundError: the lab is not up, or has no such host.
        """
        record = self._file.read().host(name)
        host = self.host(name)
        containers = [item for item in self._file.read().containers if item.host == name]
        agents = [] if record.agent is None else [record.agent]
        end_everything([host.netns_path], agents, containers, deadline_s=0)
        # The kernel removes a namespace some time after its last user is gone.  But its link, whose
        # other end is our port, must be gone before a host of this name comes back.
        self.switch.run(["ip", "link", "del", name], check=False)
        delete_netns([host.netns])
        if not keep_state:
            shutil.rmtree(host_dir(self.base_dir, name), ignore_errors=True)
        for ref in (*agents, *(item.ref for item in containers)):
            self._children.reap(ref.pid)
        with self._file.edit() as document:
            document.hosts.pop(name, None)
            document.containers = [item for item in document.containers if item.host != name]

    def cut(self, port: str) -> None:
        """Cut a host or a member of etcd off at the switch.  Its link stays up."""
        self.switch.run(["bridge", "link", "set", "dev", port, "state", "disabled"])

    def mend(self, port: str) -> None:
        """Undo `cut`.  A neighbour that could not be resolved meanwhile may take a second more."""
        self.switch.run(["bridge", "link", "set", "dev", port, "state", "forwarding"])

    def _netns(self, part: str) -> str:
        return netns_name(self.name, part)

    def _netns_path(self, part: str) -> Path:
        return netns_path(self._netns(part))

    def _first_document(self, names: Sequence[str]) -> LabDocument:
        return LabDocument(
            name=self.name,
            family=self.underlay.family,
            mtu_bytes=self.underlay.mtu_bytes,
            gateway=self.underlay.gateway,
            agent_args=list(self._context.agent_args),
            etcd_url=self.etcd_url,
            hosts={
                name: HostRecord(index, str(self.underlay.host_ip(index)))
                for index, name in enumerate(names, start=1)
            },
        )

    def _build_underlay(self) -> None:
        hosts = self.hosts
        for host in hosts:
            host.make_dirs()
        etcds = {name: self._netns(name) for name in self.etcds}
        for etcd in self.etcds.values():
            etcd.log_file.parent.mkdir()
        ends = {**etcds, **{host.name: host.netns for host in hosts}}
        add_netns([self._netns(SWITCH), *ends.values()])
        commands = self.underlay.switch_commands()
        for port, netns in ends.items():
            commands += self.underlay.port_commands(port, netns)
        ip_batch(commands, netns=self._netns(SWITCH))
        for index, netns in enumerate(etcds.values()):
            ip_batch(self.underlay.host_commands(self.underlay.etcd_ip(index)), netns=netns)
        for host in hosts:
            ip_batch(self.underlay.host_commands(host.underlay_ip), netns=host.netns)

    def _start_all_agents(self, say: Callable[[str], None]) -> None:
        hosts = self.hosts
        for host in hosts:
            host.start_agent(wait=False)
        for host in hosts:
            host.wait_agent_ready()
            say(f"{host.name} is ready at {host.underlay_ip}")


def _free_index(name: str, document: LabDocument) -> int:
    used = {record.index for record in document.hosts.values()}
    own = int(name[1:]) if name[0] == "h" and name[1:].isdigit() else 0
    if own > 0 and own not in used:
        return own
    # Beyond every hN, present or not, so that none finds its address taken when it comes back.
    return max(_MAX_HOSTS, *used, 0) + 1
