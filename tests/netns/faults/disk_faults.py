"""Faults of the state directory: neither a record nor a packet is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from meshnet.errors import AgentUnreachableError
from meshnet.lab.poll import wait_until
from tests.netns.faults.fault import Injected, cuts_nothing
from tests.netns.faults.mesh import TTL_S
from tests.netns.mesh import meshnet

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

    from meshnet.lab.host import LabHost
    from tests.netns.faults.mesh import FaultMesh, Member


def _mount(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, text=True)


def _files(host: LabHost) -> list[Path]:
    """What the agent keeps, less what is empty."""
    state = host.state_dir
    return sorted(
        file
        for file in (*state.glob("*"), *(state / "endpoints").glob("*.json"))
        if file.is_file() and file.stat().st_size
    )


def _start_instance(host: LabHost) -> None:
    """Start an agent, again and again: one of another instance ends while the lease lasts."""

    def started() -> bool:
        try:
            host.start_agent()
        except AgentUnreachableError as error:
            if "is held by an agent" not in str(error):
                raise
            return False
        return True

    wait_until(started, 5 * TTL_S, "the lease of the instance before is over")


def _refused_attach(mesh: FaultMesh, host: LabHost, rng: Random) -> None:
    """Check that an attach which cannot be recorded is refused and undone."""
    container = host.spawn_container()
    network = rng.choice(sorted({member.network for member in mesh.members}))
    try:
        said = meshnet(host, "attach", container.pid, "--net", network, status=7)
        assert "cannot be recorded" in said, said
        assert "eth0" not in container.run(["ip", "-br", "link"]).stdout
    finally:
        container.end()


@dataclass(frozen=True, slots=True)
class DiskFull:
    """The state directory is on a file system that is full."""

    name: str = "state directory full"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Put it on a small one, under a running agent, and fill that."""
        host = rng.choice(mesh.lab.hosts)
        state, copy = host.state_dir, host.state_dir.with_name("state-copy")
        shutil.copytree(state, copy)
        _mount("mount", "-t", "tmpfs", "-o", "size=1m,mode=0755", "meshnet-fault", str(state))
        shutil.copytree(copy, state, dirs_exist_ok=True)
        shutil.rmtree(copy)
        filler = state / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}"], capture_output=True, check=False)
        _refused_attach(mesh, host, rng)

        def heal() -> None:
            filler.unlink()
            shutil.copytree(state, copy)
            _mount("umount", str(state))
            for file in (state / "endpoints").iterdir():
                file.unlink()
            shutil.copytree(copy, state, dirs_exist_ok=True)
            shutil.rmtree(copy)

        return Injected(f"state directory of {host.name} full", heal, rng.uniform(0, 2 * TTL_S))


@dataclass(frozen=True, slots=True)
class DiskReadOnly:
    """The file system of the state directory turns read-only, as one with errors does."""

    name: str = "state directory read-only"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Turn it."""
        host = rng.choice(mesh.lab.hosts)
        state = str(host.state_dir)
        _mount("mount", "--bind", state, state)
        _mount("mount", "-o", "remount,ro,bind", state)
        _refused_attach(mesh, host, rng)
        return Injected(
            f"state directory of {host.name} read-only",
            lambda: _mount("umount", state),
            rng.uniform(0, 2 * TTL_S),
        )


@dataclass(frozen=True, slots=True)
class _CutsMember:
    """Whatever goes from or to one endpoint."""

    pid: int

    def __call__(self, source: Member, target: Member) -> bool:
        return self.pid in (source.container.pid, target.container.pid)


@dataclass(frozen=True, slots=True)
class FileDamaged:
    """A file of the state directory is cut short, or a byte of it is another, at an agent's start.

    Nothing is deleted: the operator puts the file back, and all is as it was.
    """

    name: str = "state file damaged"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Damage one."""
        host = mesh.host_to_end(rng)
        return self.inject_this(rng.choice(_files(host)), host, mesh, rng)

    def inject_this(self, file: Path, host: LabHost, mesh: FaultMesh, rng: Random) -> Injected:
        """Damage this one."""
        host.kill_agent()
        content = file.read_bytes()
        at = rng.randrange(len(content))
        if rng.randrange(2):
            file.write_bytes(content[:at])
            what = f"{file.name} of {host.name} cut at byte {at}"
        else:
            other = content[at] ^ (1 << rng.randrange(8))
            file.write_bytes(content[:at] + bytes([other]) + content[at + 1 :])
            what = f"byte {at} of {file.name} of {host.name} is {other}"
        _start_instance(host)

        def heal() -> None:
            host.kill_agent()
            if file.name != "mesh.json":  # it goes on with what it learned anew
                file.write_bytes(content)
            for bad in file.parent.glob(f"{file.stem}.bad*"):
                bad.unlink()
            _start_instance(host)

        owner = [m for m in mesh.members if m.document["id"] == file.stem]
        return Injected(
            what,
            heal,
            rng.uniform(0, TTL_S),
            _CutsMember(owner[0].container.pid) if owner else cuts_nothing,
        )


@dataclass(frozen=True, slots=True)
class NewerState:
    """An agent of a newer version has written the state directory, and the old one comes back.

    It refuses with a clear error, and loses nothing; on what it knows it goes on.
    """

    name: str = "upgraded and back"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Write what a newer version might have written."""
        host = mesh.host_to_end(rng)
        host.stop_agent()
        endpoints = sorted((host.state_dir / "endpoints").glob("*.json"))
        records = [host.state_dir / "mesh.json", *endpoints]
        before = {file: file.read_bytes() for file in records}
        for file, content in before.items():
            document = json.loads(content)
            del document["crc32"]
            document |= {"v": document["v"] + 1, "new": {"key": [1, 2, 3]}}
            file.write_text(json.dumps(document))
        newer = {file: file.read_bytes() for file in records}
        with pytest.raises(AgentUnreachableError, match="newer"):
            host.start_agent()
        assert {file: file.read_bytes() for file in records} == newer
        assert sorted((host.state_dir / "endpoints").iterdir()) == endpoints

        def heal() -> None:
            for file, content in before.items():
                # An unknown key is ignored.
                document = json.loads(content) | {"new": 1}
                del document["crc32"]
                body = json.dumps(document).removesuffix("}").encode()
                with_more = body + b',"crc32":"%08x"}' % zlib.crc32(body)
                file.write_bytes(with_more if rng.randrange(2) else content)
            host.start_agent()

        return Injected(f"{host.name} upgraded and back", heal, rng.uniform(0, TTL_S), says="newer")
