"""A role for each host, by the commands of docs/etcd-layout.md: what its credentials can write."""

from __future__ import annotations

import re
import shlex
from contextlib import AsyncExitStack
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from meshnet.codec.endpoints import encode_endpoint
from meshnet.codec.hosts import encode_reservation
from meshnet.errors import PolicyRefusedError
from meshnet.model import Claim, Host, HostId, Reservation
from meshnet.store import Delete, DeletePrefix, Put
from meshnet.store.etcd import EtcdConfig
from meshnet.store.mirror import (
    ENDPOINTS,
    MESH_ID,
    NETWORKS_SERIAL,
    SUBNETS,
    alive_key,
    host_key,
    network_key,
    subnet_key,
)
from meshnet.store.registry import Registry
from tests.contract.certificates import client_flags, make_ca, make_certificate, server_flags
from tests.values import make_endpoint, make_network

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from meshnet.lab.etcd import EtcdServer
    from meshnet.model import IpNetwork
    from meshnet.store import Write

    from .conftest import Connect, StartEtcd

    RegistryOf = Callable[[str], Registry]

_DOCS = Path(__file__).parents[2] / "docs" / "etcd-layout.md"
_TTL_S = 60
H1, H2 = HostId("h1"), HostId("h2")
PROD = make_network()
FIRST, SECOND = (ip_network(f"10.42.{i}.0/24") for i in (1, 2))


def documented(heading: str) -> list[list[list[str]]]:
    """The etcdctl commands of a section, block by block."""
    section = _DOCS.read_text().partition(f"### {heading}\n")[2].partition("\n### ")[0]
    blocks = re.findall(r"```\n(# etcdctl .*?)```", section, re.DOTALL)
    return [[shlex.split(line)[2:] for line in block.splitlines()] for block in blocks]


ONCE, FOR_HOST, FOR_NETWORK, BY_HOSTS, BY_ADMIN = documented("A role for each host")


