"""The invariant checker finds nothing wrong with a whole mesh, and every damage that a test does.

Damage is done to real etcd, kernels, namespaces and disks while no agent runs to mend it; what
agents answer is changed in what was read from them.  A damage must be told by exactly its
sentences: every pattern has to match one, and none may be left.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from ipaddress import ip_interface, ip_network
from typing import TYPE_CHECKING

import pytest

from tests.netns.faults.invariants import check, judge, wait_whole
from tests.netns.faults.mesh import AGENT_ARGS, make_mesh
from tests.netns.faults.observation import PREFIX, Agent, observe
from tests.netns.mesh import address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from meshnet.lab.commands import Namespace
    from meshnet.lab.topology import Lab
    from tests.netns.faults.mesh import FaultMesh, Member

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root

RED, BLUE = 4097, 4098
"""VNIs of the networks of a fault mesh, in the order that they are made."""


class Damages:
    """Does damage, and says which was not seen, or seen as something else."""

    def __init__(self, mesh: FaultMesh) -> None:
        self.mesh = mesh
        self.h1, self.h2 = mesh.lab.host("h1"), mesh.lab.host("h2")
        self.wrong: list[str] = []
        self._known = set(check(mesh))
        self._undo: list[Callable[[], object]] = []
        self._done: dict[str, tuple[str, ...]] = {}

    def member(self, host: str, network: str) -> Member:
        return next(m for m in self.mesh.members if (m.host, m.network) == (host, network))

    def see(self, what: str, *patterns: str, about: str = "") -> None:
        """Damage was done: exactly these sentences must tell it.

        Args:
            about: what sentences begin with that count.
        """
        found = (s for s in check(self.mesh) if s not in self._known)
        sentences = [s for s in found if s.startswith(about)]
        self.wrong += compare(what, sentences, patterns)

    def on(self, place: Namespace, do: str, undo: str, *patterns: str) -> None:
        """Damage a kernel with a command, until the next `look`."""
        place.run(do.split())
        self._undo.append(lambda: place.run(undo.split()))
        self._done[do] = patterns

    def in_etcd(self, key: str, value: str | None, *patterns: str) -> None:
        """Put a value, or delete a key, until the next `look`."""
        ctl = self.mesh.lab.etcd.ctl
        before = ctl("get", "--print-value-only", PREFIX + key).rstrip("\n")
        ctl(*(("put", PREFIX + key, value) if value is not None else ("del", PREFIX + key)))
        self._undo.append(
            lambda: ctl(*(("put", PREFIX + key, before) if before else ("del", PREFIX + key)))
        )
        self._done[f"{key} = {value}"] = patterns

    def look(self, about: str = "") -> None:
        """See what was done since the last `look`, and undo it; see `see`."""
        self.see(
            "; ".join(self._done),
            *(p for patterns in self._done.values() for p in patterns),
            about=about,
        )
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._done.clear()


def compare(what: str, sentences: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Which pattern matches no sentence, and which sentence no pattern."""
    found, wanted = list(sentences), list(patterns)
    return [
        *(
            f"{what}: nothing says {pattern!r}"
            for pattern in wanted
            if not any(re.search(pattern, s) for s in found)
        ),
        *(
            f"{what}: says also: {sentence}"
            for sentence in found
            if not any(re.search(p, sentence) for p in wanted)
        ),
    ]


def test_damage_is_seen(make_lab: MakeLab) -> None:
    mesh = make_mesh(make_lab(hosts=2, agent_args=AGENT_ARGS))
    assert wait_whole(mesh, 10) < 10
    wrong = damage_answers(mesh)
    for host in mesh.lab.hosts:
        host.stop_agent()
    damages = Damages(mesh)
    assert any("agent of h1 cannot be read" in s for s in check(mesh))
    damage_routing(damages)
    damage_links(damages)
    damage_firewall(damages)
    damage_endpoints(damages)
    damage_subnets(damages)
    damage_records(damages)
    damage_disks(damages)
    damage_book(damages)
    damages.see("all is undone")
    wrong += damages.wrong
    assert not wrong, "\n".join(wrong)
    with pytest.raises(AssertionError, match="agent of h1 cannot be read"):
        wait_whole(mesh, 0)


