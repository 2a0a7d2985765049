"""Options of ``meshnet run``, read back from the kernel's own files; and second runs."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.containers import (
    CLIENT,
    detached,
    is_clean,
    leftovers,
    run,
    shell,
)
from tests.netns.mesh import create_network, meshnet

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
MEMORY = 32 << 20


def call(host: LabHost, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """One command of the client."""
    return host.run([*CLIENT, *words], check=False, input_text=stdin)


def swap_limits(pid: int) -> tuple[str, str]:
    """What the kernel has for memory, and for memory and swap (v1) or swap alone (v2)."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for directory, names in (
            ("memory", ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")),
            ("", ("memory.max", "memory.swap.max")),
        ):
            found = [Path("/sys/fs/cgroup", directory, path.lstrip("/"), name) for name in names]
            if controllers == directory and all(p.exists() for p in found):
                return found[0].read_text().strip(), found[1].read_text().strip()
    raise AssertionError("the kernel does not account swap here")


def test_options_are_what_the_kernel_has(
    make_lab: MakeLab,
    rootfs: Path,
    tmp_path: Path,
) -> None:
    h1 = make_lab(1).hosts[0]
    (tmp_path / "env").write_text("# a comment\nA=1\nB=two words\n\nC=file\n")
    script = """
        grep -E 'Max (open files|processes|core)' /proc/self/limits
        cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax /proc/sys/fs/mqueue/msg_max
        grep ' /dev/shm ' /proc/mounts; id -G; cat /etc/hosts /etc/resolv.conf; env
        ls -l /dev/ours; true < /dev/ours && echo opened; true > /dev/ours || echo refused
    """
    options = (
        "--ulimit", "nofile=100:200", "--ulimit", "nproc=1000", "--ulimit", "core=0:0",
        "--sysctl", "net.ipv4.ip_forward=1", "--sysctl", "kernel.msgmax=4096",
        "--sysctl", "fs.mqueue.msg_max=11", "--shm-size", "1m", "--group-add", "log",
        "--group-add", "4242", "--add-host", "db:10.9.8.7", "--add-host", "six:fd00::7",
        "--dns", "10.1.1.1", "--env-file", str(tmp_path / "env"), "-e", "C=line",
        "--device", "/dev/loop-control:/dev/ours:r",
    )  # fmt: skip
    shown = shell(h1, rootfs, script, *options)
    assert re.search(r"Max open files +100 +200 ", shown)
    assert re.search(r"Max processes +1000 +1000 ", shown)
    assert re.search(r"Max core file size +0 +0 ", shown)
    assert "\n1\n4096\n11\n" in shown
    assert re.search(r"tmpfs /dev/shm tmpfs .*size=1024k", shown)
    assert "\n0 72 4242\n" in shown
    assert "10.9.8.7\tdb\nfd00::7\tsix\n" in shown
    assert re.findall("nameserver (.*)", shown) == ["10.1.1.1"]
    assert {"A=1", "B=two words", "C=line"} <= set(shown.splitlines())
    # Of the device only what was asked for, by its cgroup: root may write any node.
    assert re.search(r"^crw.* 10, +237 .*/dev/ours\nopened\nrefused$", shown, re.MULTILINE)
    _check_refusals(h1, rootfs)
    _check_swap(h1, rootfs)
    assert is_clean(h1), leftovers(h1)


def _check_refusals(h1: LabHost, rootfs: Path) -> None:
    effective = Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0]
    may_raise = int(effective, 16) >> 24 & 1  # CAP_SYS_RESOURCE
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for options, status, words in (
        (("--ulimit", "nofile=2:1"), 2, "nofile=2:1.*above the hard"),
        (("--device", "/dev/none"), 4, "/dev/none does not exist"),
        (("--sysctl", "kernel.panic=1"), 2, "kernel.panic=1"),
        (("--net", "host", "--sysctl", "net.ipv4.ip_forward=1"), 2, "--net shares"),
        (("--memory-swap", "1g"), 2, "give --memory too"),
        (("--group-add", "nobody-knows"), 2, "nobody-knows"),
        (("--log-opt", "max-file=3"), 2, "max-size"),
        (("--env-file", "/none"), 2, "/none"),
    ):
        done = run(h1, rootfs, "true", options=options)
        assert (done.returncode, bool(re.search(words, done.stderr))) == (status, True), done
        assert done.stderr.count("\n") == 1, done
    done = run(h1, rootfs, "true", options=("--ulimit", f"nofile={hard + 1}"))
    assert done.returncode == (0 if may_raise else 7), done
    assert may_raise or f"give {hard} or less" in done.stderr, done
    assert is_clean(h1), leftovers(h1)


def _check_swap(h1: LabHost, rootfs: Path) -> None:
    is_v1 = Path("/sys/fs/cgroup/memory").exists()
    for options, swap in (
        ((), MEMORY),
        (("--memory-swap", str(MEMORY)), 0),
        (("--memory-swap", str(3 * MEMORY)), 2 * MEMORY),
        (("--memory-swap", "-1"), None),
    ):
        name = f"m{swap}"
        one = detached(
            h1, rootfs, "--name", name, "--memory", str(MEMORY), *options, "--", "sleep", "900"
        )
        memory, found = swap_limits(one["pid"])
        assert memory == str(MEMORY)
        if swap is None:
            assert found == "max" or int(found) > 1 << 60
        else:
            assert found == str(swap + (MEMORY if is_v1 else 0)), options
        assert call(h1, "rm", "-f", name).returncode == 0
    assert is_clean(h1), leftovers(h1)


