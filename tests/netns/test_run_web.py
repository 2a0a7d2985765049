"""A web server in a container, and the clients that may reach it."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.images import Member
from tests.netns.containers import FOREVER, busybox_layer, client, load_image
from tests.netns.mesh import address_of, create_network

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.topology import Lab

pytestmark = pytest.mark.root
PAGE = "served by a container"


def test_a_web_server_and_its_clients(
    make_lab: Callable[..., Lab], rootfs: Path, tmp_path: Path
) -> None:
    """From containers on other hosts by its address, from a foreign machine by its port."""
    lab = make_lab(3)
    h1, *others = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    outside = lab.add_host("outside", agent=False)
    layer = busybox_layer(rootfs, Member("srv/index.html", data=PAGE.encode()))
    for host in (h1, *others):
        load_image(
            *(host, tmp_path / "image.tar", "web:1", layer),
            Cmd=["httpd", "-f", "-p", "80", "-h", "/srv"],
        )
    options = ("--detach", "--json", "--init", "--net", "prod", "--publish", "8080:80")
    web = json.loads(client(h1, "run", *options, "web:1"))
    (endpoint,) = web["endpoints"]
    assert endpoint["published"] == ["8080:80/tcp"]
    address, published = address_of(endpoint), str(h1.underlay_ip)
    command = ["sh", "-c", ask(published, 8080)]
    wait_until(lambda: PAGE in outside.run(command, check=False).stdout, 10, "served")
    for host in others:
        for name, script in (("one", ask(address, 80)), ("two", ask(published, 8080))):
            run = ("run", "--detach", "--name", name, "--net", "prod", "--init", "web:1")
            client(host, *run, "sh", "-c", script)
            assert client(host, "wait", name).strip() == "0"
            assert PAGE in client(host, "logs", name)
    # A container without a network, and the foreign machine by the overlay's address: neither.
    client(h1, "run", "--detach", "--name", "alone", "web:1", "sh", "-c", ask(address, 80))
    assert client(h1, "wait", "alone").strip() != "0"
    assert PAGE not in outside.run(["sh", "-c", ask(address, 80)], check=False).stdout
    # What runs when the lab is taken down leaves nothing, either.
    client(h1, "run", "--detach", "--net", "prod", "web:1", "sh", "-c", FOREVER)
    # The server ends while the agent stops: neither waits for the other.
    os.kill(web["pid"], signal.SIGTERM)
    assert h1.stop_agent() == 0


def ask(address: str, port: int) -> str:
    return f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 2 {address} {port}"
