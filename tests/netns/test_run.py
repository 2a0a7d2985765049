"""Containers: what their processes see, how they end, and that they leave nothing."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.images import Layout, config_of
from tests.netns.containers import (
    CLIENT,
    busybox_layer,
    detached,
    is_clean,
    leftovers,
    run,
    shell,
)
from tests.netns.mesh import attach, create_network, meshnet, ping

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
NAMESPACES = ("pid", "mnt", "uts", "ipc", "net", "cgroup")


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


def test_two_containers_of_one_image(make_lab: MakeLab, rootfs: Path, tmp_path: Path) -> None:
    lab = make_lab(1)
    h1 = lab.hosts[0]
    layer = busybox_layer(rootfs)
    config = config_of(
        (layer,),
        Entrypoint=["/bin/sh", "-c"],
        Cmd=["echo $WHO in $(pwd)"],
        Env=["WHO=image"],
        WorkingDir="/work",
        User="70:71",
        StopSignal="SIGUSR1",
    )
    archive = tmp_path / "image.tar"
    archive.write_bytes(Layout().add("bb:1", layer, config=config).tar())
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


def test_networks_and_life(make_lab: MakeLab, rootfs: Path) -> None:
    lab = make_lab(2)
    h1, h2 = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    far = h2.spawn_container()
    address = attach(far, h2, "prod")["address"].split("/")[0]
    # The first instruction finds the network up.
    assert run(h1, rootfs, "ping", "-c1", "-W5", address, options=("--net", "prod")).returncode == 0
    script = "echo out; echo err >&2; trap 'exit 7' TERM; while :; do sleep 0.05; done"
    web = detached(
        h1, rootfs, "--name", "web", "--net", "prod", "--memory", "32m", "--", "sh", "-c", script
    )
    mine = web["endpoints"][0]["address"].split("/")[0]
    assert ping(far, mine)
    assert web["networks"] == ["prod"]
    stats = meshnet(h1, "stats", "web")
    assert stats["memory_limit_bytes"] == 32 << 20
    assert stats["pids"] >= 1
    assert stats["rx_bytes"] > 0
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
    # What it has now is shown, not what it was made with.
    meshnet(h1, "detach", web["pid"], "--net", "prod")
    (shown,) = meshnet(h1, "ps")
    assert (shown["networks"], shown["endpoints"]) == ([], [])
    again = meshnet(h1, "attach", web["pid"], "--net", "prod", "--name", "again")
    (shown,) = meshnet(h1, "ps")
    assert shown["networks"] == ["prod"]
    assert [e["address"] for e in shown["endpoints"]] == [again["address"]]
    assert "timeout -1 is out of range" in meshnet(h1, "stop", "-t", "-1", "web", status=2)
    meshnet(h1, "stop", "web")
    assert [(d["name"], d["state"], d["exit_code"]) for d in meshnet(h1, "ps", "--all")] == [
        ("web", "exited", 7)
    ]
    assert "does not run" in meshnet(h1, "stats", "web", status=5)
    assert "does not exist" in meshnet(h1, "rm", "nobody", status=4)
    meshnet(h1, "rm", "web")
    assert is_clean(h1), leftovers(h1)
