"""What an agent does with the containers that it finds on disk, without OCI runtime and kernel."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import trio

from meshnet.errors import ConflictError, MeshnetError, NotFoundError, UsageError
from meshnet.runtime.spec.id_ranges import PER_CONTAINER, IdRange
from meshnet.runtime.spec.mount_points import MountPoint
from meshnet.runtime.spec.options import ContainerOptions
from meshnet_agent.containers import runtime as module
from meshnet_agent.containers.bundle.paths import ContainerPaths
from meshnet_agent.containers.lifecycle import Containers
from meshnet_agent.containers.record import (
    FILE,
    ContainerEndpoint,
    ContainerRecord,
    ProcessId,
    State,
    load_all,
    save,
)
from meshnet_agent.containers.runtime import RuntimeProvider

if TYPE_CHECKING:
    from pathlib import Path

    from meshnet.model import Endpoint

BEFORE = ProcessId(1, 1, "another boot")
ENDPOINT = ContainerEndpoint(id="e1", network="prod", pid=77, addresses=("10.42.0.2",))


class FakeRuntime:
    """Remembers what it was told to delete."""

    def __init__(self) -> None:
        self.path = "fake"
        self.deleted: list[str] = []

    def cgroup(self, identity: str) -> str:
        return f"/meshnet/{identity}"

    async def delete(self, identity: str) -> None:
        await trio.lowlevel.checkpoint()
        self.deleted.append(identity)


def record(number: int, state: State = State.RUNNING, **fields: Any) -> ContainerRecord:  # noqa: ANN401
    options = ContainerOptions(rootfs="/r", command=("true",), **fields.pop("options", {}))
    values: dict[str, Any] = {
        "id": f"{number:012x}", "name": f"c{number}", "options": options, "created_s": number,
        "args": ("true",), "lowerdirs": ("/r",), "state": state, "started_s": 1.0,
        "process": BEFORE, "shim": BEFORE,
    }  # fmt: skip
    return ContainerRecord(**values | fields)


class Host:
    """A host's directories, and the agent's part on them."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runtime = FakeRuntime()
        self.detached: list[tuple[int, str]] = []
        self.state = directory / "state"
        self.provider = RuntimeProvider(directory / "run" / "oci")
        self.containers = Containers(
            ContainerPaths(
                state=self.state / "containers",
                run=directory / "run" / "containers",
                userns=directory / "run" / "userns",
                images=self.state / "images",
                volumes=self.state / "volumes",
            ),
            self,
            self.provider,
            IdRange(1 << 31, 1 << 20),
        )

        async def find_runtime(
            _root: Path, *, systemd_cgroup: bool
        ) -> tuple[FakeRuntime, dict[str, str]]:
            await trio.lowlevel.checkpoint()
            assert not systemd_cgroup
            return self.runtime, {"crun": "too old"}

        monkeypatch.setattr(module, "find_runtime", find_runtime)
        monkeypatch.setattr(module, "check_may_run", lambda: None)

    async def attach(self, pid: int, request: object) -> Endpoint:
        raise AssertionError(f"nothing is attached here: {pid}, {request}")

    def endpoints_of(self, pid: int) -> list[Endpoint]:
        raise AssertionError(f"nothing runs here: {pid}")

    async def detach(self, pid: int, network: str) -> Endpoint:
        await trio.lowlevel.checkpoint()
        self.detached.append((pid, network))
        raise NotFoundError("its own watch was faster")

    def put(self, wanted: ContainerRecord, exit_status: str | None = None) -> Path:
        directory = self.state / "containers" / wanted.id
        (directory / "exits").mkdir(parents=True)
        save(directory, wanted)
        if exit_status is not None:
            (directory / "exits" / wanted.id).write_text(exit_status)
        return directory


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    wanted = record(1, endpoints=(ENDPOINT,))
    (tmp_path / wanted.id).mkdir()
    save(tmp_path / wanted.id, wanted)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / FILE).write_text("{")
    assert list(load_all(tmp_path)) == [wanted]
    assert (tmp_path / "bad" / FILE).exists()


async def test_what_ended_while_no_agent_was_there(host: Host, nursery: trio.Nursery) -> None:
    host.put(record(1, endpoints=(ENDPOINT,)), "3")
    host.put(record(2))
    gone = host.put(record(3, options={"rm": True}), "0")
    half = host.put(record(4, State.CREATING))
    host.put(record(5, State.EXITED, exit_code=9, process=None, shim=None))
    await nursery.start(host.containers.run)
    statuses = {}
    for name in ("c1", "c2", "c5"):
        with trio.fail_after(10):
            statuses[name] = (await host.containers.wait(name)).exit_code
    assert statuses == {"c1": 3, "c2": 255, "c5": 9}
    with trio.fail_after(10):
        # Records, not views: one whose turn has not come still names its process.
        while len(host.containers.directory.records()) > 3:  # noqa: ASYNC110  (no event for it)
            await trio.sleep(0.01)
    assert not gone.exists()
    assert not half.exists()
    assert host.detached == [(77, "prod")]
    assert set(host.runtime.deleted) == {f"{n:012x}" for n in range(1, 6)}
    assert [v.record.name for v in host.containers.all()] == ["c5", "c2", "c1"]
    for view in host.containers.all():
        assert view.record.state is State.EXITED
        assert view.record.process is None
    on_disk = {r.name: r.exit_code for r in load_all(host.state / "containers")}
    assert on_disk == statuses
    assert host.provider.report() == {"crun": "too old"}
    nursery.cancel_scope.cancel()


