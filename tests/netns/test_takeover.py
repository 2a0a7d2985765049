"""Taking over a host's link, on a lab host without an agent, and interrupting that."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from meshnet.errors import ConflictError, NotFoundError, PolicyRefusedError
from meshnet.kernel.netns import inside
from meshnet.kernel.takeover.interface import Interfaces
from meshnet.kernel.takeover.journal import JournalDir
from meshnet.kernel.takeover.main import Takeover
from meshnet.kernel.takeover.standing import find_standing
from meshnet.lab.poll import wait_until
from meshnet.lab.underlay import ETCD_PORT
from tests.netns.mesh import ping, silenced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from meshnet.kernel.takeover.plan import Step
    from meshnet.lab.commands import Namespace
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
BRIDGE = "mnp7"
BATCHES = 3
CONFIRM_S = 0.5
LOOKS = ("ip addr", "ip route show table all", "ip -6 route show table all", "ip neigh show proxy")
KEEPS = (
    "address add 10.99.0.1/24 dev eth0 label eth0:first",
    "address add 10.99.0.2/24 dev eth0 label eth0:second",
    "address add 10.98.0.1/24 dev eth0 noprefixroute",
    "address add 10.97.0.1 peer 10.97.0.2/32 dev eth0 metric 77",
    "address add 2001:db8:7::1/64 dev eth0 nodad",
    "address add 2001:db8:7::2/64 dev eth0 nodad valid_lft 5000 preferred_lft 4000",
    "address add 2001:db8:9::1/128 dev eth0 nodad noprefixroute",
    "route add 10.98.0.0/24 dev eth0 proto kernel scope link src 10.98.0.1 metric 100",
    "route add 192.0.2.0/24 via 10.99.0.9 mtu 1400 advmss 1300 metric 50",
    "route add 192.0.2.0/24 via 10.99.0.8 metric 60 proto static",
    "route add 192.0.3.0/24 via 10.99.0.9 table 77 src 10.99.0.2",
    "route add 192.0.4.0/24 via 172.16.0.1 dev eth0 onlink",
    "route add blackhole 198.18.0.0/15",
    "nexthop add id 55 via 10.99.0.9 dev eth0",
    "route add 192.0.5.0/24 nhid 55",
    "route add 2001:db8:8::/64 via 2001:db8:7::ff dev eth0 metric 7",
    "route add 2001:db8:a::/64 via fe80::1 dev eth0 expires 900",
    "neighbour add 10.99.0.7 lladdr 02:00:00:00:00:07 dev eth0 nud permanent",
    "neighbour add 2001:db8:7::7 lladdr 02:00:00:00:00:07 dev eth0 nud permanent",
    "neighbour add proxy 10.99.0.6 dev eth0",
)


class _Watched(Interfaces):
    """The real ones; something happens, once, after a number of batches."""

    def __init__(self, after: int, then: Callable[[], object]) -> None:
        super().__init__()
        self._after, self._then = after, then

    def carry_out(self, batches: Sequence[Sequence[Step]], parent: str, bridge: str) -> None:
        super().carry_out(batches[: self._after], parent, bridge)
        then, self._then = self._then, lambda: None
        then()
        super().carry_out(batches[self._after :], parent, bridge)


class _Taking:
    """Takeovers of a host's ``eth0``, by calls instead of processes."""

    def __init__(self, lab: Lab, state_dir: Path) -> None:
        self.lab, self.host = lab, lab.hosts[0]
        self.journals = JournalDir(state_dir)
        # The link-local address as the kernel makes it, without the seconds until it is usable.
        self.host.run(["ip", "address", "flush", "dev", "eth0", "scope", "link"])
        for setting in ("accept_dad=0", "addr_gen_mode=1", "addr_gen_mode=0"):
            self.host.run(["sysctl", "-qw", f"net.ipv6.conf.eth0.{setting}"])
        self.host.run(["ip", "-batch", "-"], input_text="\n".join(KEEPS))

    def look(self) -> dict[str, str]:
        """All that must be the same again, but for what the clock changes."""
        seen = {look: self.host.run(look.split()).stdout for look in LOOKS}
        seen["permanent"] = self.host.run(["ip", "neigh", "show", "nud", "permanent"]).stdout
        return {look: re.sub(r"\d+sec| tentative", "", text) for look, text in seen.items()}

    @contextlib.contextmanager
    def by(self, interfaces: Callable[[], Interfaces] = Interfaces) -> Iterator[Takeover]:
        """A takeover, in the host's namespace while the block runs."""
        fd = os.open(self.host.netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with inside(fd), contextlib.closing(interfaces()) as opened:
                yield Takeover(opened, self.journals, BRIDGE)
        finally:
            os.close(fd)

    def standing(self) -> str | None:
        """The link that is taken; to be called in the host's namespace."""
        with contextlib.closing(Interfaces()) as opened:
            return find_standing(BRIDGE, self.journals, opened)

    def take(self, takeover: Takeover, parent: str = "eth0") -> None:
        """Take over, asking the lab's gateway and etcd."""
        underlay = self.lab.underlay
        etcd = [(str(underlay.etcd_ip()), ETCD_PORT)]
        takeover.take_over(parent, [underlay.gateway_ip], etcd, CONFIRM_S)

    def die(self, after: int, call: Callable[[Takeover], None]) -> None:
        """Call in a process that ends after a number of batches, as if it had been killed."""
        pid = os.fork()
        if not pid:
            try:
                with self.by(lambda: _Watched(after, lambda: os._exit(9))) as takeover:
                    call(takeover)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.fixture
def taking(make_lab: MakeLab, tmp_path: Path) -> _Taking:
    """A host without an agent, whose link has some of everything."""
    return _Taking(make_lab(1, start_agents=False), tmp_path)


def _mac(host: Namespace, link: str) -> str:
    found = re.search(r"link/ether (\S+)", host.run(["ip", "link", "show", link]).stdout)
    assert found is not None
    return found[1]


def _knows_carrier(host: Namespace) -> bool:
    """Whether each link whose peer is down is known to have none; the kernel finds out late."""
    links = host.run(["ip", "-oneline", "link", "show", "up"]).stdout.splitlines()
    return all("NO-CARRIER" in link for link in links if "M-DOWN" in link)


def _routes(looks: dict[str, str], link: str) -> list[str]:
    """All routes, with a link's name taken out; less those that every link has."""
    text = looks[LOOKS[1]] + looks[LOOKS[2]]
    lines = text.replace(f"dev {link}", "dev …").splitlines()
    return [line for line in lines if not line.startswith("multicast")]


def test_everything_moves_and_comes_back_as_it_was(taking: _Taking) -> None:
    host, before = taking.host, taking.look()
    mac = _mac(host, "eth0")
    for _ in range(2):
        with taking.by() as takeover:
            taking.take(takeover)
            assert taking.standing() == "eth0"
            taking.take(takeover)  # it stands: nothing to do
            takeover.settle()
        assert "inet" not in host.run(["ip", "address", "show", "dev", "eth0"]).stdout
        assert _mac(host, BRIDGE) == mac
        assert _routes(taking.look(), BRIDGE) == _routes(before, "eth0")
        assert ping(host, taking.lab.outside_ip)
        with taking.by() as takeover:
            takeover.give_back()
            takeover.give_back()
        assert taking.look() == before


def test_what_changed_meanwhile_goes_to_the_link_too(taking: _Taking) -> None:
    host = taking.host
    with taking.by() as takeover:
        taking.take(takeover)
    host.run(["ip", "address", "add", "10.96.0.1/24", "dev", BRIDGE])
    host.run(["ip", "route", "add", "192.0.6.0/24", "via", "10.96.0.9"])
    host.run(["ip", "route", "del", "192.0.3.0/24", "table", "77"])
    with taking.by() as takeover:
        takeover.give_back()
    after = taking.look()
    assert "inet 10.96.0.1/24 brd" not in after["ip addr"]
    assert "inet 10.96.0.1/24 scope global eth0" in after["ip addr"]
    assert "192.0.6.0/24 via 10.96.0.9 dev eth0" in after[LOOKS[1]]
    assert "table 77" not in after[LOOKS[1]]


def test_who_does_not_answer_gets_everything_undone(taking: _Taking) -> None:
    lab, before = taking.lab, taking.look()
    etcd = f"tcp dport {ETCD_PORT}"
    for who, rule in (("gateway", "arp operation reply"), ("etcd", etcd)):
        with (
            silenced(lab, rule),
            taking.by() as takeover,
            pytest.raises(PolicyRefusedError, match=f"{who}.*before anything was changed"),
        ):
            taking.take(takeover)
        with contextlib.ExitStack() as silence:
            # From the moment on that everything is on the bridge.
            then = functools.partial(silence.enter_context, silenced(lab, rule))
            with (
                taking.by(lambda then=then: _Watched(BATCHES, then)) as takeover,  # type: ignore[misc]
                pytest.raises(PolicyRefusedError, match=f"{who}.*did not answer through bridge"),
            ):
                taking.take(takeover)
        assert taking.look() == before
        assert taking.journals.bridges() == []


@pytest.mark.parametrize("what", ["take", "return"])
def test_a_process_killed_after_any_batch_leaves_what_can_be_settled(
    taking: _Taking, what: str
) -> None:
    host, before = taking.host, taking.look()
    for batches in range(BATCHES + 1):
        if what == "take":
            taking.die(batches, taking.take)
        else:
            with taking.by() as takeover:
                taking.take(takeover)
            taking.die(batches, Takeover.give_back)
        assert taking.journals.bridges() == [BRIDGE]
        # Whenever the process was killed, nobody is cut off.
        assert ping(host, str(taking.lab.underlay.etcd_ip()))
        with taking.by() as takeover:
            assert taking.standing() is None
            if batches % 2:
                taking.take(takeover)
                takeover.give_back()
            else:
                takeover.settle()
        assert taking.look() == before
        assert taking.journals.bridges() == []


def test_what_somebody_took_apart_is_mended(taking: _Taking) -> None:
    host = taking.host
    # What led by a nexthop object goes with its link, proxies with its carrier: nothing tells of
    # them.
    host.run(["ip", "route", "del", "192.0.5.0/24"])
    host.run(["ip", "neigh", "del", "proxy", "10.99.0.6", "dev", "eth0"])
    before = taking.look()
    for argv in (["ip", "link", "set", "eth0", "nomaster"], ["ip", "link", "del", BRIDGE]):
        with taking.by() as takeover:
            taking.take(takeover)
            host.run(argv)
            assert taking.standing() is None
            takeover.settle()
        assert taking.look() == before
        with taking.by() as takeover:
            taking.take(takeover)
            host.run(argv)
            taking.take(takeover)
            assert taking.standing() == "eth0"
            takeover.give_back()
        assert taking.look() == before


def test_a_journal_of_another_boot_is_forgotten(taking: _Taking) -> None:
    """A bridge does not survive a boot; the machine's own configuration gave it its addresses."""
    before = taking.look()
    with taking.by() as takeover:
        taking.take(takeover)
        journal = taking.journals.load(BRIDGE)
        assert journal is not None
        takeover.give_back()
        for boot, addresses in ((journal.boot, True), ("another", True), ("another", False)):
            taking.journals.save(replace(journal, boot=boot))
            if not addresses:
                taking.host.run(["ip", "address", "flush", "dev", "eth0"])
                before = taking.look()
            takeover.settle()
            assert taking.look() == before
            assert taking.journals.bridges() == []


def test_links_that_cannot_be_taken_are_left_alone(taking: _Taking) -> None:
    host = taking.host
    cases = {
        "does not exist": ("nosuch0", (), ()),
        "not an Ethernet": ("lo", (), ()),
        "is down": ("other", ("link add other type bridge",), ("link del other",)),
        "meshnet's own": ("mnb1", ("link add mnb1 type bridge",), ("link del mnb1",)),
        "port of br7": (
            "other",
            ("link add br7 type bridge", "link add other master br7 up type veth peer name other2"),
            ("link del other", "link del br7"),
        ),
        r"link up7 \(macvlan\)": (
            "eth0",
            ("link add up7 link eth0 type macvlan",),
            ("link del up7",),
        ),
        "policy rule 77": (
            "eth0",
            ("rule add iif eth0 table 77 priority 77",),
            ("rule del priority 77",),
        ),
        "shares its packets": (
            "eth0",
            (
                "link add other up type bridge",
                "route add 192.0.9.0/24 nexthop dev eth0 nexthop dev other",
            ),
            ("link del other", "route flush 192.0.9.0/24"),
        ),
        "mnp7 exists": ("eth0", ("link add mnp7 type bridge",), ("link del mnp7",)),
    }
    for reason, (link, setup, undo) in cases.items():
        host.run(["ip", "-batch", "-"], input_text="\n".join(setup))
        wait_until(lambda: _knows_carrier(host), 5, "the kernel knows of carriers")
        before = taking.look()
        with (
            taking.by() as takeover,
            pytest.raises((ConflictError, NotFoundError), match=reason),
        ):
            taking.take(takeover, link)
        assert taking.look() == before
        assert taking.journals.bridges() == []
        host.run(["ip", "-force", "-batch", "-"], input_text="\n".join(undo), check=False)


def test_an_underlay_of_ipv6(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(1, underlay_family=6, start_agents=False)
    taking = _Taking(lab, tmp_path)
    before = taking.look()
    with taking.by() as takeover:
        taking.take(takeover)
        assert ping(taking.host, str(lab.underlay.gateway_ip))
        takeover.give_back()
    assert taking.look() == before
