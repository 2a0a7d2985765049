"""Holds: namespaces attached by their path for an owner, without a process in them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.mesh import Document, address_of, create_network, meshnet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root


@contextlib.contextmanager
def bound(name: str) -> Iterator[str]:
    """An empty namespace, as a container engine makes it before any process; its path."""
    name = f"mnt{os.getpid()}-{name}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield f"/run/netns/{name}"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def hold(host: LabHost, path: str, owner: str, *options: object) -> Document:
    """Attach the namespace at a path for an owner."""
    document: Document = meshnet(
        host, "attach", "--netns", path, "--net", "prod", "--owner", owner, *options
    )
    return document


def names(host: LabHost) -> list[str]:
    """Names of a host's own endpoints."""
    return [e["name"] for e in meshnet(host, "endpoint", "ls") if e["host"] == host.name]


def pings(path: str, address: str) -> bool:
    """Whether a namespace reaches an address."""
    command = ["nsenter", f"--net={path}", "ping", "-c1", "-W2", "-q", address]
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_a_namespace_without_a_process_is_on_the_network(make_lab: MakeLab) -> None:
    """It lives over a restart of the agent, and goes with its owner's release, once and twice."""
    lab = make_lab(2)
    h1, h2 = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48")
    with bound("a") as here, bound("b") as there:
        one = meshnet(
            h1, "attach", "--netns", here, "--net", "prod", "--owner", "x/a", "--name", "a"
        )
        other = meshnet(h2, "attach", "--netns", there, "--net", "prod", "--owner", "x/b")
        assert (one["pid"], one["owner"], one["netns"]) == (None, "x/a", here)
        for version in (4, 6):
            assert pings(here, address_of(other, version))
        h1.stop_agent()
        h1.start_agent()
        h1.wait_agent_ready()
        (kept,) = [e for e in meshnet(h2, "endpoint", "ls") if e["host"] == "h1"]
        assert (kept["owner"], kept["address"]) == ("x/a", one["address"])
        assert pings(here, address_of(other))
        assert [e["name"] for e in meshnet(h1, "detach", "--owner", "x/a")] == ["a"]
        assert meshnet(h1, "detach", "--owner", "x/a") == []
        assert not pings(here, address_of(other))
        assert meshnet(h2, "detach", "--netns", there, "--net", "prod")["owner"] == "x/b"
        meshnet(h2, "detach", "--netns", there, "--net", "prod", status=4)


def test_release_needs_no_namespace(make_lab: MakeLab) -> None:
    """A namespace that is gone frees its address by itself; with the agent away, at its start."""
    lab = make_lab(1)
    (host,) = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    with bound("a") as path:
        hold(host, path, "k")
    wait_until(lambda: names(host) == [], 10, "the endpoint of a namespace that is gone is freed")
    assert meshnet(host, "detach", "--owner", "k", "--net", "prod") == []
    with bound("b") as path:
        hold(host, path, "k")
        host.kill_agent()
    host.start_agent()
    host.wait_agent_ready()
    # The kernel removes a namespace, and with it the links, some time after its last path.
    wait_until(lambda: names(host) == [], 10, "what ended meanwhile is freed")


def test_the_same_path_is_not_the_same_namespace(make_lab: MakeLab) -> None:
    """A path that leads to another namespace now shares nothing with what was attached by it."""
    lab = make_lab(1)
    (host,) = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    with bound("a") as path:
        first = hold(host, path, "one")
        inside = subprocess.Popen(["nsenter", f"--net={path}", "sleep", "100"])
        try:
            entered = f"/proc/{inside.pid}/ns/net"
            wait_until(lambda: os.path.samefile(entered, path), 5, "the process is inside")
            subprocess.run(["ip", "netns", "del", os.path.basename(path)], check=True)
            subprocess.run(["ip", "netns", "add", os.path.basename(path)], check=True)
            second = hold(host, path, "two")
            assert first["address"] != second["address"]
            assert pings(path, address_of(first))
            # By the path the namespace is meant that is there now.
            meshnet(host, "detach", "--netns", path, "--net", "prod")
            assert [e["owner"] for e in meshnet(host, "endpoint", "ls")] == ["one"]
        finally:
            inside.kill()
            inside.wait()


def test_owners_that_are_not_valid_any_more_are_collected(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    (host,) = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    with contextlib.ExitStack() as stack:
        for owner in ("cni/1", "cni/2", "cni/3", "docker/1"):
            path = stack.enter_context(bound(owner.replace("/", "-")))
            hold(host, path, owner)
        freed = meshnet(host, "endpoint", "gc", "cni/", "cni/2")
        assert [e["owner"] for e in freed] == ["cni/1", "cni/3"]
        left = [e["owner"] for e in meshnet(host, "endpoint", "ls")]
        assert sorted(left) == ["cni/2", "docker/1"]


def test_refusals(make_lab: MakeLab, tmp_path: object) -> None:
    lab = make_lab(1)
    (host,) = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    file = f"{tmp_path}/file"
    with open(file, "w"):
        pass
    with bound("a") as path:

        def refused(status: int, words: str, *arguments: object) -> None:
            assert words in meshnet(host, "attach", *arguments, status=status)

        refused(2, "either a PID", "--net", "prod")
        refused(2, "either a PID", 1, "--netns", path, "--net", "prod")
        refused(2, "give the network", "--netns", path)
        refused(2, "give --netns", 1, "--owner", "x", "--net", "prod")
        refused(
            2, "owner key 'a b' is not usable", "--netns", path, "--owner", "a b", "--net", "prod"
        )
        refused(4, "No such file", "--netns", "/run/netns/none", "--net", "prod")
        refused(4, "is not a network namespace", "--netns", file, "--net", "prod")
        refused(9, "this host's own", "--netns", f"/run/netns/{host.netns}", "--net", "prod")
        hold(host, path, "x")
        refused(5, "already attached", "--netns", path, "--net", "prod", "--owner", "y")
        with bound("b") as other:
            refused(5, "owner x already has", "--netns", other, "--net", "prod", "--owner", "x")
