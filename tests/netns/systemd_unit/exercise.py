"""All that an agent does on a host, step by step: what works, and what a confined one cannot.

python -m tests.netns.systemd_unit.exercise      which capability of the unit is needed for what
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import stat
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from meshnet.errors import MeshnetError
from meshnet.lab.agent import spawn_agent
from meshnet.lab.poll import wait_until
from meshnet.lab.topology import Lab
from tests.images import Layout, Member, directory, tar
from tests.netns.mesh import address_of, attach, create_network, meshnet, ping, wait_in_sync
from tests.netns.systemd_unit.settings import UNIT, read_settings
from tests.netns.talk import ask, serving

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Sequence

    from meshnet.lab.host import LabContainer
    from tests.netns.systemd_unit.settings import Settings

_REPOSITORY = Path(__file__).parents[3]
_STRANGER = "12345"
_FILE_CAPABILITY = b"\x01\x00\x00\x02\x00\x04\x00\x00" + bytes(12)
"""``cap_net_bind_service=ep``, as the kernel stores it (linux/capability.h)."""


@contextlib.contextmanager
def confined(settings: Settings) -> Iterator[None]:
    """Every agent of a lab that is started in the block is confined."""

    def spawn(
        enter: Sequence[str], options: Sequence[str], log_path: Path
    ) -> subprocess.Popen[bytes]:
        host = log_path.parent
        file = host / "unit.json"
        caps = settings.capabilities
        document = {
            **dataclasses.asdict(settings),
            "capabilities": sorted(caps) if caps is not None else None,
            "writable": [str(host / "run"), str(host / "state")],
            "kept": sorted({str(_REPOSITORY), sys.prefix, sys.base_prefix}),
        }
        file.write_text(json.dumps(document))
        confine = [sys.executable, "-m", "tests.netns.systemd_unit.confine", str(file)]
        return spawn_agent([*enter, *confine], options, log_path)

    # The agent's process is started in /: `python -m` must find this package there.
    search = os.pathsep.join((str(_REPOSITORY), os.environ.get("PYTHONPATH", "")))
    with (
        mock.patch("meshnet.lab.host.spawn_agent", spawn),
        mock.patch.dict(os.environ, PYTHONPATH=search),
    ):
        yield


class Exercise:
    """A lab of two hosts that is led through everything."""

    def __init__(self, lab: Lab, scratch: Path) -> None:
        self._lab = lab
        self._scratch = scratch
        self._h1, self._h2 = lab.hosts

    def steps(self) -> dict[str, Callable[[], None]]:
        """In order; each is independent of those before but for the first."""
        return {
            "vxlan": lambda: self._overlay("prod", "10.42.0.0/16", "fd00:42::/48"),
            "udp": lambda: self._overlay("slow", "10.43.0.0/16", mode="udp"),
            "vxlan with fallback": self._fallback,
            "bridge, published port 80": self._bridge,
            "macvlan": lambda: self._underlay("macvlan"),
            "underlay-bridge": lambda: self._underlay("underlay-bridge"),
            "attach a process of another user": self._stranger,
            "socket of group meshnet": self._socket,
            "load an image": self._image,
            "kill -9 and start": self._restart,
            "settings of another user": self._foreign_file,
        }

    def _overlay(self, name: str, *subnets: str, mode: str = "vxlan") -> None:
        cidrs = [word for subnet in subnets for word in ("--subnet", subnet)]
        create_network(self._lab, name, *cidrs, "--mode", mode)
        one, two = (host.spawn_container() for host in (self._h1, self._h2))
        there = attach(two, self._h2, name)
        attach(one, self._h1, name)
        _reach(one, address_of(there))

    def _fallback(self) -> None:
        create_network(self._lab, "both", "--subnet", "10.44.0.0/16", "--fallback", "auto")

        def probed() -> bool:
            networks = meshnet(self._h1, "status")["networks"]
            (probes,) = (n["probes"] for n in networks if n["name"] == "both")
            return probes is not None and probes["sent"] > probes["lost"]

        wait_until(probed, 5, "probes are answered")
        meshnet(self._h1, "network", "rm", "both")

    def _bridge(self) -> None:
        meshnet(
            self._h1, "network", "create", "local", "--subnet", "172.30.0.0/24", "--mode", "bridge"
        )
        wait_in_sync(self._h1)
        web = self._h1.spawn_container()
        attach(web, self._h1, "local", "--publish", "80:80")
        with serving((web, "web")):
            answer = ask(self._h2, str(self._h1.underlay_ip), 80)
        assert answer.name == "web"
        meshnet(self._h1, "detach", web.pid, "--net", "local")
        meshnet(self._h1, "network", "rm", "local")

    def _underlay(self, mode: str) -> None:
        meshnet(
            *(self._h1, "network", "create", "lan", "--mode", mode, "--subnet", "10.255.0.0/16"),
            *("--gateway", "10.255.0.1", "--range", "10.255.8.1-10.255.8.250", "--parent", "eth0"),
        )
        for host in (self._h1, self._h2):
            wait_in_sync(host)
        one, two = (host.spawn_container() for host in (self._h1, self._h2))
        there = attach(two, self._h2, "lan")
        attach(one, self._h1, "lan")
        _reach(one, address_of(there))
        for container, host in ((one, self._h1), (two, self._h2)):
            meshnet(host, "detach", container.pid, "--net", "lan")
        meshnet(self._h1, "network", "rm", "lan")
        for host in (self._h1, self._h2):
            wait_in_sync(host)

    def _stranger(self) -> None:
        ids = (f"--reuid={_STRANGER}", f"--regid={_STRANGER}", "--clear-groups")
        container = self._h1.spawn_container(["setpriv", *ids, "sleep", "infinity"])
        wait_until(
            lambda: os.stat(f"/proc/{container.pid}").st_uid == int(_STRANGER), 5, "other user"
        )
        create_network(self._lab, "guest", "--subnet", "10.45.0.0/16")
        attach(container, self._h1, "guest")
        meshnet(self._h1, "detach", container.pid, "--net", "guest")

    def _socket(self) -> None:
        found = self._h1.socket_path.stat()
        assert (found.st_mode & 0o777, found.st_uid) == (0o660, 0)

    def _image(self) -> None:
        """With what needs rights of its own: owners, setuid, a device, a file capability."""
        layer = tar(
            directory("bin", mode=0o755),
            Member("bin/su", data=b"x", mode=0o4755, uid=7, gid=8),
            Member("bin/group", data=b"x", mode=0o2755, uid=7, gid=8),
            Member(
                "bin/ping",
                data=b"x",
                mode=0o755,
                pax={"SCHILY.xattr.security.capability": _FILE_CAPABILITY.decode("latin-1")},
            ),
            directory("closed", mode=0o500),
            Member("closed/own", data=b"x", uid=7, gid=8, mode=0o600),
            Member("dev/null", tarfile.CHRTYPE, device=(1, 3), mode=0o666),
        )
        again = tar(Member("closed/own", data=b"y", uid=9), Member("bin/.wh.su"))
        layout = Layout()
        layout.add("all:1", layer, again)
        archive = self._scratch / "image.tar"
        archive.write_bytes(layout.tar())
        meshnet(self._h1, "image", "load", archive)
        stored = self._h1.state_dir / "images"
        # In the second layer's directory a device of that name stands for what it removed.
        group, su, ping_file = (
            next(path for path in stored.rglob(f"bin/{name}") if path.is_file())
            for name in ("group", "su", "ping")
        )
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (su, group)]
        assert modes == [0o4755, 0o2755], [oct(mode) for mode in modes]
        assert (su.stat().st_uid, su.stat().st_gid) == (7, 8)
        assert os.getxattr(ping_file, "security.capability") == _FILE_CAPABILITY
        assert next(stored.rglob("dev/null")).is_char_device()
        meshnet(self._h1, "image", "rm", "all:1")

    def _restart(self) -> None:
        before = meshnet(self._h1, "endpoint", "ls")
        os.kill(self._h1.agent_pid, signal.SIGKILL)
        wait_until(lambda: not self._h1.is_agent_running(), 5, "the agent is gone")
        self._h1.start_agent()
        wait_in_sync(self._h1)
        assert meshnet(self._h1, "endpoint", "ls") == before

    def _foreign_file(self) -> None:
        """Settings, as keys and passwords, may belong to somebody else and be his alone."""
        self._h1.stop_agent()
        file = self._h1.state_dir / "agent.toml"
        file.write_text('log-level = "debug"\n')
        file.chmod(0o600)
        os.chown(file, int(_STRANGER), int(_STRANGER))
        self._h1.start_agent(["--config", str(file)])


def _reach(source: LabContainer, address: str) -> None:
    wait_until(lambda: ping(source, address), 5, f"{address} answers")


NEEDED_FOR = {
    "chown": "load an image",
    "dac_override": "load an image",
    "fowner": "load an image",
    "fsetid": "load an image",
    "mknod": "load an image",
    "net_admin": "vxlan",
    "net_bind_service": "bridge, published port 80",
    "net_raw": "macvlan",
    "setfcap": "load an image",
    "sys_admin": "vxlan",
    "sys_ptrace": "attach a process of another user",
}
"""A step that each capability was put into the unit for."""


def run(settings: Settings, *names: str) -> dict[str, str]:
    """Take steps in a lab of its own, or all; returns what failed, and why."""
    failed: dict[str, str] = {}
    lab = Lab(f"cut{os.getpid()}", hosts=2)
    with confined(settings):
        try:
            with lab:
                steps = Exercise(lab, lab.base_dir).steps()
                for name in names or steps:
                    try:
                        steps[name]()
                    except Exception as error:
                        failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        except MeshnetError as error:
            failed["start"] = str(error).strip().splitlines()[-1]
    return failed


def main() -> int:
    """Do everything as in the unit; then cut one capability after the other.

    Returns:
        1 if something fails that must not, or goes well without a capability.
    """
    settings = read_settings(UNIT)
    assert settings.capabilities is not None
    whole = run(settings)
    print("as in the unit:", whole or "all works", flush=True)
    spare = []
    for cut in sorted(settings.capabilities):
        failed = run(settings.without(cut), NEEDED_FOR[cut])
        print(f"without {cut}:", failed or f"{NEEDED_FOR[cut]} works", flush=True)
        if not failed:
            spare.append(cut)
    print("not needed:", ", ".join(spare) or "none")
    return 1 if whole or spare else 0


if __name__ == "__main__":
    sys.exit(main())
