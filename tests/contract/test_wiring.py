"""What every `Wiring` does: the fake in memory and Linux itself, by the same tests."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import threading
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import pytest

from meshnet.diff import diff
from meshnet.errors import ConflictError, KernelRefusedError, NotFoundError
from meshnet.firewall import UNKNOWN
from meshnet.firewall.elements import source_elements
from meshnet.firewall.rules import COUNTERS
from meshnet.kernel import EndpointWiring
from meshnet.kernel.fakes.wiring import MemoryWiring, NamespaceLink
from meshnet.kernel.netns import netns_id
from meshnet.kernel.wiring import NetlinkWiring
from meshnet.sandbox import NetnsId
from meshnet.state import Ruleset, endpoint_link_name
from meshnet.tables import Op, Table
from meshnet.wire.mtu import DEFAULT_GSO_MAX_BYTES
from tests.contract.hosts import (
    UNDERLAY_DEV,
    Inside,
    MemoryHost,
    RealHost,
    host_namespace,
    ip,
    namespace,
)
from tests.values import IPV4, IPV6, make_endpoint, make_network, make_snapshot, plan_for
from tests.values import underlay_ip as host_ip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from meshnet.kernel import Kernel, Wiring
    from meshnet.kernel.elements import WiredElements
    from meshnet.model import Endpoint
    from meshnet.state import KernelState

T = TypeVar("T")
ETH_P_ALL = 3
BRIDGE = "mnb4097"
NETWORK = make_network(subnets=(IPV4, IPV6))
CIDRS = NETWORK.subnets
DUAL = ("10.42.0.2/24", "fd00:42::2/64")


class View(NamedTuple):
    """A namespace as `ip` shows it: by link its MAC, MTU and addresses; gateways by destination."""

    links: dict[str, tuple[str, int, frozenset[str]]]
    routes: dict[str, str]


class Wired(Protocol):
    """A host with a bridge, a namespace to attach, and what a test needs to do to both."""

    kernel: Kernel
    wiring: Wiring
    netns_fd: int

    @property
    def known(self) -> WiredElements:
        """What it told the kernel about endpoints; a new process begins without."""
        ...

    def view(self) -> View: ...

    def gso_max_bytes(self, link: str) -> int:
        """The largest super-packet that a link in the namespace takes."""
        ...

    def add_link(self, name: str, address: str, gateway: str = "") -> None:
        """Add somebody else's link to the namespace; with a gateway, also the default route."""
        ...


