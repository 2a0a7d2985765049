"""Looks at a mesh as it is right now, by asking etcd, kernels, agents, disks and endpoints.

Nothing here is the product's: keys are read with etcdctl, kernels with ip, bridge and nft, agents
by HTTP.  A host costs three short processes, an endpoint one, and all run side by side, because
this is done after every fault.  What cannot be read is a sentence, not an exception: after a fault
that is an answer.
"""

from __future__ import annotations

import base64
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from meshnet.errors import MeshnetError
from meshnet.unix_http import HttpConnection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.commands import Namespace
    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab
    from tests.netns.faults.mesh import FaultMesh

Document = dict[str, Any]

PREFIX = "/meshnet/v1/"
_WORKERS = 8
_AGENT_ANSWERS_S = 3.0
_COMMAND_ENDS_S = 10.0
_IP = ("address show", "route show table all", "nexthop show", "neighbour show")


class StoreKey(NamedTuple):
    """A key of etcd, without the prefix.

    Attributes:
        lease: id of the lease that it hangs on; 0: none.
    """

    value: str
    lease: int

    @property
    def document(self) -> Document:
        """The value; empty if it is not a JSON object."""
        try:
            document = json.loads(self.value)
        except ValueError:
            return {}
        return document if isinstance(document, dict) else {}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A network namespace, as ``ip -j -d``, ``bridge -j`` and ``nft -j`` tell it."""

    links: list[Document]
    routes: list[Document]
    nexthops: list[Document]
    neighbours: list[Document]
    fdb: list[Document] = field(default_factory=list)
    nft: list[Document] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Agent:
    """What an agent answers.

    Attributes:
        warning: why `endpoints` may not be all.
    """

    status: Document
    hosts: list[Document]
    endpoints: list[Document]
    warning: str | None


@dataclass(frozen=True, slots=True)
class Disk:
    """A host's state directory.

    Attributes:
        endpoints: files of endpoints by name, with their text.
        others: names of all other files.
    """

    instance: str
    mesh_id: str
    endpoints: dict[str, str]
    others: list[str]


@dataclass(slots=True)
class Observation:
    """All of it, by name of host, and for endpoints by process id.

    Attributes:
        unreadable: sentences about what could not be asked; that is missing in the tables.
    """

    store: dict[str, StoreKey] | None = None
    kernels: dict[str, Kernel] = field(default_factory=dict)
    agents: dict[str, Agent] = field(default_factory=dict)
    disks: dict[str, Disk] = field(default_factory=dict)
    namespaces: dict[int, Kernel] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)


def observe(mesh: FaultMesh) -> Observation:
    """Ask everybody."""
    seen = Observation()
    hosts = mesh.lab.hosts

    def store() -> None:
        seen.store = read_store(mesh.lab)

    def kernel(host: LabHost) -> None:
        seen.kernels[host.name] = _read_host(host)

    def agent(host: LabHost) -> None:
        seen.agents[host.name] = _read_agent(host.socket_path)

    def disk(host: LabHost) -> None:
        seen.disks[host.name] = _read_disk(host.state_dir)

    def namespace(container: Namespace, pid: int) -> None:
        seen.namespaces[pid] = _read_links(container)

    with ThreadPoolExecutor(_WORKERS) as pool:
        jobs: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = [("etcd", store, ())]
        for host in hosts:
            jobs += [
                (f"kernel of {host.name}", kernel, (host,)),
                (f"agent of {host.name}", agent, (host,)),
                (f"disk of {host.name}", disk, (host,)),
            ]
        for member in mesh.members:
            name = f"namespace of {member.document['address']}"
            jobs.append((name, namespace, (member.container, member.container.pid)))
        for what, future in [(what, pool.submit(job, *args)) for what, job, args in jobs]:
            try:
                future.result()
            except (MeshnetError, OSError, ValueError, subprocess.SubprocessError) as error:
                seen.unreadable.append(f"{what} cannot be read: {error}")
    return seen


def read_store(lab: Lab) -> dict[str, StoreKey]:
    """All keys of the mesh."""
    answer = json.loads(
        lab.etcd.ctl("--command-timeout=2s", "get", "--prefix", PREFIX, "-w", "json")
    )
    return {
        _text(pair["key"]).removeprefix(PREFIX): StoreKey(
            _text(pair.get("value", "")), pair.get("lease", 0)
        )
        for pair in answer.get("kvs", [])
    }


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode(errors="replace")


def _read_host(host: Namespace) -> Kernel:
    links = _read_links(host)
    fdb = host.run(["bridge", "-j", "fdb", "show"], timeout=_COMMAND_ENDS_S).stdout
    nft = host.run(["nft", "-j", "list", "ruleset"], timeout=_COMMAND_ENDS_S).stdout
    return Kernel(
        links.links,
        links.routes,
        links.nexthops,
        links.neighbours,
        fdb=json.loads(fdb),
        nft=json.loads(nft)["nftables"],
    )


def _read_links(namespace: Namespace) -> Kernel:
    argv = ["ip", "-j", "-d", "-batch", "-"]
    printed = namespace.run(argv, input_text="\n".join(_IP), timeout=_COMMAND_ENDS_S).stdout
    tables = []
    while printed := printed.lstrip():
        table, end = json.JSONDecoder().raw_decode(printed)
        # iproute2 prints {} for what is filtered out.
        tables.append([row for row in table if row])
        printed = printed[end:]
    if len(tables) != len(_IP):
        raise ValueError(f"ip printed {len(tables)} documents for {len(_IP)} commands")
    return Kernel(*tables)


def ask_agent(socket_path: Path, path: str) -> tuple[int, str]:
    """Status and body of an agent's answer to a GET."""
    with HttpConnection(str(socket_path), _AGENT_ANSWERS_S) as connection:
        connection.request("GET", path)
        answer = connection.answer()
        return answer.status, answer.read().decode()


def _read_agent(socket_path: Path) -> Agent:
    def get(what: str) -> Any:  # noqa: ANN401
        status, body = ask_agent(socket_path, f"/v1/{what}")
        if status != 200:
            raise ValueError(f"GET /v1/{what}: {status} {body}")
        return json.loads(body)

    listed = get("endpoints")
    return Agent(get("status"), get("hosts"), listed["endpoints"], listed["warning"])


def _read_disk(path: Path) -> Disk:
    mesh = json.loads((path / "mesh.json").read_text(errors="replace"))
    return Disk(
        instance=(path / "instance").read_text(),
        mesh_id=str(mesh.get("id")),
        endpoints={
            file.name: file.read_text(errors="replace") for file in (path / "endpoints").iterdir()
        },
        others=sorted(file.name for file in path.iterdir() if file.is_file()),
    )