def run(server: EtcdServer, commands: list[list[str]], **names: str) -> None:
    """Run documented commands, with other names for those of the documentation."""
    for command in commands:
        text = "\0".join(command)
        for before, after in names.items():
            text = re.sub(rf"\b{before}\b", after, text)
        server.ctl(*text.split("\0"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("access")
    make_ca(directory, "ca")
    for name in ("server", "root", "meshnet-admin", "h1", "h2"):
        make_certificate(directory, name)
    return directory


@pytest.fixture(scope="module")
def server(certificates: Path, start_etcd: StartEtcd) -> Iterator[EtcdServer]:
    with start_etcd(
        certificates / "etcd",
        scheme="https",
        args=server_flags(certificates),
        ctl=client_flags(certificates, "root"),
    ) as server:
        run(server, ONCE)
        for host in (H1, H2):
            run(server, [*FOR_HOST, *FOR_NETWORK], h1=host)
        yield server


@pytest.fixture
async def registry_of(
    server: EtcdServer, certificates: Path, connect: Connect
) -> AsyncIterator[RegistryOf]:
    """A registry with somebody's credentials; the mesh is new, with network ``prod``."""
    server.ctl("del", "--prefix", "/meshnet/v1/")
    async with AsyncExitStack() as stack:
        found = {}
        for name in ("meshnet-admin", "h1", "h2"):
            config = EtcdConfig(
                endpoints=(server.client_url,),
                ca_file=certificates / "ca.crt",
                cert_file=certificates / f"{name}.crt",
                key_file=certificates / f"{name}.key",
            )
            found[name] = Registry(await stack.enter_async_context(connect(config)))
        admin = found["meshnet-admin"]
        await admin.store.commit([], [Put(MESH_ID, b"0123456789abcdef")])
        await admin.create_network(lambda vni: PROD, PROD.vni)
        yield found.__getitem__


def host_of(name: HostId) -> tuple[Host, Claim]:
    address = ip_address("192.0.2.1")
    return Host(id=name, underlay_ip=address), Claim(instance=name, underlay_ip=address)


async def reserve(registry: Registry, host: HostId) -> IpNetwork:
    subnet, _ = await registry.reserve_subnet(
        PROD, 4, host, known=None, prefer=None, random_below=lambda n: 0
    )
    return subnet


async def join(registry: Registry, host: HostId) -> str:
    """What an agent does; returns the key of its endpoint."""
    await registry.claim_host(*host_of(host), _TTL_S, set())
    await registry.claim_host(*host_of(host), _TTL_S, set())  # after a restart
    await reserve(registry, host)
    endpoint = make_endpoint()
    key = f"{ENDPOINTS}{PROD.name}/{host}/{endpoint.id}"
    await registry.publish({key: encode_endpoint(endpoint)}, [])
    assert await registry.list_published(PROD.name, host)
    return key


async def assert_refused(registry: Registry, *writes: Write) -> None:
    """Each write is refused by etcd, in one line that says whose credentials these are."""
    for write in writes:
        with pytest.raises(PolicyRefusedError, match=r"user that --etcd-cert names.*permission"):
            await registry.store.commit([], [write])


async def assert_keeps_out(h1: Registry, h2s_endpoint: str) -> None:
    """What the credentials of h1 cannot do in any arrangement."""
    await assert_refused(
        h1,
        *(Put(key, b"{}") for key in (host_key(H2), alive_key(H2), h2s_endpoint)),
        *(Delete(key) for key in (host_key(H2), alive_key(H2), h2s_endpoint)),
        *(Put(key, b"{}") for key in (network_key(PROD.name), NETWORKS_SERIAL, MESH_ID)),
        *(Delete(key) for key in (network_key(PROD.name), MESH_ID)),
        DeletePrefix(SUBNETS),
        DeletePrefix(f"{ENDPOINTS}{PROD.name}/"),
    )
    (claim,) = (await h1.store.read(alive_key(H2))).items
    with pytest.raises(PolicyRefusedError):
        await h1.store.revoke_lease(claim.lease_id)  # type: ignore[arg-type]
    with pytest.raises(PolicyRefusedError):
        await h1.create_network(lambda vni: make_network("dev", ("10.50.0.0/16",), vni), None)
    with pytest.raises(PolicyRefusedError):
        await h1.claim_host(*host_of(H2), _TTL_S, set())


async def test_the_administrator_reserves(server: EtcdServer, registry_of: RegistryOf) -> None:
    h1, h2 = registry_of("h1"), registry_of("h2")
    with pytest.raises(PolicyRefusedError):
        await reserve(h1, H1)
    run(server, BY_ADMIN)
    run(server, BY_ADMIN, h1=H2, **{"10.42.1.0-24": "10.42.2.0-24"})
    await join(h1, H1)
    endpoint = await join(h2, H2)
    assert (await reserve(h1, H1), await reserve(h2, H2)) == (FIRST, SECOND)
    theirs = subnet_key(PROD.name, SECOND)
    mine = Reservation(network=PROD.name, subnet=SECOND, host=H1)
    before = await h1.snapshot()
    await assert_refused(h1, Put(theirs, encode_reservation(mine)), Delete(theirs))
    await assert_keeps_out(h1, endpoint)
    after = await h1.snapshot()
    assert (after.reservations, after.hosts) == (before.reservations, before.hosts)
    assert (after.networks, after.alive) == (before.networks, before.alive)


async def test_hosts_reserve(server: EtcdServer, registry_of: RegistryOf) -> None:
    """A host may overwrite another's reservation: etcd cannot tell that from creating one."""
    run(server, BY_HOSTS)
    h1, h2, admin = registry_of("h1"), registry_of("h2"), registry_of("meshnet-admin")
    await join(h1, H1)
    endpoint = await join(h2, H2)
    assert await reserve(h1, H1) != await reserve(h2, H2)
    await assert_keeps_out(h1, endpoint)
    theirs = subnet_key(PROD.name, await reserve(h2, H2))
    stolen = Put(theirs, encode_reservation(Reservation(network=PROD.name, subnet=SECOND, host=H1)))
    assert (await h1.store.commit([], [stolen])).succeeded
    await admin.publish({}, [endpoint, endpoint.replace("/h2/", "/h1/")])
    with pytest.raises(PolicyRefusedError):
        await h1.remove_network(PROD.name)
    await admin.remove_network(PROD.name)
    assert not (await h1.snapshot()).networks
