"""Faults of etcd: they must not cost a packet, and nothing may be lost for good."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from meshnet.errors import StoreUnavailableError
from meshnet.lab.poll import wait_until
from tests.netns.faults.fault import Injected
from tests.netns.faults.mesh import NETWORKS, TTL_S
from tests.netns.mesh import meshnet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from random import Random

    from meshnet.lab.etcd import EtcdServer
    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab
    from tests.netns.faults.mesh import FaultMesh

_LOST = "store lost|lease not renewed"
_OUTAGE_WHOLE_S = 25.0
"""An agent tries again with pauses of up to 10 s, and a call to a dead etcd may take 5 s."""


def _start(etcds: Iterable[EtcdServer]) -> None:
    """Start members, and wait until they answer."""
    for etcd in etcds:
        etcd.start()
    for etcd in etcds:
        etcd.wait_healthy()


def _outage_s(rng: Random) -> float:
    """Several lease times."""
    return rng.uniform(2, 4) * TTL_S


@dataclass(frozen=True, slots=True)
class _EtcdEnded:
    """All members crash or are stopped, and start again at once, or after several lease times."""

    name: str
    in_order: bool

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """End all."""
        etcds = list(mesh.lab.etcds.values())
        for etcd in etcds:
            if self.in_order:
                etcd.stop()
            else:
                etcd.kill()
        return Injected(
            self.name,
            partial(_start, etcds),
            rng.choice((0.0, _outage_s(rng))),
            whole_within_s=_OUTAGE_WHOLE_S,
            says=_LOST,
        )


KILLED = _EtcdEnded("etcd killed", in_order=False)
STOPPED = _EtcdEnded("etcd stopped", in_order=True)


@dataclass(frozen=True, slots=True)
class EtcdFrozen:
    """All members stand still for several lease times: connections stay, nothing answers."""

    name: str = "etcd frozen"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Freeze all."""
        etcds = list(mesh.lab.etcds.values())
        for etcd in etcds:
            etcd.pause()

        def heal() -> None:
            for etcd in etcds:
                etcd.resume()
            for etcd in etcds:
                etcd.wait_healthy()

        lasts_s = _outage_s(rng)
        return Injected(
            "etcd frozen",
            heal,
            lasts_s,
            whole_within_s=_OUTAGE_WHOLE_S,
            # A call waits for 5 s before it fails.
            says=_LOST if lasts_s > 3 * TTL_S else "",
        )


@dataclass(frozen=True, slots=True)
class EtcdSlow:
    """All members stand still again and again, for shorter than any patience."""

    name: str = "etcd slow"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Start the pulses."""
        etcds = list(mesh.lab.etcds.values())
        still_s, moving_s = rng.uniform(0.1, 0.4), rng.uniform(0.02, 0.1)
        over = threading.Event()

        def pulse() -> None:
            while not over.wait(moving_s):
                for etcd in etcds:
                    etcd.pause()
                over.wait(still_s)
                for etcd in etcds:
                    etcd.resume()

        thread = threading.Thread(target=pulse, name="etcd pulses", daemon=True)
        thread.start()

        def heal() -> None:
            over.set()
            thread.join()

        what = f"etcd stands still for {still_s:.2f} s every {still_s + moving_s:.2f} s"
        return Injected(what, heal, _outage_s(rng), whole_within_s=_OUTAGE_WHOLE_S)


@dataclass(frozen=True, slots=True)
class MemberLost:
    """One of three members loses its data, or is cut off; the others go on."""

    name: str = "etcd member lost"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Lose one."""
        lab = mesh.lab
        port = rng.choice(list(lab.etcds))
        etcd = lab.etcds[port]
        other = next(each for name, each in lab.etcds.items() if name != port)
        if rng.randrange(2):
            lab.cut(port)
            return Injected(f"{port} cut off", lambda: _mend(lab, port), _outage_s(rng))
        etcd.lose_data()

        def heal() -> None:
            wait_until(lambda: _answers(other), 20, "the others have a leader")
            etcd.rejoin(other)
            etcd.wait_healthy()

        return Injected(f"{port} lost its data", heal, _outage_s(rng))


def _mend(lab: Lab, port: str) -> None:
    lab.mend(port)
    lab.etcds[port].wait_healthy()


