"""Containers: what their processes see, how they end, and that nothing is left of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from meshnet.lab.poll import wait_until
from tests.images import Member, config_of, directory, symlink, tar
from tests.netns.mesh import attach, create_network, meshnet, ping

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
CLIENT = [sys.executable, "-m", "meshnet.cli.main"]
NAMESPACES = ("pid", "mnt", "uts", "ipc", "net", "cgroup")
APPLETS = (
    "sh", "true", "sleep", "cat", "echo", "id", "ip", "ping", "env", "hostname", "touch",
    "readlink",    "kill", "head", "yes", "pwd", "stty", "tail", "grep", "httpd", "ls",
)  # fmt: skip


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file system of busybox alone."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "install busybox-static"
    root = tmp_path_factory.mktemp("rootfs")
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp"):
        (root / name).mkdir()
    shutil.copy(busybox, root / "bin" / "busybox")
    for name in APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:70:71::/srv:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\nweb:x:71:\nlog:x:72:web\n")
    (root / "bin" / "closed").write_text("#!/bin/sh\n")
    return root


def run(
    host: LabHost,
    rootfs: Path,
    *words: str,
    options: tuple[str, ...] = (),
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """An attached ``meshnet run --rm``."""
    argv = [*CLIENT, "run", "--rm", *options, "--rootfs", str(rootfs), *words]
    return host.run(argv, check=False, input_text=stdin)


def shell(host: LabHost, rootfs: Path, script: str, *options: str) -> str:
    """What a script prints in a container of its own; it must end well."""
    done = run(host, rootfs, "sh", "-c", script, options=options)
    assert done.returncode == 0, (script, done)
    return done.stdout.strip()


def detached(host: LabHost, rootfs: Path, *words: str) -> dict[str, Any]:
    """Options and a command, in the background."""
    at = words.index("--") if "--" in words else 0
    options, command = words[:at], words[at + 1 if at else 0 :]
    argv = ["run", "--json", "--detach", *options, "--rootfs", rootfs, *command]
    done = host.run([*CLIENT, *map(str, argv)], check=False)
    assert done.returncode == 0, done
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def leftovers(host: LabHost) -> dict[str, list[str]]:
    """All that containers can leave behind."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    # Other labs' containers are there too.
    log = host.log_path.read_text()
    found = Path("/sys/fs/cgroup").glob("**/meshnet/*")
    groups = [p for p in found if f"id={p.name}" in log]
    links = host.run(["ip", "-br", "link"]).stdout.split()
    conmons = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(host.run_dir) in path.read_text() and "conmon" in path.read_text():
                conmons.append(path.parent.name)
        except OSError:
            continue
    return {
        "mounts": [line for line in mounts if str(host.state_dir) in line],
        "cgroups": [str(p) for p in groups],
        "links": [link for link in links if link.startswith("mne")],
        "conmons": conmons,
        "files": [p.name for p in (host.state_dir / "containers").glob("*")],
        "sockets": [p.name for p in (host.run_dir / "containers").glob("*")],
    }


def is_clean(host: LabHost) -> bool:
    return not any(leftovers(host).values())