def test_start_and_restart_run_it_again(make_lab: MakeLab, rootfs: Path) -> None:
    lab = make_lab(1)
    h1 = lab.hosts[0]
    create_network(lab, "prod", "--subnet", "10.42.0.0/16", "--mode", "bridge")
    script = (
        "touch /seen; ls /seen*; ip -o addr show eth0 | grep -c inet; read a; echo got $a; exit 3"
    )
    options = ("--name", "again", "--net", "prod", "--label", "tier=web", "-l", "x")
    argv = ("run", "-i", *options, "--rootfs", str(rootfs), "sh", "-c", script)
    first = call(h1, *argv, stdin="one\n")
    assert (first.returncode, first.stdout.split("\n")[-2]) == (3, "got one"), first
    again = call(h1, "start", "-a", "-i", "again", stdin="two\n")
    assert (again.returncode, again.stdout.split("\n")[-2]) == (3, "got two"), again
    (document,) = meshnet(h1, "ps", "--all")
    assert document["labels"] == {"tier": "web", "x": ""}
    assert document["state"] == "exited"
    # The same writable layer: the second run sees the file that the first one made.
    script = "cat /runs; echo run >> /runs; trap 'exit 0' TERM; while :; do sleep 0.05; done"
    other = detached(h1, rootfs, "--name", "layer", "--net", "prod", "--", "sh", "-c", script)
    assert call(h1, "start", "layer").returncode == 5
    assert call(h1, "restart", "-t", "20", "layer").returncode == 0
    after = meshnet(h1, "inspect", "layer")
    assert after["state"] == "running"
    assert after["pid"] != other["pid"]
    assert len(after["endpoints"]) == 1
    wait_until(lambda: "run\n" in call(h1, "logs", "layer").stdout, 10, "it sees the first one's")
    assert call(h1, "stop", "-t", "20", "layer").returncode == 0
    assert call(h1, "start", "layer").returncode == 0
    wait_until(lambda: call(h1, "logs", "layer").stdout.count("run\n") == 3, 10, "and the second's")
    assert call(h1, "start", "nobody").returncode == 4
    for name in ("again", "layer"):
        assert call(h1, "rm", "-f", name).returncode == 0
    assert is_clean(h1), leftovers(h1)


def test_logs_across_a_new_file(make_lab: MakeLab, rootfs: Path) -> None:
    h1 = make_lab(1).hosts[0]
    # Waits for stdin between steps: the follower is known to have read before the log is renewed.
    script = "echo begun; read a; i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done"
    script += "; read b"
    options = ("run", "-i", "--name", "chatty", "--log-max-size", "64k", "--rootfs", str(rootfs))
    argv = [*CLIENT, *options, "sh", "-c", script]
    child = h1.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: "begun" in call(h1, "logs", "chatty").stdout, 10, "it runs")
        follower = h1.popen([*CLIENT, "logs", "-f", "chatty"], stdout=subprocess.PIPE)
        assert follower.stdout is not None
        assert follower.stdout.readline() == "begun\n"
        assert child.stdin is not None
        os.write(child.stdin.fileno(), b"go\n")
        wait_until(lambda: "line 2999" in call(h1, "logs", "chatty").stdout, 20, "all is printed")
        log = Path(meshnet(h1, "inspect", "chatty")["log"])
        assert log.stat().st_size <= 64 << 10
        shown = call(h1, "logs", "chatty").stdout.splitlines()
        assert shown[0] != "begun"
        assert shown == [f"line {n}" for n in range(3000 - len(shown), 3000)]
        assert call(h1, "logs", "--tail", "3", "chatty").stdout.splitlines() == shown[-3:]
        assert call(h1, "logs", "--tail", "0", "chatty").stdout == ""
        stamped = call(h1, "logs", "-t", "--tail", "2", "chatty").stdout.splitlines()
        when, text = stamped[0].split(" ", 1)
        assert text == "line 2998"
        assert call(h1, "logs", "--since", when, "--tail", "1", "chatty").stdout == "line 2999\n"
        assert call(h1, "logs", "--since", "1h", "chatty").stdout.splitlines() == shown
        assert call(h1, "logs", "--since", "2999-01-01", "chatty").stdout == ""
        os.write(child.stdin.fileno(), b"end\n")
        followed = follower.stdout.read()
        lines = str(followed).splitlines()
        assert follower.wait(20) == 0
        assert child.wait(20) == 0
        # It saw the last file whole, whatever it missed of those that came and went in between.
        assert lines[-len(shown) :] == shown
    finally:
        for process in (child,):
            process.kill()
            process.wait()
    assert call(h1, "rm", "-f", "chatty").returncode == 0
    assert is_clean(h1), leftovers(h1)


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


def test_an_exec_that_waits_when_the_agent_dies_never_runs(
    make_lab: MakeLab,
    rootfs: Path,
) -> None:
    h1 = make_lab(1).hosts[0]
    detached(h1, rootfs, "--name", "box", "--", "sleep", "900")
    connection = _Unix(h1.run_dir / "agent.sock")
    body = json.dumps({"command": ["touch", "/ran"]})
    connection.request(
        "POST", "/v1/containers/box/exec", body, {"Content-Type": "application/json"}
    )
    made: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    directory = Path(made["attach"]).parent
    conmon = int((directory / "conmon.pid").read_text())
    h1.kill_agent()
    assert Path(f"/proc/{conmon}").exists()
    h1.start_agent()
    wait_until(lambda: not Path(f"/proc/{conmon}").exists(), 10, "its conmon is gone")
    assert not directory.exists()
    assert call(h1, "exec", "box", "ls", "/ran").returncode == 1
    assert call(h1, "rm", "-f", "box").returncode == 0
    wait_until(lambda: is_clean(h1), 10, "nothing is left")
