"""Installs, upgrades, removes and purges the package that ``make deb`` built.

The Debian is made by mmdebstrap, with what the package depends on and nothing else, and entered by
chroot: without systemd.  About a minute, so it is not part of ``make test``.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.agent import is_ready
from meshnet.lab.poll import wait_until
from tests.netns.conftest import make_lab  # noqa: F401 (a fixture)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

_TREE = Path(__file__).parents[2]
_ENTER = 'mount -t proc proc "$0/proc" && mount -t sysfs sysfs "$0/sys" && exec chroot "$0" "$@"'
_STAYS = {"/etc/group", "/etc/gshadow", "/etc/group-", "/etc/gshadow-"}
"""What a purge leaves changed, as docs/operations.md says: the group."""


class Root:
    """A Debian in a directory; the mounts that a command needs there go when it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def argv(self, *command: str) -> list[str]:
        return ["unshare", "--mount", "sh", "-c", _ENTER, str(self.path), *command]

    def run(self, *command: str) -> str:
        done = subprocess.run(self.argv(*command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def files(self) -> dict[str, bytes]:
        """Its configuration and programs, with what is in them; not what dpkg and ldconfig note."""
        found = {}
        for top in ("etc", "usr", "run", "var/lib/meshnet"):
            for path in (self.path / top).rglob("*"):
                if path.is_file() and not path.is_symlink():
                    found[f"/{path.relative_to(self.path)}"] = path.read_bytes()
                else:
                    found[f"/{path.relative_to(self.path)}"] = b""
        return found


@pytest.fixture(scope="module")
def package() -> Path:
    (found,) = (_TREE / "build").glob("meshnet_*.deb")
    return found


@pytest.fixture
def root(package: Path, tmp_path: Path) -> Iterator[Root]:
    """A Debian with what the package depends on."""
    field = subprocess.run(
        ["dpkg-deb", "-f", package, "Depends"], capture_output=True, text=True, check=True
    ).stdout
    depends = sorted({re.split(r"[ (]", word.strip())[0] for word in field.split(",")})
    sources = sorted(Path("/etc/apt").glob("sources.list")) + sorted(
        Path("/etc/apt/sources.list.d").glob("*")
    )
    path = tmp_path / "root"
    subprocess.run(
        [
            *("mmdebstrap", "--mode=root", "--variant=apt", "--quiet"),
            *(f"--include={','.join(depends)}", "bookworm", str(path), *map(str, sources)),
        ],
        check=True,
        timeout=300,
    )
    path.chmod(0o755)
    (path / "meshnet.deb").write_bytes(package.read_bytes())
    yield Root(path)
    subprocess.run(["rm", "-rf", "--one-file-system", path], check=True)


def test_install_and_purge(root: Root) -> None:
    before = root.files()
    root.run("dpkg", "--install", "/meshnet.deb")
    assert root.run("meshnet", "--version").startswith("meshnet ")
    assert root.run("meshnet-agent", "--version").startswith("meshnet-agent ")
    assert root.run("getent", "group", "meshnet")
    built = "from meshnet.vtep.native.library import load; print(load())"
    assert "libmeshnet-vtep.so" in root.run("/usr/lib/meshnet/bin/python3", "-c", built)
    assert "--net" in root.run("sh", "-c", "zcat /usr/share/man/man1/meshnet-attach.1.gz").replace(
        "\\-", "-"
    )
    # What it ran left nothing that dpkg does not know.
    known = set(root.run("dpkg", "--listfiles", "meshnet").splitlines())
    assert set(root.files()) - set(before) - known <= {"/etc/group-", "/etc/gshadow-"}

    settings = root.path / "etc/meshnet/agent.toml"
    settings.write_text('etcd = ["http://192.0.2.1:2379"]\n')
    root.run("dpkg", "--install", "/meshnet.deb")
    assert "192.0.2.1" in settings.read_text(), "an upgrade keeps the settings"
    root.run("dpkg", "--remove", "meshnet")
    assert settings.exists()
    assert not (root.path / "usr/bin/meshnet").exists()
    root.run("dpkg", "--purge", "meshnet")
    after = root.files()
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert changed <= _STAYS


def test_two_hosts(root: Root, make_lab: Callable[..., Lab]) -> None:  # noqa: F811
    root.run("dpkg", "--install", "/meshnet.deb")
    lab = make_lab(2, start_agents=False)
    agents = [_start(root, host, lab.etcd.client_url) for host in lab.hosts]
    try:
        for host in lab.hosts:
            socket = root.path / f"run/{host.name}/agent.sock"
            wait_until(lambda at=socket: is_ready(at), 60, "the agent is ready")  # type: ignore[misc]
        one, two = lab.hosts
        _meshnet(root, one, "network", "create", "prod", "--subnet", "10.42.0.0/16")
        from_one, to_two = one.spawn_container(), two.spawn_container()
        _meshnet(root, one, "attach", str(from_one.pid), "--net", "prod")
        address = _meshnet(root, two, "attach", str(to_two.pid), "--net", "prod").split("/")[0]
        wait_until(
            lambda: from_one.run(["ping", "-c1", "-W1", address], check=False).returncode == 0,
            30,
            "the other host's endpoint answers",
        )
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait(20)


def _start(root: Root, host: LabHost, etcd: str) -> subprocess.Popen[str]:
    options = ("--etcd", etcd, "--underlay-dev", "eth0", "--host-id", host.name)
    directories = ("--run-dir", f"/run/{host.name}", "--state-dir", f"/var/lib/{host.name}")
    log = (root.path / f"{host.name}.log").open("w")
    with log:
        return host.popen(
            root.argv("/usr/bin/meshnet-agent", *options, *directories), stdout=log, stderr=log
        )


def _meshnet(root: Root, host: LabHost, *arguments: str) -> str:
    socket = f"/run/{host.name}/agent.sock"
    return host.run(root.argv("meshnet", "--socket", socket, *arguments)).stdout.strip()