def test_what_a_process_sees_and_how_it_ends(
    make_lab: MakeLab, rootfs: Path, tmp_path: Path
) -> None:
    lab = make_lab(1)
    h1 = lab.hosts[0]
    # Statuses are Docker's.
    assert run(h1, rootfs, "true").returncode == 0
    assert run(h1, rootfs, "sh", "-c", "exit 3").returncode == 3
    assert run(h1, rootfs, "/bin/nothing").returncode == 127
    assert run(h1, rootfs, "nothing").returncode == 127
    assert run(h1, rootfs, "/bin/closed").returncode == 126
    assert run(h1, rootfs, "sh", "-c", "kill -9 $$; sleep 9").returncode in (0, 137)
    # Streams.
    done = run(h1, rootfs, "sh", "-c", "cat; echo bad >&2", options=("-i",), stdin="one\ntwo\n")
    assert (done.stdout, done.stderr) == ("one\ntwo\n", "bad\n")
    text = "x" * 50_000 + "\n"
    assert run(h1, rootfs, "cat", options=("-i",), stdin=text * 10).stdout == text * 10
    # Options.
    assert shell(h1, rootfs, "id -u; id -g; id -G", "--user", "web").split() == [
        *("70", "71", "71", "72"),
    ]
    assert shell(h1, rootfs, "echo $A; pwd", "-e", "A=b c", "--workdir", "/new/dir").split(
        "\n"
    ) == [
        "b c",
        "/new/dir",
    ]
    assert shell(h1, rootfs, "hostname", "--hostname", "box") == "box"
    (tmp_path / "file").write_text("mine")
    assert shell(h1, rootfs, "cat /m/file; echo more >/m/new", "-v", f"{tmp_path}:/m") == "mine"
    assert (tmp_path / "new").read_text() == "more\n"
    done = run(h1, rootfs, "touch", "/m/no", options=("-v", f"{tmp_path}:/m:ro"))
    assert "Read-only" in done.stderr
    assert "Read-only" in run(h1, rootfs, "touch", "/no", options=("--read-only",)).stderr
    assert shell(h1, rootfs, "touch /t/yes && ls /t", "--read-only", "--tmpfs", "/t") == "yes"
    assert shell(h1, rootfs, "touch /left; ls /left") == "/left"
    assert not (rootfs / "left").exists()
    assert "init" in shell(h1, rootfs, "cat /proc/1/cmdline", "--init")
    # Safe by default.
    status = shell(h1, rootfs, "cat /proc/self/status")
    assert "CapEff:\t00000000a80425fb" in status  # Docker's default set
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert run(h1, rootfs, "sh", "-c", "echo 1 >/proc/sys/kernel/domainname").returncode != 0
    # Namespaces: all of them its own, and the host's where asked for.
    links = shell(h1, rootfs, "; ".join(f"readlink /proc/self/ns/{n}" for n in NAMESPACES))
    own = [os.readlink(f"/proc/self/ns/{n}") for n in NAMESPACES]
    assert not set(links.split()) & set(own)
    shared = ("--pid", "host", "--ipc", "host", "--uts", "host", "--net", "host")
    links = shell(h1, rootfs, "; ".join(f"readlink /proc/self/ns/{n}" for n in NAMESPACES), *shared)
    netns = h1.run(["readlink", "/proc/self/ns/net"]).stdout.strip()
    assert set(links.split()) & {*own, netns} == {own[0], own[2], own[3], netns}
    assert is_clean(h1), leftovers(h1)