class RealWired:
    def __init__(self, host: RealHost, host_fd: int, name: str, netns_fd: int) -> None:
        self.kernel = host.kernel
        self.netns_fd = netns_fd
        self.name = name
        self.host = host
        self._thread = Inside(host_fd, lambda: NetlinkWiring(host.wired))
        self.wiring: Wiring = self

    @property
    def known(self) -> WiredElements:
        return self.host.wired

    @property
    def writes(self) -> int:
        return self._thread.call(lambda w: w.writes)

    def connect(self, netns_fd: int, wiring: EndpointWiring) -> tuple[int, ...]:
        return self._thread.call(lambda w: w.connect(netns_fd, wiring))

    def lead_default(self, netns_fd: int, endpoint: Endpoint) -> tuple[int, ...]:
        return self._thread.call(lambda w: w.lead_default(netns_fd, endpoint))

    def disconnect(self, endpoint: Endpoint) -> None:
        self._thread.call(lambda w: w.disconnect(endpoint))

    def holds(self, netns_fd: int, endpoint: Endpoint) -> bool:
        return self._thread.call(lambda w: w.holds(netns_fd, endpoint))

    def remove_link(self, name: str) -> None:
        self._thread.call(lambda w: w.remove_link(name))

    def has_link(self, name: str) -> bool:
        return self._thread.call(lambda w: w.has_link(name))

    def list_endpoint_links(self) -> list[str]:
        return self._thread.call(lambda w: w.list_endpoint_links())

    def adopt(self, endpoint: Endpoint) -> None:
        self._thread.call(lambda w: w.adopt(endpoint))

    def drops(self) -> dict[str, int]:
        return self._thread.call(lambda w: w.drops())

    def close(self) -> None:
        self._thread.close(lambda w: w.close())

    def on_host(self, call: Callable[[], T]) -> T:
        """Call something in the host's namespace."""
        return self._thread.call(lambda _: call())

    def view(self) -> View:
        links = {
            link["ifname"]: (
                link["address"],
                link["mtu"],
                frozenset(
                    f"{a['local']}/{a['prefixlen']}"
                    for a in link["addr_info"]
                    if a["scope"] == "global"
                ),
            )
            for link in json.loads(ip("-n", self.name, "-j", "address"))
            if link["ifname"] != "lo"
        }
        routes = {}
        for family in ("-4", "-6"):
            for route in json.loads(ip("-n", self.name, family, "-j", "route")):
                if "gateway" in route:
                    default = "0.0.0.0/0" if family == "-4" else "::/0"
                    target = default if route["dst"] == "default" else route["dst"]
                    routes[target] = route["gateway"]
        return View(links, routes)

    def gso_max_bytes(self, link: str) -> int:
        (found,) = json.loads(ip("-n", self.name, "-d", "-j", "link", "show", "dev", link))
        # Linux 6.3 has one for IPv4 beside it.
        (size,) = {found["gso_max_size"], found.get("gso_ipv4_max_size", found["gso_max_size"])}
        return int(size)

    def add_link(self, name: str, address: str, gateway: str = "") -> None:
        ip("-n", self.name, "link", "add", name, "type", "veth", "peer", f"{name}p")
        for link in (name, f"{name}p"):
            ip("-n", self.name, "link", "set", link, "up")
        ip("-n", self.name, "address", "add", address, "dev", name, "nodad")
        if gateway:
            ip("-n", self.name, "route", "add", "default", "via", gateway)


class MemoryWired:
    def __init__(self, netns_fd: int) -> None:
        host = self._host = MemoryHost()
        self.kernel: Kernel = host.kernel
        self.memory = MemoryWiring(host.memory)
        self.wiring: Wiring = self.memory
        self.netns_fd = netns_fd

    def view(self) -> View:
        links = self.memory.namespace(self.netns_fd)
        return View(
            {
                name: (link.mac.hex(":"), link.mtu_bytes, frozenset(map(str, link.addresses)))
                for name, link in links.items()
            },
            {str(t): str(g) for link in links.values() for t, g in link.routes.items()},
        )

    @property
    def known(self) -> WiredElements:
        return self._host.memory.wired

    def gso_max_bytes(self, link: str) -> int:
        return self.memory.namespace(self.netns_fd)[link].gso_max_bytes

    def add_link(self, name: str, address: str, gateway: str = "") -> None:
        routes = {ip_network("0.0.0.0/0"): ip_address(gateway)} if gateway else {}
        links = self.memory.namespace(self.netns_fd)
        links[name] = NamespaceLink(addresses=(ip_interface(address),), routes=routes)


@pytest.fixture(params=["memory", pytest.param("linux", marks=pytest.mark.root)])
def wired(request: pytest.FixtureRequest, tmp_path: Path, nothing_left: None) -> Iterator[Wired]:
    if request.param == "memory":
        netns_fd = os.open(tmp_path / "netns", os.O_CREAT | os.O_RDONLY)
        try:
            memory = MemoryWired(netns_fd)
            _bring_up(memory.kernel, desired_for(memory.kernel))
            yield memory
        finally:
            os.close(netns_fd)
        return
    request.getfixturevalue("root")
    with _real(tmp_path) as real:
        yield real


@pytest.fixture
def linux(root: None, tmp_path: Path, nothing_left: None) -> Iterator[RealWired]:
    with _real(tmp_path) as real:
        yield real