def damage_routing(damages: Damages) -> None:
    """Everything that leads to a peer: route, nexthop object, neighbour, FDB entry."""
    there = address_of(damages.member("h2", "red").document)
    subnet = str(ip_network(f"{there}/24", strict=False))
    peer, other = subnet.removesuffix("/24"), "10.255.1.2"
    mac = "02:6d:" + damages.member("h2", "red").document["mac"][6:-2] + "00"
    here = address_of(damages.member("h1", "red").document).rpartition(".")[0] + ".1"
    row = damages.h1.run(["ip", "route", "show", subnet]).stdout.split()
    nhid = row[row.index("nhid") + 1]
    lost = r"endpoint 10\.42\S* of red on h1 does not reach 10\.42"
    route = f"{subnet} nhid {nhid} proto 109 src {here}"
    on, h1 = damages.on, damages.h1
    on(h1, f"ip route del {subnet}", f"ip route add {route}", "h1: route is missing", lost)
    damages.look()
    on(
        h1,
        f"ip route replace {subnet} via {peer} dev mnv{RED} onlink proto 109 src {here}",
        f"ip route replace {route}",
        "h1: route is missing",
        "h1: route without an owner: .* without a nexthop object",
    )
    damages.look()
    on(
        h1,
        f"ip route replace unreachable {subnet} proto 109",
        f"ip route replace {route}",
        "h1: route is missing",
        "h1: route without an owner: unreachable 10.42",
        lost,
    )
    damages.look()
    on(
        h1,
        f"ip route append {subnet} nhid {nhid} proto 109 src {here} table 7",
        f"ip route del {subnet} table 7",
        "h1: route without an owner: .* in table 7",
    )
    on(
        h1,
        f"ip route add 10.42.254.0/24 dev mnb{RED}",
        "ip route del 10.42.254.0/24",
        "h1: route without an owner: unicast 10.42.254.0/24",
    )
    on(
        h1,
        "ip route del unreachable 10.42.0.0/16",
        "ip route add unreachable 10.42.0.0/16 proto 109",
        "h1: route is missing: unreachable",
    )
    on(
        h1,
        f"ip nexthop add id 1828716999 via {peer} dev mnv{RED} onlink proto 109",
        "ip nexthop del id 1828716999",
        "h1: nexthop is there 2 times",
    )
    on(
        h1,
        "ip nexthop add id 1828716998 blackhole",
        "ip nexthop del id 1828716998",
        "h1: nexthop without an owner",
    )
    good = f"{peer} lladdr {mac} dev mnv{RED} nud permanent"
    on(
        h1,
        f"ip neigh replace {good.replace(mac, '02:6d:0a:2a:ff:00')}",
        f"ip neigh replace {good}",
        "h1: neighbour is missing",
        "h1: neighbour without an owner: .* at 02:6d:0a:2a:ff:00",
        lost,
    )
    damages.look()
    on(
        h1,
        f"ip neigh add 10.42.254.0 lladdr {mac} dev mnv{RED} nud permanent",
        f"ip neigh del 10.42.254.0 dev mnv{RED}",
        "h1: neighbour without an owner: 10.42.254.0",
    )
    fdb = f"{mac} dev mnv{RED} self permanent extern_learn dst"
    on(
        h1,
        f"bridge fdb replace {fdb} 10.255.1.77",
        f"bridge fdb replace {fdb} {other}",
        "h1: FDB entry is missing",
        "h1: FDB entry without an owner: .* at 10.255.1.77",
        lost,
        r"endpoint fd00\S* of red on h1 does not reach fd00",
    )
    damages.look()
    on(
        h1,
        f"bridge fdb add 02:6d:0a:2a:ff:00 dev mnv{RED} self permanent dst {other}",
        f"bridge fdb del 02:6d:0a:2a:ff:00 dev mnv{RED} self",
        "h1: FDB entry without an owner: 02:6d:0a:2a:ff:00",
    )
    damages.look()