def _answers(etcd: EtcdServer, *options: str) -> bool:
    try:
        etcd.ctl(*options, "--command-timeout=1s", "endpoint", "health")
    except StoreUnavailableError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class QuorumLost:
    """Two of three members are killed: the third answers nothing."""

    name: str = "etcd quorum lost"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Kill two."""
        dead = rng.sample(list(mesh.lab.etcds), 2)
        etcds = [mesh.lab.etcds[port] for port in dead]
        for etcd in etcds:
            etcd.kill()
        return Injected(
            f"{' and '.join(dead)} killed",
            partial(_start, etcds),
            _outage_s(rng),
            whole_within_s=_OUTAGE_WHOLE_S,
            says=_LOST,
        )


@dataclass(frozen=True, slots=True)
class LeaderMoved:
    """Another member becomes the leader, by its word or by freezing the one there was."""

    name: str = "etcd leader moved"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Move it."""
        status = {
            port: json.loads(etcd.ctl("endpoint", "status", "-w", "json"))[0]["Status"]
            for port, etcd in mesh.lab.etcds.items()
        }
        ids = {port: each["header"]["member_id"] for port, each in status.items()}
        leader = next(port for port, each in status.items() if each["leader"] == ids[port])
        heir = rng.choice(sorted(ids.keys() - {leader}))
        etcd = mesh.lab.etcds[leader]
        if rng.randrange(2):
            etcd.ctl("move-leader", f"{ids[heir]:x}")
            return Injected(f"leader moved from {leader} to {heir}", lambda: None)
        etcd.pause()

        def heal() -> None:
            etcd.resume()
            etcd.wait_healthy()

        return Injected(f"leader {leader} frozen", heal, _outage_s(rng))


@dataclass(frozen=True, slots=True)
class RolledBack:
    """etcd's data is lost, and a snapshot restored that is older than what agents saw.

    They refuse it, whatever it says, until the operator accepts it or finds the later data.
    """

    name: str = "etcd restored from an older snapshot"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Restore one from before a network was made and removed."""
        lab = mesh.lab
        etcds = list(lab.etcds.values())
        snapshot = lab.base_dir / "snapshot"
        lab.etcd.ctl("snapshot", "save", str(snapshot))
        host = rng.choice(lab.hosts)
        meshnet(host, "network", "create", "passing", "--subnet", "10.99.0.0/16")
        for each in lab.hosts:
            wait_until(lambda: "passing" in _networks(each), 10, "it is seen")  # noqa: B023
        meshnet(host, "network", "rm", "passing")
        for each in lab.hosts:
            wait_until(lambda: "passing" not in _networks(each), 10, "its end is seen")  # noqa: B023
        later = [etcd.data_dir.with_name("later") for etcd in etcds]
        for etcd, place in zip(etcds, later, strict=True):
            etcd.kill()
            etcd.data_dir.rename(place)
            etcd.restore(snapshot)
        snapshot.unlink()
        _start(etcds)
        _refuses_writes(host, rng.choice(sorted(NETWORKS)), "older copy")
        accepted = bool(rng.randrange(2)) and mesh.spared is None  # it ends every agent

        def heal() -> None:
            if accepted:
                _accept(lab)
            else:
                _put_back(etcds)
            for etcd in etcds:
                _remove(etcd)

        return Injected(
            f"older snapshot restored, {'accepted' if accepted else 'later data found'}",
            heal,
            _outage_s(rng),
            whole_within_s=_OUTAGE_WHOLE_S,
            says="restored from an older copy",
        )


def _refuses_writes(host: LabHost, network: str, reason: str) -> None:
    """Check that an operator's commands do not reach an etcd that is not this mesh's."""
    for command in (
        ("network", "create", "late", "--subnet", "10.99.0.0/16"),
        ("network", "rm", network),
        ("host", "rm", "nobody"),
    ):
        what = f"{host.name} refuses meshnet {' '.join(command)}"
        wait_until(partial(_is_refused, host, command, reason), 20, what)


def _is_refused(host: LabHost, command: tuple[str, ...], reason: str) -> bool:
    done = host.run(["meshnet", *command], check=False)
    assert done.returncode, f"{host.name} did meshnet {' '.join(command)}"
    # 5: it has endpoints on that host, which is looked at first.
    return done.returncode == 5 or (done.returncode == 9 and reason in done.stderr)


def _networks(host: LabHost) -> list[str]:
    return [document["name"] for document in meshnet(host, "network", "ls")]


def _accept(lab: Lab) -> None:
    """What docs/operations.md says: accept what etcd holds now, on every host."""
    for host in lab.hosts:
        host.stop_agent()
        (host.state_dir / "mesh.json").unlink()
    for host in lab.hosts:
        host.start_agent()


def _put_back(etcds: Iterable[EtcdServer]) -> None:
    """Put the data back that was moved aside."""
    for etcd in etcds:
        etcd.lose_data()
        etcd.data_dir.with_name("later").rename(etcd.data_dir)
    _start(etcds)


def _remove(etcd: EtcdServer) -> None:
    shutil.rmtree(etcd.data_dir.with_name("later"), ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Wiped:
    """etcd's data is lost, and etcd started empty: agents refuse it, and write nothing to it."""

    name: str = "etcd wiped"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Start on nothing."""
        lab = mesh.lab
        etcds = list(lab.etcds.values())
        for etcd in etcds:
            etcd.kill()
            etcd.data_dir.rename(etcd.data_dir.with_name("later"))
        _start(etcds)
        _refuses_writes(rng.choice(lab.hosts), rng.choice(sorted(NETWORKS)), "etcd is empty")

        def heal() -> None:
            left = lab.etcd.ctl("get", "--prefix", "/", "--keys-only")
            assert left == "", f"written to an empty etcd: {left}"
            _put_back(etcds)

        return Injected(
            "etcd wiped, its data found again",
            heal,
            _outage_s(rng),
            whole_within_s=_OUTAGE_WHOLE_S,
            says="etcd is empty",
        )


@dataclass(frozen=True, slots=True)
class Compacted:
    """History is compacted while all watches are broken: agents must list anew."""

    name: str = "etcd compacted under the watch"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Break the watches, write, compact; agents come back later."""
        lab = mesh.lab
        etcds = list(lab.etcds.values())
        hosts = ", ".join(f'"{host.name}"' for host in lab.hosts)
        rule = f"iifname {{ {hosts} }} tcp dport 2379 drop;"
        table = "table bridge compacted"
        lab.switch.run(
            ["nft", f"{table} {{ chain c {{ type filter hook forward priority 0; {rule} }}; }}"]
        )
        for etcd in etcds:
            etcd.kill()
        _start(etcds)
        for number in range(rng.randrange(2, 50)):
            lab.etcd.ctl("put", "/fault/key", str(number))
        status = json.loads(lab.etcd.ctl("endpoint", "status", "-w", "json"))
        lab.etcd.ctl("compact", str(status[0]["Status"]["header"]["revision"]))

        def heal() -> None:
            lab.switch.run(["nft", f"delete {table}"])

        return Injected(
            "etcd compacted while nobody watched",
            heal,
            whole_within_s=_OUTAGE_WHOLE_S,
            says="history compacted, listing again",
        )


