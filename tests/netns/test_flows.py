"""Flows that began while our rules were gone follow the rules once these are back."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Literal

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.mesh import address_of, attach, meshnet, wait_in_sync
from tests.netns.talk import Client, connected, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
NETWORK = ("--subnet", "172.30.0.0/24", "--subnet", "fd00:30::/64", "--mode", "bridge")
FLUSH = "flush ruleset"


@contextlib.contextmanager
def gap(host: LabHost, *commands: str) -> Iterator[None]:
    """Have nft carry out commands, and nobody mend that while the block runs."""
    os.kill(host.agent_pid, signal.SIGSTOP)
    try:
        host.run(["nft", "; ".join(commands)])
        yield
    finally:
        os.kill(host.agent_pid, signal.SIGCONT)


def answers(client: Client, wait_s: float = 0.3) -> bool:
    """Whether somebody answers by a flow that goes on."""
    try:
        client.ask(wait_s)
    except OSError:
        return False
    return True


def is_healed(host: LabHost) -> bool:
    return "published4" in host.run(["nft", "list", "ruleset"]).stdout


@pytest.mark.parametrize("family", [4, 6])
def test_flows_of_a_gap(make_lab: MakeLab, family: Literal[4, 6]) -> None:
    lab = make_lab(1, underlay_family=family)
    (host,) = lab.hosts
    outside, far = (lab.add_host(name, agent=False) for name in ("outside", "far"))
    meshnet(host, "network", "create", "local", *NETWORK)
    wait_in_sync(host)
    # Somebody else's rules that have connections tracked all the time.
    host.run(["nft", "table inet foreign { chain c { type filter hook forward priority 0; "
              "ct state new accept; }; chain i { type filter hook input priority 0; "
              "ct state new accept; }; }"])  # fmt: skip
    web = host.spawn_container()
    document = attach(web, host, "local", "--publish", "8080:80/udp")
    at_host, there, own = (
        str(host.underlay_ip),
        str(outside.underlay_ip),
        address_of(document, family),
    )
    outside.run(["ip", "route", "add", NETWORK[1 if family == 4 else 3], "via", at_host])
    with contextlib.ExitStack() as stack:
        stack.enter_context(serving((web, "web"), (outside, "outside"), (far, "far")))
        flow = functools.partial(connected, protocol="udp")
        before = [
            stack.enter_context(flow(outside, at_host, 8080)),
            stack.enter_context(flow(web, there, 80)),
            stack.enter_context(connected(web, there, 80)),
        ]
        assert all(map(answers, before))
        with gap(host, "delete table inet meshnet", "delete table bridge meshnet"):
            published = stack.enter_context(flow(outside, at_host, 8080))
            masqueraded = stack.enter_context(flow(web, str(far.underlay_ip), 80))
            into = [stack.enter_context(connected(outside, own, 80, p)) for p in ("tcp", "udp")]
            assert not answers(published)
            assert not answers(masqueraded)
            assert all(map(answers, into))
        wait_until(lambda: is_healed(host), 5, "the tables are back")
        wait_until(lambda: answers(published), 5, "the published flow is translated")
        wait_until(lambda: answers(masqueraded), 5, "the outgoing flow is translated")
        assert not any(map(answers, into))
        assert all(map(answers, before))
        # One element alone.
        element = f"element inet meshnet published{family} {{ 17 . 8080 }}"
        with gap(host, f"delete {element}"):
            late = stack.enter_context(flow(outside, at_host, 8080))
            assert not answers(late)
        wait_until(lambda: answers(late), 5, "the published flow is translated")
        assert all(map(answers, before))


def test_a_flow_every_millisecond(make_lab: MakeLab) -> None:
    """Not one of them is dead for good, however they meet the gap."""
    lab = make_lab(1)
    (host,) = lab.hosts
    outside, far = (lab.add_host(name, agent=False) for name in ("outside", "far"))
    meshnet(host, "network", "create", "local", *NETWORK)
    wait_in_sync(host)
    web = host.spawn_container()
    attach(web, host, "local", "--publish", "8080:80/udp")
    clients: list[Client] = []
    with contextlib.ExitStack() as stack, serving((web, "web"), (far, "far")):
        ended = threading.Event()

        def begin_flows() -> None:
            while not ended.is_set():
                for source, target, port in (
                    (outside, str(host.underlay_ip), 8080),
                    (web, str(far.underlay_ip), 80),
                ):
                    client = stack.enter_context(connected(source, target, port, "udp"))
                    client.send()
                    clients.append(client)
                time.sleep(0.001)

        thread = threading.Thread(target=begin_flows)
        thread.start()
        try:
            for _ in range(5):
                count = len(clients)
                wait_until(lambda: len(clients) > count + 100, 10, "flows")  # noqa: B023
                host.run(["nft", FLUSH])
                wait_until(lambda: is_healed(host), 5, "the tables are back")
        finally:
            ended.set()
            thread.join()
        dead = list(clients)
        wait_in_sync(host)
        for _ in range(3):
            for client in dead:
                client.send()
            dead = [client for client in dead if not answers(client)]
            assert len(dead) < 100, f"{len(dead)} of {len(clients)} are dead"
        assert len(clients) > 500
        assert not dead, f"{len(dead)} of {len(clients)}"
