"""Published ports: who reaches them, what is refused, and what they outlive."""

from __future__ import annotations

import functools
import json
import os
import socket
from typing import TYPE_CHECKING

import pytest

from meshnet.cli.client import Client
from meshnet.lab.poll import wait_until
from tests.netns.mesh import (
    Document,
    address_of,
    attach,
    create_network,
    lossless,
    meshnet,
    ping,
    wait_in_sync,
)
from tests.netns.talk import ask, connected, is_closed, none_lost, open_socket, serving

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.commands import Namespace
    from meshnet.lab.host import LabContainer, LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
LOCAL = ("--subnet", "172.30.0.0/24", "--subnet", "fd00:30::/64", "--mode", "bridge")
OTHER = ("--subnet", "172.31.0.0/24", "--subnet", "fd00:31::/64", "--mode", "bridge")
OVERLAY = ("--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48")


def endpoints(host: LabHost) -> dict[str, Document]:
    """The endpoints by name, without the cost of a command."""
    documents = Client(str(host.socket_path)).get("endpoints")["endpoints"]
    return {document["name"]: document for document in documents}


@pytest.mark.parametrize("family", [4, 6])
def test_who_reaches_it(make_lab: MakeLab, family: int) -> None:
    """From outside, from the host, and from containers: its own, its network's and others'."""
    lab = make_lab(2, underlay_family=family)
    h1, h2 = lab.hosts
    outside = lab.add_host("outside", agent=False)
    for name, options in (("local", LOCAL), ("other", OTHER), ("prod", OVERLAY)):
        meshnet(h1, "network", "create", name, *options)
    wait_in_sync(h1)
    web, beside, apart, over = (h1.spawn_container() for _ in range(4))
    at_host = str(h1.underlay_ip)
    bound = f"[{at_host}]" if family == 6 else at_host
    document = attach(
        *(web, h1, "local", "--name", "web", "--publish", "8080:80", "--publish", "8080:80/udp"),
        *("--publish", f"{bound}:8081:80"),
        *("--publish", "127.0.0.1:8082:80"),
    )
    assert document["published"][:2] == ["8080:80/tcp", "8080:80/udp"]
    assert document["published"][2] == f"{bound}:8081:80/tcp"
    attach(beside, h1, "local")
    attach(apart, h1, "other")
    attach(over, h1, "prod", "--name", "over", "--publish", "9090:80", "--publish", "9090:80/udp")
    inspected = meshnet(h1, "network", "inspect", "prod")["endpoints"]
    assert inspected[0]["published"] == ["9090:80/tcp", "9090:80/udp"]
    everyone: tuple[Namespace, ...] = (outside, h1, web, beside, apart, over)
    with serving((web, "web"), (over, "over")):
        for asker in everyone:
            for protocol in ("tcp", "udp"):
                assert ask(asker, at_host, 8080, protocol).name == "web"
                assert ask(asker, at_host, 9090, protocol).name == "over"
            assert ask(asker, at_host, 8081).name == "web"
        for protocol in ("tcp", "udp"):
            # The server sees the real address of clients from outside.
            assert ask(outside, at_host, 8080, protocol).seen == str(outside.underlay_ip)
            assert ask(h2, at_host, 9090, protocol).seen == str(h2.underlay_ip)
            assert ask(h1, "127.0.0.1", 8080, protocol).name == "web"
            assert ask(h1, "127.0.0.1", 9090, protocol).name == "over"
            # A client of "localhost" tries ::1 first, and must not have to wait for a timeout.
            assert is_closed(h1, "::1", 8080, protocol)
        # At one address only, it is at no other.
        assert ask(h1, "127.0.0.1", 8082).name == "web"
        assert is_closed(h1, "127.0.0.1", 8081)
        assert is_closed(outside, at_host, 8082)
        assert is_closed(h1, at_host, 8082)
        _check_hairpin_with_and_without_bridge_hooks(h1, web, at_host)
        # Nothing else of the endpoint is open, and nothing is published elsewhere.
        assert is_closed(outside, at_host, 80)
        assert is_closed(outside, str(h2.underlay_ip), 9090)
        assert is_closed(h1, "127.0.0.1", 8083)


