"""Every datapath beside the others: bulk TCP, small UDP packets, ping round trip, CPU for a byte.

Paths, each between two containers on two hosts (the first between the hosts themselves)::

    underlay      host ─ host, no overlay
    handmade      VXLAN made with ip(8)
    vxlan         meshnet's, with agents
    direct        the same with direct routing
    udp           userspace VTEPs (`tests.bench.userspace`)
    udp native    the same with the engine in C
    kernel → udp  a kernel VXLAN device sends to a userspace VTEP …
    udp → kernel  … and the other way round; all other paths are the mean of both directions
    relay         a C relay of one packet a system call (`tests.bench.peers`)
    relay 4 MiB   the same with a receive buffer of that size
    fastd, wireguard-go  Debian's

What this machine lacks is left out, with a word on standard error.  A round measures one thing on
all paths, one after another, before the next thing: what else the machine does comes and goes in
seconds, and ratios are of neighbours in time.  CPU is that of both ends, of the tunnel's processes
and of the kernel's threads (`tests.bench.accounting`); it suffers least from other work.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.accounting import Accounts
from tests.bench.blast import BYTES, blast
from tests.bench.common import Measure, at_least, at_most, median_of, median_ratio, scratch
from tests.bench.handmade import Handmade
from tests.bench.native import NotAvailableError, compile_program
from tests.bench.peers import Fastd, Relay, WireguardGo
from tests.bench.tunnels import Carried, connect
from tests.bench.userspace import Mixed, Udp
from tests.bench.ways import Way, lab_ways, two_hosts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from meshnet.lab.topology import Lab
    from tests.bench.common import Bound, Run
    from tests.bench.tunnels import Tunnel

ROUNDS = 5
NATIVE = Udp("udp native", "native", 8474)
TUNNELS: tuple[Tunnel, ...] = (
    Udp(),
    NATIVE,
    Mixed(),
    Relay(),
    Relay("relay 4 MiB", 8286, 4 << 20),
    Fastd(),
    WireguardGo(),
)
_FIRST_OCTET = 46  # of the tunnels' subnets, one each; those before are handmade's and the lab's
_FLOW_S, _BLAST_MS = 1, 500

ONE, EIGHT = "TCP, 1 flow", "TCP, 8 flows"
SMALL, PING = f"{BYTES}-byte UDP", "ping"
CPU_ONE, CPU_EIGHT, CPU_SMALL = "CPU, 1 flow", "CPU, 8 flows", f"CPU, {BYTES}-byte UDP"
UNITS = {
    ONE: "Gb/s",
    EIGHT: "Gb/s",
    SMALL: "k/s",
    PING: "µs",
    CPU_ONE: "s/GB",
    CPU_EIGHT: "s/GB",
    CPU_SMALL: "µs each",
}
"""What is measured, and in what."""
COMPARED = (ONE, EIGHT, SMALL, PING, CPU_ONE, CPU_SMALL)

HANDMADE, RELAY = "handmade", "relay"
BOUNDS: dict[tuple[str, str, str], Bound] = {
    ("vxlan", HANDMADE, ONE): at_least(0.97),
    ("direct", "underlay", ONE): at_least(0.9),
    ("udp", HANDMADE, ONE): at_least(0.25),
    ("udp", RELAY, ONE): at_least(6),
    ("udp", RELAY, SMALL): at_least(1.0),
    ("udp", RELAY, PING): at_most(1.3),
    (NATIVE.name, HANDMADE, ONE): at_least(0.25),
    (NATIVE.name, RELAY, ONE): at_least(6),
    (NATIVE.name, RELAY, SMALL): at_least(1.0),
    (NATIVE.name, RELAY, PING): at_most(1.3),
}
"""By path, peer and what is compared."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table: a path, with an iperf3 server at its far end.

    Attributes:
        backwards: the directions to measure: False is there, True is back.
        pids: the processes whose CPU time is the path's.
    """

    name: str
    there: Way
    back: Way
    backwards: tuple[bool, ...]
    pids: tuple[int, ...]


Samples = dict[str, dict[str, list[float]]]
"""By what is measured and by path, one value a round; two of `PING`."""


def run(run: Run) -> list[Measure]:
    """See the module."""
    samples: Samples = {what: defaultdict(list) for what in UNITS}
    others: list[float] = []
    with tempfile.TemporaryDirectory() as name, scratch() as spaces, two_hosts() as lab:
        directory = Path(name)
        program = compile_program("blast", directory)
        run.say("building a lab of two hosts, and two hosts by hand")
        lab.up()
        lines = list(_build(run, lab, Handmade(spaces), directory))
        rounds = run.rounds or ROUNDS
        for number in range(1, rounds + 1):
            # Each round begins with another path, as every measurement affects the next one.
            start = number * 2 % len(lines)
            for step in _steps(program, samples, others):
                for line in lines[start:] + lines[:start]:
                    step(line)
            values = ", ".join(f"{li.name} {samples[ONE][li.name][-1]:.2f}" for li in lines)
            run.say(f"round {number} of {rounds}: {values} Gb/s")
    names = [line.name for line in lines]
    run.say(f"medians\n{render_matrix(samples, names)}")
    return [
        *(
            median_of(f"{name}: {what}", samples[what][name], unit)
            for name in names
            for what, unit in UNITS.items()
        ),
        *_ratios(samples, names),
        median_of("CPUs busy with other work", others, "CPUs"),
        Measure("… most", max(others), "CPUs"),
    ]


def _build(run: Run, lab: Lab, handmade: Handmade, directory: Path) -> Iterator[Line]:
    """Put all paths in place that can be, and serve iperf3 on them."""

    def both(client: int, server: int) -> Way:
        return Way(
            handmade.container(client), handmade.container(server), handmade.container_ip(server)
        )

    def between_hosts(client: int, server: int) -> Way:
        return Way(handmade.host(client), handmade.host(server), handmade.host_ip(server))

    for name, there, back in (
        ("underlay", between_hosts(1, 2), between_hosts(2, 1)),
        ("handmade", both(1, 2), both(2, 1)),
        ("vxlan", *lab_ways(lab, "tunnel", "10.42.0.0/16")),
        ("direct", *lab_ways(lab, "direct", "10.44.0.0/16", "--direct-routing")),
    ):
        server = there.start_server()
        if name == "handmade":
            in_container = server  # it listens at the address that each tunnel leads to, too
        there.client.run(["ping", "-n", "-c", "1", "-W", "2", there.address])
        yield Line(name, there, back, (False, True), (server,))
    for octet, tunnel in enumerate(TUNNELS, _FIRST_OCTET):
        try:
            carried = connect(handmade, tunnel, octet, directory)
        except NotAvailableError as exc:
            run.say(f"{tunnel.name} is not available: {exc}")
        else:
            yield from _lines(tunnel.name, carried, in_container)


def _lines(name: str, carried: Carried, server: int) -> Iterator[Line]:
    """One line; or two, if the name says that the ends differ."""
    pids = (server, *carried.pids)
    first, differ, second = name.partition(" ↔ ")
    if not differ:
        yield Line(name, carried.there, carried.back, (False, True), pids)
        return
    yield Line(f"{first} → {second}", carried.there, carried.back, (False,), pids)
    yield Line(f"{second} → {first}", carried.there, carried.back, (True,), pids)


def _steps(
    program: Path, samples: Samples, others: list[float]
) -> tuple[Callable[[Line], None], ...]:
    """What a round does with each path, one after another."""

    def ping(line: Line) -> None:
        samples[PING][line.name].append(line.there.ping_us())

    def small(line: Line) -> None:
        accounts = Accounts(line.pids)
        rates, used_s, packets = [], 0.0, 0
        for back in line.backwards:
            before = accounts.read()
            arrived = blast(program, line.back if back else line.there, _BLAST_MS)
            used = accounts.since(before)
            rates.append(arrived.rate)
            used_s += used.own_s
            packets += arrived.packets
            others.append(used.others)
        samples[SMALL][line.name].append(statistics.mean(rates) / 1000)
        samples[CPU_SMALL][line.name].append(used_s / packets * 1e6)

    def bulk(line: Line, flows: int, what: str, cpu: str) -> None:
        accounts = Accounts(line.pids)
        gbps, used_s, gigabytes = [], 0.0, 0.0
        for back in line.backwards:
            before = accounts.read()
            options = ["-P", str(flows), *(["-R"] if back else [])]
            flow = line.there.send(_FLOW_S, *options)
            used = accounts.since(before)
            gbps.append(flow.gbps)
            used_s += used.own_s
            gigabytes += flow.gigabytes
            others.append(used.others)
        samples[what][line.name].append(statistics.mean(gbps))
        samples[cpu][line.name].append(used_s / gigabytes)

    return (
        ping,
        small,
        lambda line: bulk(line, 1, ONE, CPU_ONE),
        ping,  # the cheapest and the most easily disturbed: twice
        lambda line: bulk(line, 8, EIGHT, CPU_EIGHT),
    )


def _ratios(samples: Samples, names: Sequence[str]) -> Iterator[Measure]:
    """Every path against the hand-made VXLAN, and those in userspace against the relay."""
    pairs = [(name, HANDMADE) for name in names if name != HANDMADE]
    pairs.append(("direct", "underlay"))
    if RELAY in names:
        pairs += [(name, RELAY) for name in names[names.index("direct") + 1 :] if name != RELAY]
    for name, peer in pairs:
        for what in COMPARED:
            values = samples[what]
            bound = BOUNDS.get((name, peer, what))
            yield median_ratio(f"{name} / {peer}: {what}", values[name], values[peer], bound)


def render_matrix(samples: Samples, names: Sequence[str]) -> str:
    """The medians, a line for each path."""
    rows = [["", *UNITS], ["", *UNITS.values()]]
    rows += [
        [name, *(f"{statistics.median(samples[what][name]):,.2f}" for what in UNITS)]
        for name in names
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
