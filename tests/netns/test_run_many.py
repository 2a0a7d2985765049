"""Many containers on one host: started, ended and removed side by side, with and without an agent.

``MESHNET_CONTAINERS=100`` (``make test-many``) runs as many; by default it is a dozen.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.containers import (
    CLIENT,
    FOREVER,
    busybox_layer,
    client,
    is_clean,
    leftovers,
    load_image,
)
from tests.netns.mesh import address_of, attach, create_network, ping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
MANY = int(os.environ.get("MESHNET_CONTAINERS", "12"))
ENDS = {"c0": 0, "c1": 1, "c2": 42, "c3": 200, "c4": 9}
"""Statuses of those that end while there is no agent."""


def side_by_side(host: LabHost, commands: Iterable[Sequence[str]]) -> list[str]:
    """Run commands of the client at the same time; what they print.  All must end well."""
    children = [host.popen([*CLIENT, *words]) for words in commands]
    outputs = [child.communicate(timeout=600)[0] for child in children]
    assert [child.returncode for child in children] == [0] * len(children), outputs
    return outputs


def listed(host: LabHost) -> dict[str, Any]:
    return {d["name"]: d for d in json.loads(client(host, "ps", "--all", "--json"))}


def descriptors(host: LabHost) -> int:
    return len(os.listdir(f"/proc/{host.agent_pid}/fd"))


def link_names(host: LabHost) -> list[str]:
    return host.run(["ls", "/sys/class/net"]).stdout.split()


def test_twenty_containers_and_an_agent_that_is_killed(
    make_lab: MakeLab, rootfs: Path, tmp_path: Path
) -> None:
    """Five end while it is down; after its restart every one is as it should be."""
    lab = make_lab(2)
    h1, h2 = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    far = h2.spawn_container()
    attach(far, h2, "prod")
    load_image(h1, tmp_path / "image.tar", "many:1", busybox_layer(rootfs))
    names = [f"c{number}" for number in range(20)]
    # c4 is --rm; c5 is restarted after an end while the agent is down, c6 would be.
    more = {"c4": ["--rm"], "c5": ["--restart", "always"], "c6": ["--restart", "on-failure:3"]}
    script = "echo up $0; trap 'echo down $0; exit $1' TERM; sleep 9999 & wait"
    side_by_side(
        h1,
        (
            [
                *("run", "--detach", "--name", name, "--net", "prod", *more.get(name, [])),
                *("many:1", "sh", "-c", script, name, str(ENDS.get(name, 7))),
            ]
            for name in names
        ),
    )
    before = listed(h1)
    addresses = {name: address_of(d["endpoints"][0]) for name, d in before.items()}
    assert len(set(addresses.values())) == 20
    wait_until(
        lambda: all(client(h1, "logs", name) == f"up {name}\n" for name in names), 30, "all are up"
    )
    h1.kill_agent()
    ending = [*ENDS, "c5"]
    for name in ending:
        os.kill(before[name]["pid"], 15)
    wait_until(
        lambda: not any(Path(f"/proc/{before[n]['pid']}").exists() for n in ending), 30, "ended"
    )
    # The others do not notice.
    assert ping(far, addresses["c19"])
    h1.start_agent()

    def settled() -> bool:
        found = listed(h1)
        return "c4" not in found and found["c5"]["restarts"] == 1 and not any(
            found[name]["state"] == "running" for name in ENDS.keys() - {"c4"}
        ) and found["c5"]["state"] == "running"  # fmt: skip

    wait_until(settled, 30, "what ended is known, c5 runs again, c4 is gone")
    after = listed(h1)
    for name in names:
        document = after.get(name)
        if name == "c4":
            assert document is None
        elif name in ENDS:
            assert document is not None
            assert (document["state"], document["exit_code"]) == ("exited", ENDS[name])
            assert (document["pid"], document["endpoints"]) == (None, [])
            assert document["error"] is None
            assert client(h1, "logs", name) == f"up {name}\ndown {name}\n"
        elif name == "c5":
            logs = f"up {name}\ndown {name}\nup {name}\n"
            wait_until(lambda: client(h1, "logs", "c5") == logs, 10, "its log")  # noqa: B023
            assert ping(far, address_of(after["c5"]["endpoints"][0]))
        else:
            assert document == before[name]
    kept = {after[name]["id"] for name in names if name in after and name not in ENDS}
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    mounted = {line.split()[4].split("/")[-2] for line in mounts if f"{h1.state_dir}/" in line}
    assert mounted == kept
    endpoints = json.loads(client(h1, "endpoint", "ls", "--json"))
    assert {e["name"] for e in endpoints if e["host"] == "h1"} == set(names) - set(ENDS)
    on_disk = {p.stem for p in (h1.state_dir / "endpoints").glob("*.json")}
    assert len(on_disk) == 15
    # What ended can be waited for, and is removed.
    assert client(h1, "wait", "c3").strip() == "200"
    side_by_side(h1, (["rm", "--force", name] for name in after))
    assert is_clean(h1), leftovers(h1)


def test_many_side_by_side_leave_nothing(
    make_lab: MakeLab, rootfs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = make_lab(1)
    (host,) = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    load_image(host, tmp_path / "image.tar", "many:1", busybox_layer(rootfs))

    def cycle(names: Sequence[str]) -> tuple[float, float]:
        started = time.monotonic()
        options = ("--detach", "--net", "prod", "--memory", "32m", "--pids-limit", "10")
        side_by_side(
            host,
            (["run", *options, "--name", n, "many:1", "sh", "-c", FOREVER] for n in names),
        )
        running = time.monotonic()
        documents = listed(host)
        assert {n for n, d in documents.items() if d["state"] == "running"} == set(names)
        assert len({address_of(d["endpoints"][0]) for d in documents.values()}) == len(names)
        half = len(names) // 2
        side_by_side(
            host,
            [
                *(["stop", "--time", "60", name] for name in names[:half]),
                *(["rm", "--force", name] for name in names[half:]),
            ],
        )
        assert {d["exit_code"] for d in listed(host).values()} == {9}
        side_by_side(host, (["rm", name] for name in names[:half]))
        return running - started, time.monotonic() - running

    cycle(["first", "second"])  # what the agent opens once, it has open now
    fds = descriptors(host)
    links = link_names(host)
    files = [sorted(map(str, d.rglob("*"))) for d in (host.state_dir, host.run_dir)]
    start_s, end_s = cycle([f"c{number}" for number in range(MANY)])
    with capsys.disabled():
        print(f"\n{MANY} containers: {start_s:.1f} s to start, {end_s:.1f} s to end")
    assert is_clean(host), leftovers(host)
    wait_until(lambda: descriptors(host) <= fds, 10, f"no more than {fds} descriptors")
    assert link_names(host) == links
    # A namespace lives as long as a process, a mount or a descriptor has it: all are looked at.
    assert [sorted(map(str, d.rglob("*"))) for d in (host.state_dir, host.run_dir)] == files
    assert json.loads(client(host, "endpoint", "ls", "--json")) == []