def cgroup_file(pid: int, controller: str, name: str) -> str:
    """A file of the cgroup (v1) of a process, as the kernel has it."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path(f"/sys/fs/cgroup/{controller}{path}/{name}").read_text().strip()
    return Path(f"/sys/fs/cgroup{path}/{name}").read_text().strip()


def test_two_containers_of_one_image(make_lab: MakeLab, rootfs: Path, tmp_path: Path) -> None:
    lab = make_lab(1)
    h1 = lab.hosts[0]
    busybox = Member("bin/busybox", data=(rootfs / "bin/busybox").read_bytes(), mode=0o755)
    links = [symlink(f"bin/{name}", "busybox") for name in APPLETS]
    layer = tar(directory("bin"), directory("etc"), busybox, *links)
    config = config_of(
        (layer,),
        Entrypoint=["/bin/sh", "-c"],
        Cmd=["echo $WHO in $(pwd)"],
        Env=["WHO=image"],
        WorkingDir="/work",
        User="70:71",
        StopSignal="SIGUSR1",
    )
    saved = [{"Config": "config.json", "RepoTags": ["bb:1"], "Layers": ["layer.tar"]}]
    members = [Member("config.json", data=config), Member("layer.tar", data=layer)]
    archive = tmp_path / "image.tar"
    archive.write_bytes(tar(*members, Member("manifest.json", data=json.dumps(saved).encode())))
    meshnet(h1, "image", "load", archive)

    def out(*words: str) -> str:
        done = h1.run([*CLIENT, "run", "--rm", *words], check=False)
        assert done.returncode == 0, done
        return done.stdout.strip()

    assert out("bb:1") == "image in /work"
    assert out("-e", "WHO=me", "bb:1") == "me in /work"
    assert out("bb:1", "id -u; id -g").split() == ["70", "71"]
    assert out("--entrypoint", "/bin/echo", "bb:1", "a", "b") == "a b"
    script = "trap 'exit 8' USR1; while :; do sleep 0.05; done"
    for name in ("one", "two"):
        argv = ["run", "-d", "--name", name, "--user", "0", "bb:1", script]
        h1.run([*CLIENT, *argv])
    h1.run([*CLIENT, "exec", "one", "touch", "/written"])
    assert h1.run([*CLIENT, "exec", "one", "ls", "/written"], check=False).returncode == 0
    assert h1.run([*CLIENT, "exec", "two", "ls", "/written"], check=False).returncode == 1
    meshnet(h1, "image", "rm", meshnet(h1, "image", "ls")[0]["id"], status=5)
    meshnet(h1, "stop", "one")
    assert meshnet(h1, "wait", "one")["exit_code"] == 8
    for name in ("one", "two"):
        meshnet(h1, "rm", "--force", name)
    meshnet(h1, "image", "rm", "bb:1")
    assert is_clean(h1), leftovers(h1)


def test_limits_are_the_kernels(make_lab: MakeLab, rootfs: Path) -> None:
    lab = make_lab(1)
    h1 = lab.hosts[0]
    limits = (
        *("--cpus", "0.5", "--cpu-shares", "512", "--memory", "32m", "--pids-limit", "20"),
        *("--cpuset-cpus", "0", "--memory-reservation", "16m"),
    )
    made = detached(h1, rootfs, "--name", "held", *limits, "--", "sleep", "1000")
    expected = {
        ("cpu", "cpu.cfs_quota_us"): "50000",
        ("cpu", "cpu.shares"): "512",
        ("memory", "memory.limit_in_bytes"): str(32 << 20),
        ("memory", "memory.soft_limit_in_bytes"): str(16 << 20),
        ("pids", "pids.max"): "20",
        ("cpuset", "cpuset.cpus"): "0",
    }
    found = {key: cgroup_file(made["pid"], *key) for key in expected}
    assert found == expected
    stats = meshnet(h1, "stats", "held")
    assert stats["memory_limit_bytes"] == 32 << 20
    assert stats["pids"] == 1
    # It holds what it is given in memory, until there is no more.
    hog = run(h1, rootfs, "sh", "-c", "tail /dev/zero", options=("--memory", "16m"))
    assert hog.returncode == 137
    meshnet(h1, "rm", "--force", "held")
    assert is_clean(h1), leftovers(h1)


def test_networks_life_and_a_killed_agent(make_lab: MakeLab, rootfs: Path) -> None:
    lab = make_lab(2)
    h1, h2 = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    far = h2.spawn_container()
    address = attach(far, h2, "prod")["address"].split("/")[0]
    # The first instruction finds the network up.
    assert run(h1, rootfs, "ping", "-c1", "-W5", address, options=("--net", "prod")).returncode == 0
    script = "echo out; echo err >&2; trap 'exit 7' TERM; while :; do sleep 0.05; done"
    web = detached(h1, rootfs, "--name", "web", "--net", "prod", "--", "sh", "-c", script)
    mine = web["endpoints"][0]["address"].split("/")[0]
    assert ping(far, mine)
    assert web["networks"] == ["prod"]
    # A server behind a published port, its files those of the tree.
    served_by = ("--name", "files", "--net", "prod", "-p", "8080:80")
    detached(h1, rootfs, *served_by, "--", "httpd", "-f", "-p", "80", "-h", "/etc")
    url = f"http://{h1.underlay_ip}:8080/passwd"
    fetch = f"import urllib.request as r; print(r.urlopen({url!r}, timeout=5).read().decode())"

    def served() -> bool:
        return "web:x:70" in h2.run([sys.executable, "-c", fetch], check=False).stdout

    wait_until(served, 10, "the published port answers")
    meshnet(h1, "rm", "-f", "files")
    error = run(h1, rootfs, "true", options=("--name", "web"))
    assert error.returncode == 5, error
    inner = shell(h1, rootfs, "ip -o -4 addr show eth0; cat /etc/hosts", "--net", "container:web")
    assert inner.count(mine) == 2
    logs = h1.run([*CLIENT, "logs", "web"])
    assert (logs.stdout, logs.stderr) == ("out\n", "err\n")
    done = h1.run([*CLIENT, "exec", "-i", "-e", "A=b", "web", "sh", "-c", "cat; echo $A; exit 4"],
                  check=False, input_text="in\n")  # fmt: skip
    assert (done.returncode, done.stdout) == (4, "in\nb\n"), done
    assert h1.run([*CLIENT, "exec", "web", "nothing"], check=False).returncode == 127
    meshnet(h1, "stop", "web")
    assert [(d["name"], d["state"], d["exit_code"]) for d in meshnet(h1, "ps", "--all")] == [
        ("web", "exited", 7)
    ]
    assert "does not run" in meshnet(h1, "stats", "web", status=5)
    assert "does not exist" in meshnet(h1, "rm", "nobody", status=4)
    meshnet(h1, "rm", "web")
    assert is_clean(h1), leftovers(h1)

    # Many at once; the agent is killed, five end meanwhile, and all is as it should be after.
    children = []
    for number in range(10):
        options = ["--detach", "--name", f"c{number}", "--net", "prod"]
        options += ["--rm"] if number == 4 else []
        options += ["--restart", "on-failure"] if number == 3 else []
        argv = [*CLIENT, "run", *options, "--rootfs", str(rootfs), "sh", "-c",
                "trap 'exit 9' TERM; while :; do sleep 0.05; done"]  # fmt: skip
        children.append(h1.popen(argv))
    assert [child.wait(60) for child in children] == [0] * 10
    before = {d["name"]: d for d in meshnet(h1, "ps")}
    assert len({d["endpoints"][0]["address"] for d in before.values()}) == 10
    h1.kill_agent()
    for number in range(5):
        os.kill(before[f"c{number}"]["pid"], 15)
    for number in range(5):
        pid = before[f"c{number}"]["pid"]
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10, "it ended")  # noqa: B023
    assert ping(far, before["c7"]["endpoints"][0]["address"].split("/")[0])
    h1.start_agent()

    def settled() -> bool:
        states = {d["name"]: (d["state"], d["exit_code"]) for d in meshnet(h1, "ps", "--all")}
        return states == {
            **{f"c{n}": ("exited", 9) for n in (0, 1, 2)},
            "c3": ("running", None),
            **{f"c{n}": ("running", None) for n in range(5, 10)},
        }

    wait_until(settled, 20, "what ended is known, c3 runs again, c4 is gone")
    after = {d["name"]: d for d in meshnet(h1, "ps")}
    assert all(after[f"c{n}"] == before[f"c{n}"] for n in range(5, 10))
    assert after["c3"]["restarts"] == 1
    assert ping(far, after["c3"]["endpoints"][0]["address"].split("/")[0])
    assert len(meshnet(h1, "endpoint", "ls")) == 7
    removals = [h1.popen([*CLIENT, "rm", "-f", d["name"]]) for d in meshnet(h1, "ps", "--all")]
    assert [child.wait(60) for child in removals] == [0] * 9
    assert is_clean(h1), leftovers(h1)
    assert len(re.findall("mne", h1.run(["ip", "link"]).stdout)) == 0