@contextlib.contextmanager
def _real(directory: Path) -> Iterator[RealWired]:
    with host_namespace() as (host_name, host_fd), namespace() as (name, netns_fd):
        host = RealHost(host_name, host_fd, directory)
        try:
            _bring_up(host.kernel, desired_for(host.kernel))
            real = RealWired(host, host_fd, name, netns_fd)
            try:
                yield real
            finally:
                real.close()
        finally:
            host.close()


def desired_for(kernel: Kernel, *endpoints: Endpoint) -> KernelState:
    underlay = kernel.observe(host_ip(1), None)
    return plan_for(make_snapshot([NETWORK], 1), underlay, endpoints=endpoints).state


def _bring_up(kernel: Kernel, desired: KernelState) -> None:
    assert kernel.apply(diff(desired, kernel.dump())) == []


def wiring_of(endpoint: Endpoint, bridge: str = BRIDGE) -> EndpointWiring:
    return EndpointWiring(endpoint=endpoint, uplink=bridge, routes=CIDRS)


def assert_nothing_left(wired: Wired, before: View) -> None:
    assert wired.view() == before
    assert wired.wiring.list_endpoint_links() == []
    assert diff(desired_for(wired.kernel), wired.kernel.dump()) == []  # nor in the firewall


def test_connect_and_disconnect(wired: Wired) -> None:
    before = wired.view()
    endpoint = make_endpoint(DUAL)
    assert wired.wiring.connect(wired.netns_fd, wiring_of(endpoint)) == (4, 6)
    assert wired.view() == View(
        {"eth0": (endpoint.mac.hex(":"), 1450, frozenset(DUAL))},
        {"0.0.0.0/0": "10.42.0.1", "::/0": "fd00:42::1"},
    )
    assert wired.wiring.list_endpoint_links() == ["mne0123456789ab"]
    assert wired.wiring.has_link("mne0123456789ab")
    assert wired.wiring.has_link(BRIDGE)
    assert not wired.wiring.has_link("none0")
    assert diff(desired_for(wired.kernel, endpoint), wired.kernel.dump()) == []
    assert wired.wiring.writes > 0
    for _ in range(2):  # idempotent
        wired.wiring.disconnect(endpoint)
        assert_nothing_left(wired, before)


def test_links_of_the_host(wired: Wired) -> None:
    endpoint = make_endpoint(DUAL)
    own = endpoint_link_name(endpoint.id)
    assert wired.wiring.has_link(UNDERLAY_DEV)
    assert wired.wiring.has_link(BRIDGE)
    assert not wired.wiring.has_link(own)
    wired.wiring.connect(wired.netns_fd, wiring_of(endpoint))
    assert wired.wiring.has_link(own)
    wired.wiring.disconnect(endpoint)
    assert not wired.wiring.has_link(own)
    assert wired.kernel.apply([Op(Table.LINK, BRIDGE, None, True)]) == []
    assert not wired.wiring.has_link(BRIDGE)
    assert not wired.wiring.has_link("a-name-that-no-link-can-have")


def test_an_endpoint_that_an_earlier_agent_connected(wired: Wired) -> None:
    endpoint = make_endpoint(DUAL)
    wired.wiring.connect(wired.netns_fd, wiring_of(endpoint))
    desired = desired_for(wired.kernel, endpoint)
    wired.known.remove(source_elements(endpoint))
    writes = wired.wiring.writes
    wired.wiring.adopt(endpoint)
    assert wired.wiring.writes == writes
    # A load that was planned without the endpoint does not cut it off.
    without = desired_for(wired.kernel)
    load = Op(
        Table.FIREWALL, "meshnet", Ruleset(without.firewall or UNKNOWN, without.elements), False
    )
    assert wired.kernel.apply([load]) == []
    assert diff(desired, wired.kernel.dump()) == []


