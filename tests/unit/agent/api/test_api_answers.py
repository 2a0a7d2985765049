"""What the API answers is what its OpenAPI document says: real answers of agents on fakes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
import trio
from starlette.requests import Request

from meshnet.errors import UsageError
from meshnet.model import EndpointId, HostId, NetworkName
from meshnet.sandbox import ProcessSandbox
from meshnet_agent.api.app import Served, make_app, operations_of
from meshnet_agent.api.bodies import convert
from meshnet_agent.api.documents.errors import HealthDocument, ReadyDocument
from meshnet_agent.api.documents.networks import VtepDocument, created_document, inspected_document
from meshnet_agent.api.openapi import describe
from meshnet_agent.api.operation import operation
from meshnet_agent.api.reports import NetworkReport, Reports, VtepReport
from meshnet_agent.containers.runtime import RuntimeProvider
from meshnet_agent.daemon import report_sources
from meshnet_agent.mesh.operations import CreatedNetwork, MeshOperations
from meshnet_agent.tasks.readiness import Readiness
from tests.hostile.api import exchange
from tests.unit.mesh import GRACE_S, full_mesh, open_mesh, until
from tests.values import make_endpoint, make_network

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio.testing import MockClock

    from meshnet.model import Endpoint, PublishedPort
    from meshnet_agent.daemon import Parts
    from meshnet_agent.endpoints.request import AttachRequest
    from tests.unit.mesh import Node


def check_answer(document: object, kind: Any) -> None:  # noqa: ANN401
    """A document is of its type, with no field beside it."""
    read = msgspec.convert(document, kind)
    assert json.loads(msgspec.json.encode(read)) == document


def _of_process(pid: int, network: str) -> Endpoint:
    made = make_endpoint()
    assert isinstance(made.sandbox, ProcessSandbox)
    sandbox = replace(made.sandbox, pid=pid)
    return replace(made, network=NetworkName(network), sandbox=sandbox)


class _Attached(MeshOperations):
    """Attaching as it goes well: the fakes have no processes."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(
            parts.follower,
            parts.registry,
            parts.networks,
            parts.endpoints,
            parts.attacher,
            parts.occupancy,
        )

    async def attach(self, pid: int, request: AttachRequest) -> Endpoint:
        await trio.lowlevel.checkpoint()
        return _of_process(pid, request.network)

    async def detach(self, pid: int, network: str) -> Endpoint:
        await trio.lowlevel.checkpoint()
        return _of_process(pid, network)

    async def publish(self, name: str, ports: Sequence[PublishedPort]) -> Endpoint:
        await trio.lowlevel.checkpoint()
        return replace(make_endpoint(), name=name)

    async def unpublish(self, name: str, ports: Sequence[str]) -> Endpoint:
        await trio.lowlevel.checkpoint()
        return replace(make_endpoint(), name=name)


class _Runtime(RuntimeProvider):
    """One that was looked for, and found past another."""

    def report(self) -> Mapping[str, str]:
        return {"crun": "too old"}


class _Api:
    """The API of a node, which remembers what was asked."""

    def __init__(self, node: Node) -> None:
        served = Served(
            mesh=_Attached(node.running),
            reports=Reports(report_sources(node.running, _Runtime(Path("oci")))),
            images=cast("Any", None),
        )
        readiness = node.running.readiness
        self.operations = operations_of(served, readiness)
        self.asked: set[tuple[str, str]] = set()
        self._app = make_app(self.operations, readiness)

    async def ask(self, method: str, template: str, name: str = "", body: object = None) -> Any:  # noqa: ANN401
        """The answer to a request, checked against its type."""
        path = template.replace("{name}", name).replace("{id}", name)
        chunks = [json.dumps(body).encode()] if body is not None else []
        status, document = await exchange(self._app, method, path, [], chunks)
        assert status == 200, document
        self.asked.add((method, template))
        (answer,) = (
            o.answer for o in self.operations if (o.method, o.template) == (method, template)
        )
        check_answer(document, answer)
        return document


