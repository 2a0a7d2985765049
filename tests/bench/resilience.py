"""Counts what happens to packets when something dies.

Run it as ``python -m tests.bench.resilience``.  Not a comparison: it prints what the issue tracker
asks to be shown, with real durations (an etcd
outage of a minute).  The tests in ``tests/netns/test_survival.py`` assert the same in less time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from meshnet.lab.topology import Lab
from tests.netns.mesh import (
    Document,
    PingStream,
    address_of,
    attach,
    create_network,
    meshnet,
    ping,
    wait_in_sync,
)
from tests.netns.test_survival import (
    DAMAGE,
    SUBNETS,
    alive,
    damage_words,
    is_repaired,
    is_whole,
    kernel_state,
)

if TYPE_CHECKING:
    from meshnet.lab.host import LabContainer, LabHost

OUTAGE_S = 60.0


def main() -> None:
    """Run all scenes on one lab of three hosts."""
    with Lab("resilience", hosts=3) as lab:
        create_network(lab, "prod", *SUBNETS)
        containers = [host.spawn_container() for host in lab.hosts]
        endpoints = [attach(c, h, "prod") for c, h in zip(containers, lab.hosts, strict=True)]
        targets = [address_of(e) for e in endpoints]
        for how in ("kill -9", "SIGTERM"):
            _agent_ends(lab.host("h1"), lab.host("h2"), containers, targets, how)
        _store_outage(lab, containers, targets)
        _join_and_leave(lab, containers)
        _damage(lab.host("h1"), endpoints[0], containers[0], targets[1])


def _say(text: str) -> None:
    print(text, flush=True)


def _streams(containers: list[LabContainer], targets: list[str]) -> list[PingStream]:
    """A ping a millisecond from the first host to the others, and back."""
    return [
        PingStream(containers[0], targets[1]),
        PingStream(containers[0], targets[2]),
        PingStream(containers[1], targets[0]),
    ]


def _losses(streams: list[PingStream]) -> str:
    results = [stream.stop() for stream in streams]
    sent, lost = (sum(column) for column in zip(*results, strict=True))
    return f"{lost} of {sent} pings lost"


def _agent_ends(
    host: LabHost, other: LabHost, containers: list[LabContainer], targets: list[str], how: str
) -> None:
    before = kernel_state(host)
    streams = _streams(containers, targets)
    if how == "SIGTERM":
        host.stop_agent()
    else:
        host.kill_agent()
    until = time.monotonic() + 5
    wait_until(lambda: time.monotonic() > until, 10, "five seconds without an agent")
    started = time.monotonic()
    host.start_agent()
    status = wait_in_sync(host, peers=2)
    took = time.monotonic() - started
    wait_until(lambda: alive(other)[host.name], 10, "alive again")
    _say(
        f"agent {how}: {_losses(streams)}; in sync {took:.2f} s after its start, "
        f"{status['kernel']['writes']} netlink writes, "
        f"kernel state {'unchanged' if kernel_state(host) == before else 'CHANGED'}"
    )


def _store_outage(lab: Lab, containers: list[LabContainer], targets: list[str]) -> None:
    subnets = {d["id"]: d["subnets"] for d in meshnet(lab.host("h1"), "hosts")}
    streams = _streams(containers, targets)
    lab.etcd.stop()
    until = time.monotonic() + OUTAGE_S
    wait_until(lambda: time.monotonic() > until, OUTAGE_S + 5, "the outage")
    lab.etcd.start()
    lab.etcd.wait_healthy(20)
    started = time.monotonic()
    for host in lab.hosts:
        wait_until(lambda: is_whole(host), 60, "alive again")  # noqa: B023
    took = time.monotonic() - started
    same = {d["id"]: d["subnets"] for d in meshnet(lab.host("h1"), "hosts")} == subnets
    _say(
        f"etcd stopped for {OUTAGE_S:.0f} s: {_losses(streams)}; all hosts alive and connected "
        f"{took:.1f} s after its return, subnets {'unchanged' if same else 'CHANGED'}"
    )


def _join_and_leave(lab: Lab, containers: list[LabContainer]) -> None:
    started = time.monotonic()
    h4 = lab.add_host("h4")
    ready = time.monotonic() - started
    container = h4.spawn_container()
    target = address_of(attach(container, h4, "prod"))
    for source in containers:
        wait_until(lambda: ping(source, target), 10, "h4's container")  # noqa: B023
    reached = time.monotonic() - started
    _say(
        f"fourth host: agent ready after {ready:.2f} s, its container reached from all three "
        f"after {reached:.2f} s"
    )
    h1 = lab.host("h1")
    subnet = next(d for d in meshnet(h1, "hosts") if d["id"] == "h4")["subnets"]["prod"]
    h4.stop_agent()
    wait_until(lambda: not alive(h1)["h4"], 20, "h4 is seen stopped")
    started = time.monotonic()
    meshnet(h1, "host", "rm", "h4")
    for host in lab.hosts[:3]:
        wait_until(lambda: subnet not in kernel_state(host), 10, "h4's objects are gone")  # noqa: B023
    took = time.monotonic() - started
    _say(
        f"host rm h4: its objects gone from all three {took * 1000:.0f} ms after the command began"
    )


def _damage(host: LabHost, endpoint: Document, source: LabContainer, target: str) -> None:
    words = damage_words(host, endpoint)
    before = kernel_state(host)
    for what, command in DAMAGE.items():
        host.run(command.format(**words).split())
        started = time.monotonic()
        wait_until(lambda: is_repaired(host, before), 70, what)
        took = time.monotonic() - started
        wait_until(lambda: ping(source, target), 5, "a ping")
        _say(f"by hand: {what:18} mended in {took * 1000:4.0f} ms")


if __name__ == "__main__":
    main()