@dataclass(frozen=True, slots=True)
class Full:
    """etcd's quota is used up: it refuses all writes and grants no leases."""

    name: str = "etcd full"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Start with a low quota, and fill it."""
        lab = mesh.lab
        etcds = list(lab.etcds.values())
        for etcd in etcds:
            etcd.kill()
        for etcd in etcds:
            etcd.start(more_args=[f"--quota-backend-bytes={4 << 20}"])
        for etcd in etcds:
            etcd.wait_healthy()
        value = "x" * (100 << 10)

        def full() -> bool:
            try:
                lab.etcd.ctl("put", "/fault/full", value)
            except StoreUnavailableError as error:
                return "database space exceeded" in str(error)
            return False

        wait_until(full, 30, "etcd is full")
        host = rng.choice(lab.hosts)
        said = meshnet(host, "network", "create", "late", "--subnet", "10.99.0.0/16", status=8)
        assert "database space exceeded" in said, said

        def heal() -> None:
            lab.etcd.ctl("del", "/fault/full")
            status = json.loads(lab.etcd.ctl("endpoint", "status", "-w", "json"))
            lab.etcd.ctl("compact", str(status[0]["Status"]["header"]["revision"]))
            for etcd in etcds:
                etcd.ctl("defrag")
            lab.etcd.ctl("alarm", "disarm")

        return Injected("etcd full", heal, _outage_s(rng), whole_within_s=_OUTAGE_WHOLE_S)


@dataclass(frozen=True, slots=True)
class AuthEnabled:
    """Somebody enables authentication: agents have no user.

    Streams and leases that etcd has granted go on, so its members are started again as well.
    """

    name: str = "etcd wants a user"

    def inject(self, mesh: FaultMesh, rng: Random) -> Injected:
        """Enable it."""
        etcd, etcds = mesh.lab.etcd, mesh.lab.etcds.values()
        root: Callable[..., str] = partial(etcd.ctl, "--user=root:fault")
        etcd.ctl("user", "add", "root:fault")
        etcd.ctl("user", "grant-role", "root", "root")
        etcd.ctl("auth", "enable")
        for each in etcds:
            each.kill()
            each.start()
        root_answers = partial(_answers, etcd, "--user=root:fault")
        wait_until(root_answers, 20, "etcd answers its root")

        def heal() -> None:
            root("auth", "disable")
            etcd.ctl("user", "delete", "root")

        return Injected(
            "authentication enabled",
            heal,
            _outage_s(rng),
            whole_within_s=_OUTAGE_WHOLE_S,
            says="etcd wants a user",
        )