def damage_links(damages: Damages) -> None:
    """Links, addresses, and what bridges believe."""
    on, h1 = damages.on, damages.h1
    red, blue = damages.member("h1", "red"), damages.member("h1", "blue")
    link = f"mne{red.document['id']}"
    address = ip_interface(red.document["address"]).network[77]
    on(h1, "ip link add mnb9999 type bridge", "ip link del mnb9999", "link .* owner: .*mnb9999")
    on(
        h1,
        "ip link add mne0123456789ab type veth peer name mnx",
        "ip link del mnx",
        "h1: link without an owner: veth mne0123456789ab",
        "h1: link without an owner: veth mnx",
    )
    on(
        h1,
        f"ip link set mnb{BLUE} mtu 1400",
        f"ip link set mnb{BLUE} mtu 1450",
        f"h1: link is missing: bridge mnb{BLUE} .* 1450",
        f"h1: link without an owner: bridge mnb{BLUE} .* 1400",
    )
    on(
        h1,
        f"ip link set mnv{RED} type vxlan learning",
        f"ip link set mnv{RED} type vxlan nolearning",
        f"h1: link is missing: vxlan mnv{RED} .* nolearning",
        f"h1: link without an owner: vxlan mnv{RED}",
    )
    on(
        h1,
        f"bridge link set dev {link} hairpin off",
        f"bridge link set dev {link} hairpin on",
        f"h1: link is missing: veth {link}",
        f"h1: link without an owner: veth {link}",
    )
    on(
        h1,
        f"ip address add {address}/24 dev mnb{RED}",
        f"ip address del {address}/24 dev mnb{RED}",
        "h1: address without an owner",
    )
    taken = address_of(blue.document)
    on(
        h1,
        f"ip address add {taken}/32 dev lo",
        f"ip address del {taken}/32 dev lo",
        f"address {taken} is at .*lo of host h1",
        f"endpoint {taken} of blue on h1 does not reach",
        f"does not reach {taken}",
    )
    on(
        h1,
        f"bridge fdb add 02:65:00:00:00:01 dev {link} master static",
        f"bridge fdb del 02:65:00:00:00:01 dev {link} master",
        "h1: 02:65:00:00:00:01 is believed behind",
    )
    on(
        h1,
        f"ip neigh replace {address_of(red.document)} lladdr 02:65:00:00:00:01 dev mnb{RED} "
        "nud reachable",
        f"ip neigh del {address_of(red.document)} dev mnb{RED}",
        "h1: 10.42.* is believed at 02:65:00:00:00:01",
        r"on h2 does not reach 10\.42\S* of red on h1",
    )
    damages.look()