def test_an_endpoint_is_connected_also_where_somebody_deleted_the_tables(wired: Wired) -> None:
    assert wired.kernel.apply([Op(Table.FIREWALL, "meshnet", None, True)]) == []
    assert wired.wiring.drops() == {}
    endpoint = make_endpoint(DUAL)
    wired.wiring.connect(wired.netns_fd, wiring_of(endpoint))
    without = desired_for(wired.kernel)
    assert wired.kernel.apply(diff(without, wired.kernel.dump())) == []
    assert diff(desired_for(wired.kernel, endpoint), wired.kernel.dump()) == []
    assert wired.wiring.drops() == dict.fromkeys(COUNTERS, 0)


def test_a_second_endpoint_does_not_steal_the_default_route(wired: Wired) -> None:
    wired.add_link("up0", "10.1.0.2/24", "10.1.0.1")
    endpoint = make_endpoint(DUAL, ifname="mesh0")
    # Each IP version for itself.
    assert wired.wiring.connect(wired.netns_fd, wiring_of(endpoint)) == (6,)
    routes = wired.view().routes
    assert routes == {"0.0.0.0/0": "10.1.0.1", IPV4: "10.42.0.1", "::/0": "fd00:42::1"}


def test_the_default_route_is_handed_on(wired: Wired) -> None:
    first = make_endpoint(DUAL)
    second = make_endpoint(("10.42.0.3/24", "fd00:42::3/64"), identity="b" * 12, ifname="eth1")
    unwilling = replace(second, default_route=False)
    for endpoint, versions in ((first, (4, 6)), (second, ())):
        wiring = wiring_of(endpoint)._replace(routes=())
        assert wired.wiring.connect(wired.netns_fd, wiring) == versions
    assert wired.wiring.lead_default(wired.netns_fd, second) == ()
    wired.wiring.disconnect(first)
    assert wired.wiring.lead_default(wired.netns_fd, unwilling) == ()
    assert wired.view().routes == {}
    assert wired.wiring.lead_default(wired.netns_fd, second) == (4, 6)
    assert wired.view().routes == {"0.0.0.0/0": "10.42.0.1", "::/0": "fd00:42::1"}
    with pytest.raises(KernelRefusedError):
        wired.wiring.lead_default(wired.netns_fd, replace(second, ifname="none0"))


def test_no_default_route_if_none_is_wanted(wired: Wired) -> None:
    endpoint = make_endpoint(default_route=False)
    assert wired.wiring.connect(wired.netns_fd, wiring_of(endpoint)) == ()
    assert wired.view().routes == {IPV4: "10.42.0.1"}


@pytest.mark.parametrize("addresses", [DUAL[:1], DUAL[1:]])
def test_one_ip_version(wired: Wired, addresses: tuple[str, ...]) -> None:
    endpoint = make_endpoint(addresses)
    assert wired.wiring.connect(wired.netns_fd, wiring_of(endpoint))
    view = wired.view()
    assert view.links["eth0"][2] == set(addresses)
    assert list(view.routes.values()) == [str(endpoint.gateways[0])]


def test_two_endpoints_of_one_namespace(wired: Wired) -> None:
    first = make_endpoint()
    second = make_endpoint(("10.43.0.2/24",), identity="ba9876543210", ifname="eth1")
    other = wiring_of(second)._replace(routes=[ip_network("10.43.0.0/16")])
    assert wired.wiring.connect(wired.netns_fd, wiring_of(first)) == (4,)
    assert wired.wiring.connect(wired.netns_fd, other) == ()
    assert sorted(wired.wiring.list_endpoint_links()) == ["mne0123456789ab", "mneba9876543210"]
    wired.wiring.disconnect(first)
    view = wired.view()
    assert view.links.keys() == {"eth1"}
    assert view.routes == {"10.43.0.0/16": "10.43.0.1"}
    wired.wiring.remove_link("mneba9876543210")
    assert wired.wiring.list_endpoint_links() == []


