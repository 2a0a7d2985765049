"""``lab.json``: what a lab has started, so that any program can use it and take it down.

An entry is written before the thing that it names is made, where that is possible, and otherwise
right after.  The file is replaced by rename, under a lock on the lab's directory.  So at any
instant this file or a network namespace leads to every process of the lab.

May import only the standard library, `meshnet.errors` and the lab's lowest modules: ``meshnet lab
exec`` reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshnet.errors import ConflictError, NotFoundError
from meshnet.lab.process import NetnsId, ProcessRef

if TYPE_CHECKING:
    from collections.abc import Iterator

LABS_DIR = Path("/run/meshnet-lab")
"""Holds the directory of every lab that was not given another."""

_FILE = "lab.json"
_VERSION = 2


@dataclass(slots=True)
class HostRecord:
    """One host of a lab.

    Attributes:
        index: its number, from 1, which determines its underlay address.
        underlay_ip: that address, as text.
        agent: the process of its agent, the last that was started.
    """

    index: int
    underlay_ip: str
    agent: ProcessRef | None = None


@dataclass(slots=True)
class ContainerRecord:
    """A process that the lab started outside the hosts' namespaces: a container, or in one.

    Attributes:
        ref: the process.
        host: name of the host that it belongs to.
        netns: the namespace made for it; None until it is certain to have entered it, and for a
            process that runs in a container.
    """

    ref: ProcessRef
    host: str
    netns: NetnsId | None = None


@dataclass(slots=True)
class LabDocument:
    """A whole ``lab.json``.

    Attributes:
        name: of the lab.
        family: address family of the underlay, 4 or 6.
        mtu_bytes: MTU of the underlay's links.
        gateway: whether hosts have a default route to the switch.
        agent_args: options that every agent is started with.
        etcd_url: URLs of all members of etcd, with commas between.
        etcds: the process of each member of etcd, the first that was started.
        hosts: by name.
        containers: processes outside the hosts' namespaces.
    """

    name: str
    family: int
    mtu_bytes: int
    gateway: bool
    agent_args: list[str]
    etcd_url: str
    etcds: dict[str, ProcessRef] = field(default_factory=dict)
    hosts: dict[str, HostRecord] = field(default_factory=dict)
    containers: list[ContainerRecord] = field(default_factory=list)

    def host(self, name: str) -> HostRecord:
        """Look a host up.

        Raises:
            NotFoundError: the lab does not have this host; the message lists those it has.
        """
        if name not in self.hosts:
            known = ", ".join(self.hosts) or "none"
            raise NotFoundError(f"lab {self.name!r} has no host {name!r}: its hosts are {known}")
        return self.hosts[name]

    def processes(self) -> list[ProcessRef]:
        """List every process named here, running or not."""
        agents = [record.agent for record in self.hosts.values() if record.agent is not None]
        containers = [record.ref for record in self.containers]
        return [*agents, *containers, *self.etcds.values()]


def default_base_dir(lab: str) -> Path:
    """Return the directory of a lab that was not given another."""
    return LABS_DIR / lab


def host_dir(base_dir: Path, host: str) -> Path:
    """Directory of one host: its agent's run and state directories, and logs."""
    return base_dir / host


def agent_socket(base_dir: Path, host: str) -> Path:
    """Path of the socket of a host's agent."""
    return host_dir(base_dir, host) / "run" / "agent.sock"


class LabFile:
    """The ``lab.json`` in a lab's directory.  Safe to use from several programs at once."""

    def __init__(self, base_dir: Path) -> None:
        self.base_dir = base_dir
        self.path = base_dir / _FILE

    def create(self, document: LabDocument) -> None:
        """Write the first state of a lab; its directory exists and is empty."""
        with self._locked():
            self._write(document)

    def read(self) -> LabDocument:
        """Return the lab's present state.

        Raises:
            NotFoundError: there is no lab in this directory.
            ConflictError: the file is damaged, or another version wrote it.
        """
        try:
            text = self.path.read_text()
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise NotFoundError(
                f"no lab is up in {self.base_dir}: start one with 'meshnet lab up'"
            ) from exc
        try:
            return _decode(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ConflictError(
                f"{self.path} is damaged, or another version of meshnet wrote it: "
                "remove that lab with 'meshnet lab down' and start it again"
            ) from exc

    @contextlib.contextmanager
    def edit(self) -> Iterator[LabDocument]:
        """Read the state to change it; it is written back at the end, but not after an exception.

        Raises:
            NotFoundError: there is no lab in this directory.
        """
        with self._locked():
            document = self.read()
            yield document
            self._write(document)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # The lock is on the directory itself, so that no lock file must be removed at the end.
        try:
            descriptor = os.open(self.base_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise NotFoundError(
                f"no lab is up in {self.base_dir}: start one with 'meshnet lab up'"
            ) from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, document: LabDocument) -> None:
        # No fsync: a crash of the machine ends all namespaces and processes that the file names.
        new = self.path.with_name(f"{_FILE}.new")
        body = {"version": _VERSION, **dataclasses.asdict(document)}
        new.write_text(json.dumps(body, indent=2) + "\n")
        new.replace(self.path)


def is_lab_dir(base_dir: Path) -> bool:
    """Tell whether a directory is a lab's.  Ask before removing it, and remove nothing otherwise.

    True if it has a ``lab.json``.  Without one (``lab up`` was killed at its very start, or ``lab
    down`` at its very end) true only if it is empty otherwise, too.
    """
    names = {entry.name for entry in base_dir.iterdir()}
    return _FILE in names or names <= {f"{_FILE}.new"}


def removal_order(base_dir: Path) -> list[Path]:
    """Entries of a lab's directory in the order to remove them: ``lab.json`` last."""
    return sorted(base_dir.iterdir(), key=lambda path: (path.name == _FILE, path.name))


def host_environment(base_dir: Path, host: str, etcd_url: str) -> dict[str, str]:
    """Return variables for a command in a host's namespace, on top of those that it inherits.

    With them the client finds its agent, and a shell finds the client of the version that runs this
    lab, as in an activated virtual environment.
    """
    return {
        "MESHNET_SOCKET": str(agent_socket(base_dir, host)),
        "MESHNET_ETCD": etcd_url,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def _decode(body: dict[str, Any]) -> LabDocument:
    if body["version"] != _VERSION:
        raise ValueError(f"version {body['version']}")
    return LabDocument(
        name=body["name"],
        family=body["family"],
        mtu_bytes=body["mtu_bytes"],
        gateway=body["gateway"],
        agent_args=list(body["agent_args"]),
        etcd_url=body["etcd_url"],
        etcds={
            name: ProcessRef(int(ref["pid"]), int(ref["start_time"]))
            for name, ref in body["etcds"].items()
        },
        hosts={
            name: HostRecord(
                index=host["index"],
                underlay_ip=host["underlay_ip"],
                agent=_decode_ref(host["agent"]),
            )
            for name, host in body["hosts"].items()
        },
        containers=[
            ContainerRecord(
                ref=ProcessRef(int(item["ref"]["pid"]), int(item["ref"]["start_time"])),
                host=item["host"],
                netns=None if item["netns"] is None else (item["netns"][0], item["netns"][1]),
            )
            for item in body["containers"]
        ],
    )


def _decode_ref(body: dict[str, Any] | None) -> ProcessRef | None:
    if body is None:
        return None
    return ProcessRef(int(body["pid"]), int(body["start_time"]))