async def test_answers_are_of_their_types(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_mesh(tmp_path) as mesh:
        await full_mesh(mesh, 2)
        node, other = mesh.nodes
        api = _Api(node)
        for body in (
            {"name": "slow", "subnets": ["10.43.0.0/16"], "fallback": "auto"},
            {"name": "six", "subnets": ["fd00:66::/48"], "internal": True},
            {"name": "phys", "subnets": ["192.0.2.0/24"], "mode": "macvlan", "parent": "eth9"}
            | {"ranges": ["192.0.2.9-192.0.2.20"], "gateways": ["192.0.2.1"]},
        ):
            created = await api.ask("POST", "/v1/networks", body=body)
            # Only the physical network's link is not there.
            assert ("error" in created) == (body["name"] == "phys")
        for number, host in enumerate((node, other)):
            endpoint = replace(make_endpoint(identity=f"{number:012x}"), host=HostId(host.id))
            host.running.endpoints._endpoints[endpoint.id] = endpoint
            host.running.endpoints.changed.set()
        node.running.endpoints.unhealed[EndpointId(f"{0:012x}")] = "its link is gone"
        node.running.endpoints.unreadable.add("bad")
        await until(lambda: "six" in node.running.membership.subnets, "the networks are taken in")
        await trio.sleep(5)

        networks = await api.ask("GET", "/v1/networks")
        assert {n["name"] for n in networks} == {"phys", "prod", "six", "slow"}
        inspected = await api.ask("GET", "/v1/networks/{name}", "prod")
        assert inspected["hosts"].keys() == {"h1", "h2"}
        assert len(inspected["endpoints"]) == 1
        await api.ask("DELETE", "/v1/networks/{name}", "phys")
        attached = await api.ask("POST", "/v1/attach", body={"pid": 7, "network": "prod"})
        assert attached["agent_ms"] >= 0
        await api.ask("POST", "/v1/detach", body={"pid": 7, "network": "prod"})
        await api.ask("POST", "/v1/release", body={"owner": "job7"})
        await api.ask("POST", "/v1/collect", body={"prefix": "cni/", "valid": ["cni/1"]})
        for path in ("/v1/publish", "/v1/unpublish"):
            await api.ask("POST", path, body={"endpoint": "web", "ports": ["8080:80"]})
        assert len((await api.ask("GET", "/v1/endpoints"))["endpoints"]) == 2
        hosts = await api.ask("GET", "/v1/hosts")
        assert hosts[1]["path"]["prod"] == "vxlan"
        status = await api.ask("GET", "/v1/status")
        probed = {n["name"]: n["probes"] is not None for n in status["networks"]}
        assert probed == {"prod": False, "six": False, "slow": True}
        assert any("crun" in note for note in status["notes"])

        await other.stop()
        await until(lambda: HostId("h2") not in node.running.follower.snapshot.alive, "it left")
        removed = await api.ask("DELETE", "/v1/hosts/{id}", "h2")
        assert len(removed["endpoints"]) == 1
        node.store.set_available(False)
        assert "only this host's" in (await api.ask("GET", "/v1/endpoints"))["warning"]
        await trio.sleep(GRACE_S)
        assert (await api.ask("GET", "/v1/status"))["store"]["error"] is not None

        for path in ("/healthz", "/readyz", "/openapi.json"):
            await api.ask("GET", path)
        # Images need a store on a disk: agent/containers/ has their documents.
        of_images = ("/v1/images", "/v1/archives")
        documented = [o for o in api.operations if not o.path.startswith(of_images)]
        assert api.asked == {(o.method, o.template) for o in documented}


async def test_before_it_is_ready_an_agent_answers_probes() -> None:
    nothing = cast("Any", None)
    served = Served(mesh=nothing, reports=nothing, images=nothing)
    operations = operations_of(served, Readiness())
    app = make_app(operations, Readiness())
    assert await exchange(app, "GET", "/healthz") == (200, {"status": "ok"})
    assert await exchange(app, "GET", "/readyz") == (503, {"ready": False})
    assert (await exchange(app, "GET", "/openapi.json"))[0] == 200
    assert (await exchange(app, "GET", "/v1/status"))[0] == 503
    ready = describe(operations)["paths"]["/readyz"]["get"]["responses"]
    assert ready["503"]["content"] == ready["200"]["content"]


def test_fields_that_are_not_always_there() -> None:
    network = make_network()
    up = created_document(CreatedNetwork(network=network, mtu_bytes=1450))
    assert b'"error"' not in msgspec.json.encode(up)
    single = make_endpoint()
    counters = {
        "drops": {"short": 1},
        "totals": {"rx_packets": 3, "rx_packets_per_call": 1.5},
        "peers": [{"underlay_ip": "10.0.0.2", "rx_packets": 3, "drops": {"short": 1}}],
    }
    for counted in (counters, {}):
        report = NetworkReport(
            network=network,
            mtu_bytes=None,
            hosts={},
            endpoints=[single],
            vtep=VtepReport(counters=counted, hosts={"10.0.0.2": HostId("h2")}),
        )
        document = json.loads(msgspec.json.encode(inspected_document(report)))
        check_answer(document["vtep"], VtepDocument)
    assert document["vtep"] == {"drops": {}, "totals": {}, "peers": []}


# --- parameters of a query -----------------------------------------------------------------------


class _Query(msgspec.Struct, frozen=True, kw_only=True):
    follow: bool = False
    tail: int | None = None


async def _tell(_request: Request, query: _Query) -> _Query:
    await trio.lowlevel.checkpoint()
    return query


_LOGS = operation("GET", "/logs/{name:path}", _tell, answer=_Query, query=_Query)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"", _Query()),
        (b"follow=1&tail=7&other=x", _Query(follow=True, tail=7)),
        (b"tail=x", "tail 'x' is not usable: expected `int"),
        (b"follow=maybe", "follow 'maybe' is not usable"),
    ],
)
async def test_parameters_of_a_query(query: bytes, expected: _Query | str) -> None:
    request = Request({"type": "http", "path": "/logs/a", "query_string": query, "headers": []})
    if isinstance(expected, _Query):
        assert await _LOGS.handle(request) == expected
    else:
        with pytest.raises(UsageError, match=expected):
            await _LOGS.handle(request)