def damage_firewall(damages: Damages) -> None:
    """Elements, rules and tables."""
    on, h1 = damages.on, damages.h1
    red = damages.member("h1", "red")
    link, mac = f"mne{red.document['id']}", red.document["mac"]
    source = f"bridge meshnet sources4 {{ {link} . {mac} . {address_of(red.document)} }}"
    member = "inet meshnet members4 { 10.255.1.2 }"
    stranger = "inet meshnet members4 { 10.255.1.9 }"
    port = "inet meshnet published4 { tcp . 80 : 10.42.0.9 . 80 }"
    element = "h1: element without an owner: inet"
    on(
        h1,
        f"nft delete element {source}",
        f"nft add element {source}",
        "h1: element is missing: bridge sources4",
        r"endpoint 10\.42\S* of red on h1 does not reach",
    )
    on(
        h1,
        f"nft delete element {member}",
        f"nft add element {member}",
        "h1: element is missing: inet members4: 10.255.1.2",
        "on h2 does not reach .* on h1",
    )
    on(
        h1,
        f"nft add element {stranger}",
        f"nft delete element {stranger}",
        f"{element} members4: 10.255.1.9",
    )
    on(
        h1,
        f"nft add element {port}",
        f"nft delete element {port}",
        f"{element} published4: tcp 80 10.42.0.9 80",
    )
    damages.look()
    text = h1.run(["nft", "list", "ruleset"]).stdout
    h1.run(["nft", "insert", "rule", "inet", "meshnet", "forward", "accept"])
    damages.see(
        "a rule that lets everything pass",
        "kernel of h1, not of all hosts, has 1 × rule .*accept",
        r"10\.43\S* of blue on h\d got a packet of 10\.42\S*, which is of another network",
        r"10\.42\S* of red on h\d got a packet of 10\.43\S*, which is of another network",
    )
    h1.run(["nft", "delete", "table", "bridge", "meshnet"])
    h1.run(["nft", "flush", "chain", "inet", "meshnet", "forward"])
    damages.see(
        "a table and a chain's rules gone",
        "h1: table is missing: bridge meshnet",
        "h1: element is missing: bridge sources4",
        "h1: element is missing: bridge sources6",
        "h1: element is missing: bridge targets6",
        "kernel of h2, not of all hosts, has 1 × chain .*from_arp",
        "kernel of h2, not of all hosts, has 1 × rule .*forward",
        "kernel of h2, not of all hosts",
        "which is of another network",
    )
    h1.run(["nft", "-f", "-"], input_text=f"flush ruleset\n{text}")


def damage_endpoints(damages: Damages) -> None:
    """Inside an endpoint's namespace."""
    red, blue = damages.member("h1", "red"), damages.member("h1", "blue")
    on, inside, gateway = damages.on, red.container, red.document["gateway"]
    taken = address_of(blue.document)
    on(
        inside,
        f"ip address add {taken}/32 dev lo",
        f"ip address del {taken}/32 dev lo",
        f"address {taken} is at .*of process .* and .*of process",
    )
    on(
        inside,
        "ip route del default",
        f"ip route add default via {gateway} proto static",
        r"endpoint 10\.42\S* of red on h1: route is missing",
        r"endpoint 10\.42\S* of red on h1 does not reach",
    )
    on(
        inside,
        f"ip route add 192.0.2.0/24 via {gateway}",
        "ip route del 192.0.2.0/24",
        "of red on h1: route without an owner",
    )
    on(
        inside,
        "ip link add br9 type bridge",
        "ip link del br9",
        "of red on h1: link without an owner: bridge br9",
    )
    on(
        inside,
        "ip link set eth0 mtu 1300",
        "ip link set eth0 mtu 1450",
        "of red on h1: link is missing",
        "of red on h1: link without an owner: veth eth0 .* mtu 1300",
    )
    on(
        inside,
        "ip address add 10.42.9.9/24 dev eth0",
        "ip address del 10.42.9.9/24 dev eth0",
        "of red on h1: address without an owner: 10.42.9.9",
    )
    damages.look()