@pytest.mark.parametrize("wanted", [None, 61_842])
def test_how_large_a_super_packet_may_be(wired: Wired, wanted: int | None) -> None:
    wiring = wiring_of(make_endpoint())._replace(gso_max_bytes=wanted)
    wired.wiring.connect(wired.netns_fd, wiring)
    assert wired.gso_max_bytes("eth0") == (wanted or DEFAULT_GSO_MAX_BYTES)


def test_the_name_of_the_link_is_taken(wired: Wired) -> None:
    wired.add_link("eth0", "10.1.0.2/24")
    before = wired.view()
    with pytest.raises(ConflictError, match="eth0"):
        wired.wiring.connect(wired.netns_fd, wiring_of(make_endpoint()))
    assert_nothing_left(wired, before)


@pytest.mark.parametrize("address", DUAL)
def test_the_namespace_holds_the_address(wired: Wired, address: str) -> None:
    wired.add_link("other0", address)
    before = wired.view()
    with pytest.raises(ConflictError, match="address"):
        wired.wiring.connect(wired.netns_fd, wiring_of(make_endpoint(DUAL)))
    assert_nothing_left(wired, before)


def test_the_bridge_is_gone(wired: Wired) -> None:
    before = wired.view()
    with pytest.raises(NotFoundError, match="mnb77"):
        wired.wiring.connect(wired.netns_fd, wiring_of(make_endpoint(), "mnb77"))
    assert_nothing_left(wired, before)


def test_what_is_changed_of_an_endpoint_link_is_mended(linux: RealWired) -> None:
    endpoint = make_endpoint(DUAL)
    linux.wiring.connect(linux.netns_fd, wiring_of(endpoint))
    link = "mne0123456789ab"
    desired = desired_for(linux.kernel, endpoint)
    for change in (
        ("link", "set", link, "nomaster"),
        ("link", "set", link, "type", "bridge_slave", "hairpin", "off"),
        ("link", "set", link, "down"),
        ("link", "set", link, "mtu", "1300"),
        ("link", "del", BRIDGE),
    ):
        ip("-n", linux.host.name, *change)
        found = diff(desired, linux.kernel.dump())
        assert {op.table for op in found} <= {Table.LINK, Table.ADDRESS}
        assert found
        assert linux.kernel.apply(found) == []
        assert diff(desired, linux.kernel.dump()) == []
        (port,) = json.loads(ip("-n", linux.host.name, "-d", "-j", "link", "show", link))
        assert port["linkinfo"]["info_slave_data"]["hairpin"] is True


def test_the_settings_of_an_endpoint(linux: RealWired) -> None:
    linux.wiring.connect(linux.netns_fd, wiring_of(make_endpoint(DUAL)))
    in_namespace = ("ip", "netns", "exec", linux.name)
    for setting in ("accept_ra", "accept_dad"):
        path = f"/proc/sys/net/ipv6/conf/eth0/{setting}"
        assert subprocess.check_output([*in_namespace, "cat", path]) == b"0\n"
    addresses = json.loads(ip("-n", linux.name, "-j", "-6", "address", "show", "dev", "eth0"))
    (mine,) = [a for a in addresses[0]["addr_info"] if a["scope"] == "global"]
    assert mine["nodad"] is True
    assert "tentative" not in mine
    # The host's end is a port of the bridge, and so gets no address.
    assert ip("-n", linux.host.name, "-6", "address", "show", "dev", "mne0123456789ab") == ""
    for gateway in ("10.42.0.1", "fd00:42::1"):
        ping = [*in_namespace, "ping", "-c", "1", "-W", "5", gateway]
        subprocess.run(ping, check=True, stdout=subprocess.DEVNULL)