async def test_names_ids_and_refusals(host: Host, nursery: trio.Nursery) -> None:
    for number in (0x10, 0x11):
        host.put(record(number, State.EXITED, exit_code=0, process=None, shim=None))
    await nursery.start(host.containers.run)
    found = host.containers.directory.find(f"{0x10:012x}")
    assert host.containers.directory.find("c16") is found
    with pytest.raises(UsageError, match="2 containers' ids begin with"):
        host.containers.directory.find("0000")
    with pytest.raises(NotFoundError):
        host.containers.directory.find("")
    with pytest.raises(ConflictError, match="taken"):
        await host.containers.create(ContainerOptions(rootfs="/r", command=("true",), name="c16"))
    with pytest.raises(ConflictError, match="does not run"):
        await host.containers.kill("c16", "TERM")
    # One that cannot start again has ended as before.
    with pytest.raises(MeshnetError):
        await host.containers.start("c16")
    assert found.record.state is State.EXITED
    assert found.record.error
    with trio.fail_after(10):
        assert (await host.containers.wait("c16")).exit_code == 0
    await host.containers.remove("c16", force=False)
    with pytest.raises(NotFoundError):
        host.containers.directory.find("c16")
    nursery.cancel_scope.cancel()


async def test_a_failed_create_leaves_nothing(host: Host, nursery: trio.Nursery) -> None:
    await nursery.start(host.containers.run)
    with pytest.raises(UsageError, match="is not a directory"):
        await host.containers.create(ContainerOptions(rootfs="/none", command=("true",)))
    assert host.containers.all() == []
    assert list((host.state / "containers").glob("*")) == []
    nursery.cancel_scope.cancel()


def put_volume(host: Host, name: str, *, anonymous: bool) -> Path:
    data = host.state / "volumes" / name / "data"
    data.mkdir(parents=True)
    (data / "file").write_text("kept")
    about = {"anonymous": anonymous, "created_s": 1.0}
    (data.parent / "volume.json").write_text(json.dumps(about))
    return data


async def test_volumes_go_when_they_are_to(host: Host, nursery: trio.Nursery) -> None:
    over: dict[str, Any] = {"state": State.EXITED, "exit_code": 0, "process": None, "shim": None}
    made = {name: put_volume(host, name, anonymous=name != "db") for name in ("a", "b", "c", "db")}
    named = MountPoint("db", "/db")
    for number, name in enumerate(("a", "b"), 1):
        points = (named, MountPoint(name, "/x", anonymous=True))
        host.put(record(number, mount_points=points, **over))
    # The anonymous volume of the first container now has a second user, who asked by its name.
    host.put(record(3, mount_points=(MountPoint("a", "/y"),), **over))
    # The agent was killed while this one was made, and while a volume was copied.
    half = put_volume(host, "half", anonymous=True)
    host.put(record(4, State.CREATING, mount_points=(MountPoint("half", "/x", anonymous=True),)))
    (host.state / "volumes" / ".tmp1" / "data").mkdir(parents=True)
    await nursery.start(host.containers.run)
    with trio.fail_after(10):
        while half.exists():  # noqa: ASYNC110  (there is no event for it)
            await trio.sleep(0.01)
    assert not (host.state / "volumes" / ".tmp1").exists()
    volumes = host.containers.volumes
    having = {u.volume.name: u.containers for u in await volumes.all()}
    assert having == {"a": ("c1", "c3"), "b": ("c2",), "c": (), "db": ("c1", "c2")}
    with pytest.raises(ConflictError, match="in use by container c1, c2"):
        await volumes.remove("db")
    await host.containers.remove("c1", force=False, volumes=True)
    assert made["a"].exists()
    await host.containers.remove("c2", force=False)
    assert made["b"].exists()
    assert await volumes.prune(named=False) == ["b", "c"]
    assert await volumes.prune(named=True) == ["db"]
    # A volume with a name is not the container's own, so it stays.
    await host.containers.remove("c3", force=False, volumes=True)
    assert [u.volume.name for u in await volumes.all()] == ["a"]
    with pytest.raises(NotFoundError, match="volume ls"):
        await volumes.remove("db")
    nursery.cancel_scope.cancel()


async def test_ids_are_those_that_no_record_has(host: Host, nursery: trio.Nursery) -> None:
    first = IdRange(1 << 31, PER_CONTAINER)
    over: dict[str, Any] = {"state": State.EXITED, "exit_code": 0, "process": None, "shim": None}
    host.put(record(1, ids=first, **over))
    await nursery.start(host.containers.run)
    assert host.containers.inspect("c1").record.ids == first
    wanted = f"auto:{(1 << 31) + 7}:9"
    options = ContainerOptions(rootfs="/", command=("true",), userns=wanted)
    with pytest.raises(ConflictError, match="of container c1"):
        await host.containers.create(options)
    lost = ContainerOptions(rootfs="/", command=("true",), userns="container:nobody")
    with pytest.raises(NotFoundError, match="nobody"):
        await host.containers.create(lost)
    assert [v.record.name for v in host.containers.all()] == ["c1"]
    nursery.cancel_scope.cancel()
