"""The agent's socket: its mode, its probes, and what it says to requests it cannot read."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.mesh import attach, create_network, meshnet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root


def request(host: LabHost, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
    """One HTTP request by hand; returns the status code and the JSON document."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(host.socket_path))
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
    top, _, rest = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(rest)


def test_socket_and_requests(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    (host,) = lab.hosts
    mode = os.stat(host.socket_path).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660
    assert request(host, "GET", "/healthz") == (200, {"status": "ok"})
    assert request(host, "GET", "/readyz") == (200, {"ready": True})
    assert request(host, "GET", "/v1/networks") == (200, [])
    for method, path, body, code, words in (
        ("GET", "/v1/nothing", b"", 404, "is not a request"),
        ("PUT", "/v1/networks", b"", 404, "is not a request"),
        ("POST", "/v1/networks", b"{", 400, "request body"),
        ("POST", "/v1/networks", b"\xff\x00", 400, "request body"),
        ("POST", "/v1/networks", b"[" * 5000, 400, "request body"),
        ("POST", "/v1/networks", b'{"name":"a","subnets":[],"x":1}', 400, "unknown field `x`"),
        ("POST", "/v1/attach", b'{"pid":"1","network":"a"}', 400, "expected `int`"),
        ("POST", "/v1/attach", b'{"pid":1,"network":"%s"}' % (b"a" * 70_000), 400, "larger than"),
        ("DELETE", "/v1/networks/nothere", b"", 404, "nothere"),
        ("DELETE", "/v1/hosts/nothere", b"", 404, "nothere"),
    ):
        status, document = request(host, method, path, body)
        assert status == code, document
        assert words in document["error"]["message"]
        assert document["error"]["exit_status"] in (2, 4)
    assert request(host, "GET", "/healthz")[0] == 200


def test_many_clients_wait_their_turn(make_lab: MakeLab) -> None:
    """Hundreds of containers may start at one instant, and all of them must reach the agent."""
    (host,) = make_lab(1).hosts
    os.kill(host.agent_pid, signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        try:
            for _ in range(500):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.settimeout(10)
                client.connect(str(host.socket_path))
        finally:
            os.kill(host.agent_pid, signal.SIGCONT)
    assert request(host, "GET", "/healthz") == (200, {"status": "ok"})


def test_signal_while_etcd_does_not_answer(make_lab: MakeLab) -> None:
    lab = make_lab(1, start_agents=False)
    (host,) = lab.hosts
    lab.etcd.pause()
    host.start_agent(wait=False)
    wait_until(host.socket_path.exists, 10, "the socket")
    assert request(host, "GET", "/readyz")[0] == 503
    assert "still starting" in meshnet(host, "status", status=8)
    assert host.stop_agent() == 0
    lab.etcd.resume()


def test_systemd_is_told(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(1, start_agents=False)
    (host,) = lab.hosts
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(10)
        manager.bind(str(tmp_path / "notify"))
        command = ["python", "-m", "meshnet_agent", "--etcd", lab.etcd_url, "--host-id", "h1"]
        command += ["--underlay-ip", str(host.underlay_ip)]
        command += ["--run-dir", str(tmp_path / "run"), "--state-dir", str(tmp_path / "state")]
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        agent = host.popen(command, stdout=subprocess.DEVNULL, env=environment)
        assert manager.recv(100) == b"READY=1"
        agent.terminate()
        assert manager.recv(100) == b"STOPPING=1"
        assert agent.wait(timeout=10) == 0


def test_corrupt_endpoint_record_is_set_aside(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    (host,) = lab.hosts
    container = host.spawn_container()
    kept = attach(container, host, "prod")
    host.kill_agent()
    bad = host.state_dir / "endpoints" / "0123456789ab.json"
    bad.write_bytes(b'{"v":1,')
    host.start_agent()
    assert [e["id"] for e in meshnet(host, "endpoint", "ls")] == [kept["id"]]
    assert not bad.exists()
    assert meshnet(host, "status")["errors"] == []
    # Nor is the link of such an endpoint removed, at this start or the next: it may be in use.
    host.run(["ip", "link", "add", "mne0123456789ab", "type", "veth", "peer", "name", "left"])
    for _ in range(2):
        host.kill_agent()
        host.start_agent()
        assert "mne0123456789ab" in host.run(["ip", "link"]).stdout
        (said,) = meshnet(host, "status")["errors"]
        assert "endpoint 0123456789ab could not be read and is set aside" in said
    assert bad.with_suffix(".bad").read_bytes() == b'{"v":1,'