def test_a_namespace_that_is_not_one(linux: RealWired, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDONLY)
    try:
        with pytest.raises(Exception, match=os.strerror(errno.EINVAL)):
            linux.wiring.connect(fd, wiring_of(make_endpoint()))
    finally:
        os.close(fd)
    assert linux.wiring.list_endpoint_links() == []


def test_any_link_of_the_host_is_seen(wired: Wired) -> None:
    endpoint = make_endpoint(DUAL)
    wired.wiring.connect(wired.netns_fd, wiring_of(endpoint))
    for name in (BRIDGE, UNDERLAY_DEV, "mne0123456789ab"):
        assert wired.wiring.has_link(name)
    for name in ("eth7", "mne000000000000", ""):
        assert not wired.wiring.has_link(name)
    wired.wiring.disconnect(endpoint)
    assert not wired.wiring.has_link("mne0123456789ab")


# --- macvlans ------------------------------------------------------------------------------------


def on_wire(wired: Wired, addresses: tuple[str, ...] = DUAL, **changes: Any) -> Endpoint:  # noqa: ANN401
    """An endpoint that is a macvlan on the host's own link."""
    endpoint = make_endpoint(addresses, mtu_bytes=1400)
    sandbox = replace(endpoint.sandbox, netns=netns_id(wired.netns_fd))
    return replace(endpoint, parent=UNDERLAY_DEV, sandbox=sandbox, **changes)


def wire_of(endpoint: Endpoint, parent: str = UNDERLAY_DEV) -> EndpointWiring:
    return EndpointWiring(endpoint=endpoint, uplink=parent, routes=())


def test_a_macvlan_is_in_the_namespace_alone(wired: Wired) -> None:
    before, on_host = wired.view(), wired.kernel.dump().links
    endpoint = on_wire(wired)
    assert not wired.wiring.holds(wired.netns_fd, endpoint)
    assert wired.wiring.connect(wired.netns_fd, wire_of(endpoint)) == (4, 6)
    assert wired.view() == View(
        {"eth0": (endpoint.mac.hex(":"), 1400, frozenset(DUAL))},
        {"0.0.0.0/0": "10.42.0.1", "::/0": "fd00:42::1"},
    )
    assert wired.wiring.holds(wired.netns_fd, endpoint)
    assert not wired.wiring.holds(wired.netns_fd, replace(endpoint, mac=bytes(6)))
    assert wired.wiring.list_endpoint_links() == []
    assert wired.kernel.dump().links == on_host
    for _ in range(2):  # idempotent
        wired.wiring.disconnect(endpoint)
        assert_nothing_left(wired, before)
        assert not wired.wiring.holds(wired.netns_fd, endpoint)
    gone = replace(endpoint.sandbox, netns=NetnsId(1, 1))
    wired.wiring.disconnect(replace(endpoint, sandbox=gone))


def test_a_macvlan_without_a_gateway(wired: Wired) -> None:
    assert wired.wiring.connect(wired.netns_fd, wire_of(on_wire(wired, gateways=()))) == ()
    assert wired.view().routes == {}


def test_the_name_of_a_macvlan_is_taken(wired: Wired) -> None:
    wired.add_link("eth0", "10.1.0.2/24")
    before = wired.view()
    with pytest.raises(ConflictError, match="eth0"):
        wired.wiring.connect(wired.netns_fd, wire_of(on_wire(wired)))
    assert_nothing_left(wired, before)


def test_a_macvlan_whose_address_the_namespace_holds(wired: Wired) -> None:
    wired.add_link("other0", DUAL[1])
    before = wired.view()
    with pytest.raises(ConflictError, match="address"):
        wired.wiring.connect(wired.netns_fd, wire_of(on_wire(wired)))
    assert_nothing_left(wired, before)


def test_the_parent_is_gone(wired: Wired) -> None:
    before = wired.view()
    with pytest.raises(NotFoundError, match="eth77"):
        wired.wiring.connect(wired.netns_fd, wire_of(on_wire(wired), "eth77"))
    assert_nothing_left(wired, before)


