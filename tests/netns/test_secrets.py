"""etcd's password, and where it must not appear: logs, ``ps``, children, documents, disk, etcd."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from meshnet.errors import StoreUnavailableError
from meshnet.lab.agent import spawn_agent
from meshnet.lab.poll import wait_until
from tests.netns.faults.observation import ask_agent
from tests.netns.mesh import attach, meshnet, wait_in_sync

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Sequence

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
SECRET = "s3cret-of-etcd-that-nobody-may-see"
WRONG = "wr0ng-password-that-nobody-may-see"
DOCUMENTS = (
    *("/v1/status", "/v1/hosts", "/v1/endpoints", "/v1/networks", "/v1/containers", "/v1/images"),
    *("/metrics", "/openapi.json", "/healthz", "/readyz", "/v1/nothing"),
)


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    """A file system of busybox alone."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "install busybox-static"
    root = tmp_path / "rootfs"
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin" / "sleep")
    return root


def with_environment(**variables: str) -> mock._patch[object]:
    """Agents are started with these variables, which ``ps`` must not show either."""

    def spawn(
        enter: Sequence[str], options: Sequence[str], log_path: Path
    ) -> subprocess.Popen[bytes]:
        file = log_path.with_name("environment")
        file.write_text(json.dumps(variables))
        script = (
            "import json, os, pathlib, sys;"
            "os.environ.update(json.loads(pathlib.Path(sys.argv[1]).read_text()));"
            "pathlib.Path(sys.argv[1]).unlink();"
            "os.execvp(sys.argv[2], sys.argv[2:])"
        )
        return spawn_agent([*enter, sys.executable, "-c", script, str(file)], options, log_path)

    return mock.patch("meshnet.lab.host.spawn_agent", spawn)


def with_password(lab: Lab) -> None:
    """Turn etcd's users on."""
    lab.etcd.ctl("user", "add", f"root:{SECRET}")
    lab.etcd.ctl("user", "grant-role", "root", "root")
    lab.etcd.ctl("auth", "enable")


def processes_of(host: LabHost) -> Iterator[Path]:
    """All in the host's namespace, and all that its agent, or a shim of its, started."""
    directory = str(host.run_dir.parent)
    parents = {int(p.name): _parent(p) for p in Path("/proc").glob("[0-9]*") if p.is_dir()}
    shims = {pid for pid in parents if directory in _read(Path(f"/proc/{pid}/cmdline"))}
    for pid in parents:
        above: int | None = pid
        while above and above not in shims:
            above = parents.get(above)
        if above:
            yield Path(f"/proc/{pid}")


def _parent(process: Path) -> int | None:
    text = _read(process / "stat")
    return int(text.rpartition(")")[2].split()[1]) if text else None


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def files_below(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        # The agent does not keep anything in the container's own file system.
        if path.is_file() and not path.is_symlink() and "rootfs" not in path.parts:
            yield path


def where_is(secret: str, host: LabHost, *, children_only: bool) -> list[str]:
    """Every place that has the secret.

    Args:
        children_only: the agent's own environment may, which only root and it can read.
    """
    found = [str(path) for path in files_below(host.run_dir.parent) if secret in _read(path)]
    for process in processes_of(host):
        if secret in _read(process / "cmdline"):
            found.append(f"cmdline of {_read(process / 'comm').strip()}")
        own = process.name == str(host.agent_pid)
        if not (own and children_only) and secret in _read(process / "environ"):
            found.append(f"environment of {_read(process / 'cmdline')}")
    for path in DOCUMENTS:
        if secret in ask_agent(host.socket_path, path)[1]:
            found.append(f"document {path}")
    return found


def test_the_password_is_nowhere(make_lab: MakeLab, rootfs: Path, tmp_path: Path) -> None:
    lab = make_lab(2, start_agents=False)
    h1, h2 = lab.hosts
    with_password(lab)
    login = ("--etcd-user", "root", "--log-level", "debug")
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n")
    file.chmod(0o600)
    with with_environment(MESHNET_ETCD_PASSWORD=SECRET):
        h1.start_agent([*login, "--log-format", "json"])
    h2.start_agent([*login, "--etcd-password-file", str(file)])
    meshnet(h1, "network", "create", "prod", "--subnet", "10.42.0.0/16", "--mode", "udp")
    for host in (h1, h2):
        wait_in_sync(host, peers=1)
        attach(host.spawn_container(), host, "prod")
        argv = ["run", "--detach", "--net", "prod", "--rootfs", str(rootfs), "sleep", "1000"]
        host.run([sys.executable, "-m", "meshnet.cli.main", *argv])
    names = {_read(process / "comm").strip() for process in processes_of(h1)}
    assert {"conmon", "sleep"} <= names  # and the agent and its VTEP, by whatever name
    assert SECRET in _read(Path(f"/proc/{h1.agent_pid}/environ"))  # so it would have been seen
    assert any("meshnet.vtep" in _read(p / "cmdline") for p in processes_of(h1))
    for host in (h1, h2):
        assert where_is(SECRET, host, children_only=host is h1) == []
    # etcd forgets who was who, as after a restart: the agent logs in again.
    lab.etcd.kill()
    meshnet(h1, "status")
    lab.etcd.start()
    ctl = ("--user", f"root:{SECRET}")

    def is_back() -> bool:
        try:
            return "h1" in lab.etcd.ctl(*ctl, "get", "--prefix", "/")
        except StoreUnavailableError:
            return False

    wait_until(is_back, 30, "etcd is back")
    wait_until(lambda: meshnet(h1, "status")["store"]["connected"], 20, "connected")
    assert where_is(SECRET, h1, children_only=True) == []
    assert SECRET not in lab.etcd.ctl(*ctl, "get", "--prefix", "/")
    assert SECRET not in lab.etcd.log_file.read_text()
    # The message does not repeat a password that is refused.
    h2.stop_agent()
    h2.log_path.write_text("")
    with with_environment(MESHNET_ETCD_PASSWORD=WRONG):
        h2.start_agent(login, wait=False)
    wait_until(lambda: not h2.is_agent_running(), 20, "the agent gives up")
    said = h2.log_path.read_text()
    assert "authentication failed" in said
    assert WRONG not in said
    lab.etcd.ctl(*ctl, "auth", "disable")