def damage_subnets(damages: Damages) -> None:
    """Who owns what; that kernels lack what etcd wants of them then is said as well."""
    etcd, ctl = damages.in_etcd, damages.mesh.lab.etcd.ctl
    h1, h2 = '{"v":1,"host":"h1"}', '{"v":1,"host":"h2"}'
    keys = ctl("get", "--prefix", "--keys-only", f"{PREFIX}mesh/subnets/red/10.42").split()
    key = keys[0].removeprefix(PREFIX)
    there = ctl("get", "--print-value-only", PREFIX + key).strip()
    red = json.loads(ctl("get", "--print-value-only", f"{PREFIX}mesh/networks/red"))
    etcd("mesh/subnets/red/10.42.254.0-24", h1, "host h1 has 3 subnets of red 10.42")
    etcd(
        "mesh/subnets/red/10.44.0.0-24",
        h1,
        "subnet 10.44.0.0/24 of h1 is no part of network red",
    )
    etcd(
        "mesh/subnets/red/10.42.253.0-24",
        '{"v":1,"host":"h9"}',
        "subnet 10.42.253.0/24 of red is of host h9, which is gone",
    )
    etcd("mesh/subnets/yellow/10.45.0.0-24", h1, "is of network yellow, which is gone")
    etcd(
        "mesh/networks/green",
        json.dumps({**red, "name": "green", "subnets": ["10.43.64.0/18"]}),
        "VNI 4097 is of 2 networks",
        "network blue 10.43.0.0/16 overlaps green 10.43.64.0/18",
        "host h1 has 0 subnets of green",
        "host h2 has 0 subnets of green",
    )
    damages.look(about="etcd")
    etcd(
        "mesh/subnets/red/10.42.0.0-17",
        h2,
        "subnet 10.42.0.0/17 of h2 is no part of network red",
        "host h2 has 2 subnets of red",
        "overlaps",
    )
    etcd("mesh/networks/blue", None, "network blue, which is gone", "network blue of .* is gone")
    damages.look(about="etcd")
    etcd(
        key,
        h2 if there == h1 else h1,
        "host h[12] has 2 subnets of red",
        "host h[12] has 0 subnets of red",
        r"endpoint 10\.42\S* of red on h\d: 10\.42\S* is not of its host's subnet",
    )
    damages.look(about="etcd")


def damage_records(damages: Damages) -> None:
    """Keys of hosts and endpoints."""
    etcd, ctl = damages.in_etcd, damages.mesh.lab.etcd.ctl
    red, blue = damages.member("h1", "red").document, damages.member("h1", "blue").document
    key = f"endpoints/red/h1/{red['id']}"
    record = json.loads(ctl("get", "--print-value-only", PREFIX + key))
    changed = {"addresses": ["10.42.9.9/24"], "mac": "02:65:00:00:00:09", "mtu": 1400}
    lost = f"endpoints/blue/h1/{blue['id']}"
    etcd(lost, None, f"key is missing: {lost}")
    etcd(
        key,
        json.dumps({**record, **changed}),
        *(f"endpoint .* of red on h1: record has {name}" for name in changed),
    )
    etcd("endpoints/red/h1/0123456789ab", "{}", "key without an owner: endpoints/red/h1/0123")
    etcd("endpoints/red/h9/0123456789ab", "{}", "key without an owner: endpoints/red/h9")
    etcd("nobody/knows", "it", "key without an owner: nobody/knows")
    etcd("mesh/hosts/h9", '{"v":1}', "key without an owner: mesh/hosts/h9")
    etcd("mesh/hosts/h2", None, "key is missing: mesh/hosts/h2")
    etcd("mesh/hosts/h1", '{"v":1,"underlay_ip":"10.255.1.9"}', "host h1 is not at 10.255.1.1")
    etcd(
        "mesh/alive/h1",
        '{"v":1,"instance":"another","underlay_ip":"10.255.1.1"}',
        "mesh/alive/h1 hangs on lease 0",
        "h1 is claimed by",
    )
    damages.look(about="etcd")
    etcd("mesh/networks/red", '{"v":1,"mode":"no-mode"}', "its networks cannot be understood")
    damages.look()
    damages.see("all keys are back")


def damage_disks(damages: Damages) -> None:
    document = damages.member("h1", "red").document
    state = damages.h1.state_dir
    file = state / "endpoints" / f"{document['id']}.json"
    kept = file.read_text()
    file.unlink()
    damages.see("a record deleted", "disk of h1: file is missing")
    file.write_text(kept[:-5])
    damages.see("a record cut short", "disk of h1: .* is no JSON")
    file.write_text(kept.replace(document["mac"], "02:65:00:00:00:09"))
    damages.see("a record changed", "disk of h1: .* has mac")
    file.write_text(kept)
    left = [file.with_name("0123456789ab.draft"), file.with_suffix(".bad"), state / "mesh.bad"]
    for path in left:
        path.touch()
    damages.see(
        "files left over",
        "disk of h1: file without an owner: 0123456789ab.draft",
        "disk of h1: file without an owner: .*bad",
        "disk of h1: mesh.bad is there",
    )
    for path in left:
        path.unlink()
    mesh = state / "mesh.json"
    kept = mesh.read_text()
    mesh.write_text('{"id":"another","revision":1}')
    damages.see("another mesh", "disk of h1: mesh another is not etcd's")
    mesh.unlink()
    damages.see("no mesh", "disk of h1 cannot be read")
    mesh.write_text(kept)