def test_a_macvlan_that_was_renamed(linux: RealWired) -> None:
    endpoint = on_wire(linux)
    before = linux.view()
    linux.wiring.connect(linux.netns_fd, wire_of(endpoint))
    ip("-n", linux.name, "link", "set", "eth0", "down")
    ip("-n", linux.name, "link", "set", "eth0", "name", "phys0")
    assert linux.wiring.holds(linux.netns_fd, endpoint)
    linux.wiring.disconnect(endpoint)
    assert_nothing_left(linux, before)


def test_the_settings_of_a_macvlan(linux: RealWired) -> None:
    linux.wiring.connect(linux.netns_fd, wire_of(on_wire(linux)))
    for setting in ("accept_ra", "accept_dad"):
        path = f"/proc/sys/net/ipv6/conf/eth0/{setting}"
        argv = ["ip", "netns", "exec", linux.name, "cat", path]
        assert subprocess.check_output(argv) == b"0\n"
    (link,) = json.loads(ip("-n", linux.name, "-d", "-j", "link", "show", "dev", "eth0"))
    assert link["linkinfo"]["info_kind"] == "macvlan"
    assert link["linkinfo"]["info_data"]["mode"] == "bridge"


def test_what_the_wire_is_told(linux: RealWired) -> None:
    """Switches learn where the MAC is, neighbours whose the addresses are."""
    from scapy.layers.inet6 import ICMPv6ND_NA, IPv6, in6_chksum
    from scapy.layers.l2 import ARP, Ether

    endpoint = on_wire(linux)
    mac = endpoint.mac.hex(":")
    with linux.on_host(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)) as tap:
        linux.on_host(lambda: tap.bind((UNDERLAY_DEV, ETH_P_ALL)))
        tap.settimeout(5)
        linux.wiring.connect(linux.netns_fd, wire_of(endpoint))
        left = {4, 6}
        while left:
            frame = Ether(tap.recv(2000))
            if ARP in frame and frame[ARP].psrc == frame[ARP].pdst == "10.42.0.2":
                assert (frame.dst, frame.src) == ("ff:ff:ff:ff:ff:ff", mac)
                assert frame[ARP].hwsrc == mac
                left.discard(4)
            elif ICMPv6ND_NA in frame and frame[ICMPv6ND_NA].tgt == "fd00:42::2":
                assert (frame.src, frame[IPv6].dst, frame[IPv6].hlim) == (mac, "ff02::1", 255)
                assert in6_chksum(58, frame[IPv6], bytes(frame[IPv6].payload)) == 0  # type: ignore[no-untyped-call]
                left.discard(6)


def test_a_macvlan_waits_until_the_last_with_its_mac_is_gone(linux: RealWired) -> None:
    endpoint = on_wire(linux)
    host = linux.host.name
    mac = endpoint.mac.hex(":")
    ip("-n", host, "link", "add", "old0", "link", UNDERLAY_DEV, "address", mac, "type", "macvlan")
    ip("-n", host, "link", "set", "old0", "up")
    ending = threading.Timer(0.2, ip, ["-n", host, "link", "del", "old0"])
    ending.start()
    assert linux.wiring.connect(linux.netns_fd, wire_of(endpoint))
    ending.join()
    assert linux.wiring.holds(linux.netns_fd, endpoint)


def test_a_macvlan_whose_mac_somebody_keeps(
    linux: RealWired, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnet.kernel.wiring._MAC_TRIES", 2)
    endpoint = on_wire(linux)
    ip("-n", linux.host.name, "link", "set", UNDERLAY_DEV, "address", endpoint.mac.hex(":"))
    before = linux.view()
    with pytest.raises(KernelRefusedError, match="in use"):
        linux.wiring.connect(linux.netns_fd, wire_of(endpoint))
    assert_nothing_left(linux, before)