def _check_hairpin_with_and_without_bridge_hooks(
    host: LabHost, web: LabContainer, address: str
) -> None:
    """A container reaches its own published port either way (linux/br_netfilter)."""
    for value in (0, 1):
        settings = "for f in /proc/sys/net/bridge/bridge-nf-call-ip*tables; do"
        host.run(["sh", "-c", f"{settings} test ! -e $f || echo {value} >$f; done"])
        assert ask(web, address, 8080).name == "web"
        assert ask(web, address, 9090).name == "over"


def test_hot_changes_and_taken_ports(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    (host,) = lab.hosts
    outside = lab.add_host("outside", agent=False)
    address = str(host.underlay_ip)
    meshnet(host, "network", "create", "local", *LOCAL)
    meshnet(host, "network", "create", "closed", "--subnet", "10.77.0.0/24", "--mode", "bridge",
            "--internal")  # fmt: skip
    web, other = host.spawn_container(), host.spawn_container()
    attach(web, host, "local", "--name", "web", "--publish", "8080:80")
    endpoint = functools.partial(meshnet, host, "endpoint")

    def refused(status: int, words: str, *arguments: object) -> None:
        before, free = endpoints(host), _is_free(host, 7000)
        assert words in meshnet(host, *arguments, status=status)
        assert (endpoints(host), _is_free(host, 7000)) == (before, free)

    with (
        serving((web, "web"), (other, "other")),
        connected(outside, address, 8080) as steady,
        none_lost(steady.ask),
    ):
        assert is_closed(outside, address, 8081)
        document = endpoint("publish", "web", "8081:80", "8081-8082:80-81/udp")
        wanted = ["8080:80/tcp", "8081:80/tcp", "8081:80/udp", "8082:81/udp"]
        assert document["published"] == endpoints(host)["web"]["published"] == wanted
        for protocol in ("tcp", "udp"):
            assert ask(outside, address, 8081, protocol).name == "web"
            assert ask(host, "127.0.0.1", 8081, protocol).name == "web"
        assert endpoint("unpublish", "web", "8081", "8082:81/udp")["published"] == [
            "8080:80/tcp", "8081:80/udp",
        ]  # fmt: skip
        assert is_closed(outside, address, 8081)
        assert is_closed(host, "127.0.0.1", 8081)
        assert ask(outside, address, 8081, "udp").name == "web"
        # The connection goes on without its publication, and no new one comes about.
        assert endpoint("unpublish", document["id"], "8080:80")["published"] == ["8081:80/udp"]
        assert is_closed(outside, address, 8080)
        assert "web" in _complete(host, "meshnet endpoint publish ")
        assert "8081:80/udp" in _complete(host, "meshnet endpoint unpublish web ")
        chosen = endpoint("publish", "web", "80")["published"][-1]
        assert ask(outside, address, int(chosen.partition(":")[0])).name == "web"

        owner = "is published for endpoint web of network local already"
        second = ("attach", other.pid, "--net", "local")
        refused(5, f"port 8081/udp {owner}", *second, "--publish", "8081:80/udp")
        refused(5, owner, *second, "--publish", "127.0.0.1:8081:80/udp")
        refused(5, owner, *second, "--publish", "7000:7000", "--publish", "8081:80/udp")
        refused(5, owner, "endpoint", "publish", "web", "8081:81/udp")
        refused(9, "network closed is internal", "attach", other.pid, "--net", "closed",
                "--publish", "7000:80")  # fmt: skip
        refused(2, "such as 8080:80", *second, "--publish", "8080:http")
        refused(2, "such as 8080:80", "endpoint", "publish", "web", "8080:80/sctp")
        refused(4, "192.0.2.7 is on no link", *second, "--publish", "192.0.2.7:7000:80")
        refused(4, "endpoint nobody does not exist", "endpoint", "publish", "nobody", "1:1")
        refused(4, "has no published port 8080: it has 8081:80/udp", "endpoint", "unpublish",
                "web", "8080")  # fmt: skip
        listener = host.popen(["python3", "-m", "http.server", "7000"])
        wait_until(lambda: host.run(["ss", "-Hltn", "sport", "=", ":7000"]).stdout, 10, "it serves")
        refused(5, f"port 7000/tcp of this host is taken by process python3 (pid {listener.pid})",
                *second, "--publish", "7000:80")  # fmt: skip
        listener.terminate()
        listener.wait(timeout=10)
        # A process that comes later is told that the port is taken.
        attach(other, host, "local", "--name", "other", "--publish", "7000:80")
        # A UDP client that never pauses follows the port to its next owner.
        with connected(outside, address, 8081, "udp") as client:
            assert client.ask().name == "web"
            endpoint("unpublish", "web", "8081/udp")
            with pytest.raises(OSError, match=r"refused|timed out"):
                client.ask(0.3)
            endpoint("publish", "other", "8081:80/udp")
            assert client.ask().name == "other"
        late = host.run(["python3", "-m", "http.server", "7000"], check=False)
        assert "Address already in use" in late.stderr
        assert ask(outside, address, 7000).name == "other"
        meshnet(host, "detach", other.pid, "--net", "local")
        assert is_closed(outside, address, 7000)
        assert _is_free(host, 7000)
    attach(other, host, "local", "--publish", "7000:80")
    other.end()
    wait_until(lambda: endpoints(host).keys() == {"web"}, 5, "its endpoint is gone")
    wait_until(lambda: _is_free(host, 7000), 5, "the port is free")


def _complete(host: LabHost, line: str) -> list[str]:
    """What bash offers at the end of a line."""
    script = (
        f'source /dev/stdin; COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; '
        "_python_argcomplete meshnet; echo ${COMPREPLY[@]}"
    )
    code = host.run(["meshnet", "completion", "bash"]).stdout
    return host.run(["bash", "-c", script], input_text=code).stdout.split()


def _is_free(host: LabHost, port: int) -> bool:
    """Tell whether a process of the host can bind a port."""
    with open_socket(host, socket.SOCK_STREAM, 4) as made:
        try:
            made.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def test_publications_outlive_the_agent(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    (host,) = lab.hosts
    outside = lab.add_host("outside", agent=False)
    address = str(host.underlay_ip)
    meshnet(host, "network", "create", "local", *LOCAL)
    web = host.spawn_container()
    attach(web, host, "local", "--name", "web", "--publish", "8080:80", "--publish", "8080:80/udp")
    new = [functools.partial(ask, outside, address, 8080, p) for p in ("tcp", "udp")]
    with (
        serving((web, "web")),
        connected(outside, address, 8080) as steady,
        none_lost(steady.ask, *new),
    ):
        before = host.run(["nft", "list", "table", "inet", "meshnet"]).stdout
        for end in (host.kill_agent, host.stop_agent):
            end()
            host.start_agent()
            assert wait_in_sync(host)["kernel"]["writes"] == 0
            assert endpoints(host)["web"]["published"] == ["8080:80/tcp", "8080:80/udp"]
            assert host.run(["nft", "list", "table", "inet", "meshnet"]).stdout == before
        late = host.run(["python3", "-m", "http.server", "8080"], check=False)
        assert "Address already in use" in late.stderr
        # A process binds the port while no agent runs: the endpoint gets the packets all the same.
        host.kill_agent()
        thief = host.popen(["python3", "-m", "http.server", "8080"])
        wait_until(lambda: host.run(["ss", "-Hltn", "sport", "=", ":8080"]).stdout, 10, "it serves")
        host.start_agent()
        (note,) = meshnet(host, "status")["notes"]
        assert "port 8080/tcp is published for endpoint web of network local" in note
        assert f"taken by process python3 (pid {thief.pid})" in note
        thief.terminate()
        thief.wait(timeout=10)
        wait_until(lambda: not meshnet(host, "status")["notes"], 5, "the note is gone")
        assert wait_in_sync(host)["networks"][0]["errors"] == []
    # The next agent continues from the last change before a crash.
    meshnet(host, "endpoint", "unpublish", "web", "8080")
    host.kill_agent()
    record = next((host.state_dir / "endpoints").glob("*.json"))
    document = json.loads(record.read_text())
    del document["crc32"]
    document["published"].append({"protocol": "tcp", "host_port": 8088, "port": 80})
    record.write_text(json.dumps(document))
    host.start_agent()
    with serving((web, "web")):
        assert ask(outside, address, 8088).name == "web"
        assert is_closed(outside, address, 8080)
        # Somebody deletes the endpoint's link and the table: both come back, with the ports.
        host.run(["ip", "link", "del", f"mne{document['id']}"])
        host.run(["nft", "delete", "table", "inet", "meshnet"])
        wait_until(lambda: not is_closed(outside, address, 8088), 10, "it is healed")


def test_several_networks(make_lab: MakeLab) -> None:
    """One namespace on two networks, while packets flow: each comes, goes and publishes alone."""
    lab = make_lab(2)
    h1, h2 = lab.hosts
    create_network(lab, "prod", *OVERLAY)
    outside = lab.add_host("outside", agent=False)
    meshnet(h1, "network", "create", "local", *LOCAL)
    address = str(h1.underlay_ip)
    both, far = h1.spawn_container(), h2.spawn_container()
    first = attach(both, h1, "prod", "--name", "first")
    peer = attach(far, h2, "prod")
    default = both.run(["ip", "route", "show", "default"]).stdout
    assert first["default_route"]
    with serving((both, "both")), lossless(both, address_of(peer)):
        options = ("--ifname", "eth1", "--name", "second", "--publish", "8080:80")
        second = attach(both, h1, "local", *options)
        assert not second["default_route"]
        assert both.run(["ip", "route", "show", "default"]).stdout == default
        # By the endpoint without the default route as by the one with it.
        meshnet(h1, "endpoint", "publish", "first", "9090:80", "9090:80/udp")
        meshnet(h1, "endpoint", "publish", "second", "8080:80/udp")
        for asker in (outside, h1, h2):
            for port in (8080, 9090):
                for protocol in ("tcp", "udp"):
                    assert ask(asker, address, port, protocol).name == "both"
        meshnet(h1, "detach", both.pid, "--net", "local")
        assert "eth1" not in both.run(["ip", "link"]).stdout
        assert is_closed(outside, address, 8080)
        assert ask(outside, address, 9090).name == "both"
        again = attach(both, h1, "local", *options)
        assert ask(outside, address, 8080).name == "both"
    # And the other way round: the first goes, the second stays.
    meshnet(h1, "detach", both.pid, "--net", "prod")
    with serving((both, "both")):
        assert ask(outside, address, 8080).name == "both"
        assert is_closed(outside, address, 9090)
    assert ping(both, again["gateway"])


def test_two_processes_in_one_namespace(make_lab: MakeLab) -> None:
    """One attaches, both are on the network; the endpoint ends with the last of them."""
    lab = make_lab(1)
    (host,) = lab.hosts
    outside = lab.add_host("outside", agent=False)
    address = str(host.underlay_ip)
    meshnet(host, "network", "create", "local", *LOCAL)
    first = host.spawn_container()
    second = first.popen(["sleep", "infinity"])
    wait_until(lambda: _netns(second.pid) == _netns(first.pid), 5, "it is in the namespace")
    attach(first, host, "local", "--name", "web", "--publish", "8080:80")
    refused = meshnet(host, "attach", second.pid, "--net", "local", status=5)
    assert "already attached to network local, as endpoint web" in refused
    listener = first.popen(["python3", "-m", "http.server", "80"])
    served = ["ss", "-Hltn", "sport", "=", ":80"]
    wait_until(lambda: first.run(served).stdout, 10, "it serves")
    os.kill(first.pid, 9)
    remaining = {second.pid, listener.pid}
    wait_until(
        lambda: endpoints(host)["web"]["pid"] in remaining, 5, "another process has the endpoint"
    )
    with connected(outside, address, 8080):
        pass
    second.kill()
    second.wait(timeout=5)
    wait_until(lambda: endpoints(host)["web"]["pid"] == listener.pid, 5, "the last one has it")
    with connected(outside, address, 8080):
        pass
    listener.kill()
    listener.wait(timeout=5)
    wait_until(lambda: not endpoints(host), 5, "the endpoint is gone")
    assert is_closed(outside, address, 8080)


def _netns(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/net").st_ino