def damage_book(damages: Damages) -> None:
    """A member too many is one that was lost; one too few has left everything over."""
    members = damages.mesh.members
    twin = dataclasses.replace(members[0])
    members.append(twin)
    damages.see(
        "a member twice",
        "was given 2 times",
        f"is missing: .*{twin.document['id']}",
        "does not have its address: .*in use",
    )
    members.remove(twin)
    lost = members.pop()
    where = f"kernel of {lost.host}"
    damages.see(
        "a member removed from the book alone",
        f"etcd: key without an owner: endpoints/{lost.network}/{lost.host}",
        f"disk of {lost.host}: file without an owner",
        f"{where}: link without an owner: veth mne",
        f"{where}: element without an owner: bridge sources4",
        f"{where}: element without an owner: bridge sources6",
        f"{where}: element without an owner: bridge targets6",
        f"{where}: {lost.document['mac']} is believed behind",
    )
    members.append(lost)


def damage_answers(mesh: FaultMesh) -> list[str]:
    """What an agent may say, with everything else whole."""
    seen = observe(mesh)
    whole = seen.agents["h1"]
    wrong: list[str] = []

    def say(what: str, change: Callable[[Agent], object], *patterns: str) -> None:
        answer = copy.deepcopy(whole)
        change(answer)
        seen.agents["h1"] = answer
        wrong.extend(compare(what, judge(mesh, seen), patterns))

    def status(key: str, value: object) -> Callable[[Agent], object]:
        return lambda agent: agent.status.update({key: value})

    def network(key: str, value: object) -> Callable[[Agent], object]:
        return lambda agent: agent.status["networks"][0].update({key: value})

    say("nothing", lambda _: None)
    say("another host", status("host", {"id": "h2"}), "agent of h1: is .*h2")
    for store in ({"connected": False, "error": None}, {"connected": True, "error": "slow"}):
        say(f"store {store}", status("store", store), "agent of h1: store")
    for key in ("bad_values", "errors", "set_aside"):
        say(key, status(key, ["something"]), f"agent of h1: {key}: ..something")
    for key, value in {
        "in_sync": False,
        "pending": 1,
        "errors": ["x"],
        "fallen": ["h2"],
        "peers": 0,
        "endpoints": 2,
    }.items():
        say(key, network(key, value), f"agent of h1: network red: {key} is")
    say("a network lost", lambda a: a.status["networks"].pop(), "h1: network is missing: blue")
    say(
        "a dead host",
        lambda a: a.hosts[1].update(alive=False),
        "h1: host is missing: h2 10.255.1.2 alive",
        "h1: host without an owner: h2 10.255.1.2 dead",
    )
    say("a host lost", lambda a: a.hosts.pop(), "h1: host is missing: h2")
    say("a subnet", lambda a: a.hosts[1]["subnets"].pop("red"), "h1: subnets of h2 are")
    say("a subnet of IPv6", lambda a: a.hosts[1]["subnets6"].pop("red"), "h1: subnets6 of h2 are")
    say("an endpoint lost", lambda a: a.endpoints.pop(), "h1: endpoint is missing: address=")
    say(
        "an endpoint twice",
        lambda a: a.endpoints.append(a.endpoints[0]),
        "h1: endpoint is there 2 times: address=",
    )
    seen.agents["h1"] = dataclasses.replace(whole, warning="not all of them")
    wrong += compare("a warning", judge(mesh, seen), ["agent of h1: endpoints: not all of them"])
    return wrong