def test_answers_of_several_kinds_and_answers_that_are_not_json() -> None:
    async def handler(_request: Request) -> None:
        await trio.lowlevel.checkpoint()

    operations = [
        operation("GET", "/a", handler, answer=(HealthDocument, ReadyDocument)),
        operation("GET", "/b", handler, answer=None, media="application/x-tar"),
    ]
    document = describe(operations)
    answers = {
        path: found["get"]["responses"]["200"]["content"]
        for path, found in document["paths"].items()
    }
    schema = answers["/a"]["application/json"]["schema"]
    names = [each["$ref"].rpartition("/")[2] for each in schema["anyOf"]]
    assert names == ["HealthDocument", "ReadyDocument"]
    assert set(names) < document["components"]["schemas"].keys()
    assert answers["/b"] == {"application/x-tar": {}}


@dataclass(frozen=True)
class _Options:
    name: str = ""


def test_a_body_without_a_struct_has_no_unknown_fields_either() -> None:
    assert convert({"name": "a"}, _Options, "/v1/x") == _Options("a")
    with pytest.raises(UsageError, match="request body of /v1/x: unknown field 'nmae'"):
        convert({"nmae": "a"}, _Options, "/v1/x")


def test_parameters_are_described() -> None:
    parameters = describe([_LOGS])["paths"]["/logs/{name}"]["get"]["parameters"]
    assert [(p["name"], p["in"], p["required"], p["schema"]) for p in parameters] == [
        ("name", "path", True, {"type": "string"}),
        ("follow", "query", False, {"type": "boolean"}),
        ("tail", "query", False, {"type": "integer"}),
    ]
