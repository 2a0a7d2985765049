"""The documents of containers, images and volumes: a contract with scripts, field by field."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from meshnet.runtime.engine.cgroups import Usage
from meshnet.runtime.engine.conmon import StartError
from meshnet.runtime.engine.volumes import StoredVolume, VolumeStore
from meshnet.runtime.images.oci import Descriptor, Digest, ImageConfig, ImageDocument, RootFs
from meshnet.runtime.images.store import Image, Removed
from meshnet.runtime.spec.id_ranges import IdRange
from meshnet.runtime.spec.mount_points import MountPoint
from meshnet.runtime.spec.options import ContainerOptions
from meshnet_agent.api.documents.containers import (
    container_details,
    container_document,
    ended_document,
    exec_document,
    not_started_document,
    usage_document,
)
from meshnet_agent.api.documents.endpoints import endpoint_document
from meshnet_agent.api.documents.images import image_details, image_summary, removed_image
from meshnet_agent.api.documents.volumes import volume_document
from meshnet_agent.api.openapi import describe
from meshnet_agent.api.routes.containers import container_operations
from meshnet_agent.api.routes.execs import exec_operations
from meshnet_agent.api.routes.images import image_operations
from meshnet_agent.api.routes.volumes import volume_operations
from meshnet_agent.containers.bundle.bundle import Bundle
from meshnet_agent.containers.directory import ContainerView
from meshnet_agent.containers.execs import ExecSession
from meshnet_agent.containers.record import ContainerRecord, ProcessId, State
from meshnet_agent.containers.volumes import VolumeUse
from tests.values import make_endpoint

if TYPE_CHECKING:
    from meshnet.model import Endpoint

BUNDLE = Bundle(
    Path("/s/containers/c1"),
    Path("/r/containers/c1"),
    Path("/r/userns/c1"),
    VolumeStore(Path("/s/volumes")),
)
OPTIONS = ContainerOptions(
    image="app:1", command=("serve",), networks=("prod",), labels=("tier=web", "plain")
)
RECORD = ContainerRecord(
    id="c1", name="web", options=OPTIONS, created_s=1.5, args=("serve", "-v"), lowerdirs=("/l",),
    image_id="sha256:00", ids=IdRange(7, 9), mount_points=(MountPoint("db", "/db"),),
    state=State.RUNNING, process=ProcessId(77, 1, "b"), started_s=2.5,
)  # fmt: skip
LISTED = {
    "id": "c1", "name": "web", "pid": 77, "state": "running", "exit_code": None, "image": "app:1",
    "networks": ["prod"], "command": ["serve", "-v"], "labels": {"tier": "web", "plain": ""},
    "endpoints": [], "restarts": 0, "error": None, "created_s": 1.5, "started_s": 2.5,
    "finished_s": None,
}  # fmt: skip


def told(document: object) -> Any:  # noqa: ANN401
    """What a client reads of a document, as the API encodes it and as its type says."""
    raw = msgspec.json.encode(document)
    assert msgspec.json.decode(raw, type=type(document)) == document
    return json.loads(raw)


def view(*endpoints: Endpoint, **fields: Any) -> ContainerView:  # noqa: ANN401
    return ContainerView(replace(RECORD, **fields), BUNDLE, endpoints)


def test_a_container() -> None:
    endpoint = make_endpoint()
    found = told(container_document(view(endpoint)))
    assert found == LISTED | {
        "networks": [endpoint.network],
        "endpoints": [told(endpoint_document(endpoint))],
    }
    assert list(found) == list(LISTED)


def test_all_that_is_known_of_a_container() -> None:
    found = told(container_details(view(make_endpoint())))
    rest = {name: value for name, value in found.items() if name not in LISTED}
    assert rest == {
        "options": {f: told(getattr(OPTIONS, f)) for f in ContainerOptions.__slots__},
        "image_id": "sha256:00",
        "ids": {"first": 7, "size": 9},
        "mount_points": [
            {"name": "db", "destination": "/db", "read_only": False, "anonymous": False}
        ],
        "log": "/s/containers/c1/log",
        "attach": "/r/containers/c1/attach",
        "window": "/r/containers/c1/winsz",
        "exit_file": "/s/containers/c1/exits/c1",
    }
    assert set(LISTED) < set(found)


@pytest.mark.parametrize(
    ("networks", "process", "endpoints", "shown"),
    [
        (("prod", "dev"), None, 0, ("prod", "dev")),  # what it asks for
        (("other",), RECORD.process, 1, ("prod",)),  # what it has
        (("prod",), RECORD.process, 0, ()),
        (("none",), RECORD.process, 0, ("none",)),
        (("none",), RECORD.process, 1, ("prod",)),
        (("host",), RECORD.process, 0, ("host",)),
        (("container:db",), RECORD.process, 0, ("container:db",)),
    ],
)
def test_the_networks_of_a_container(
    networks: tuple[str, ...], process: ProcessId | None, endpoints: int, shown: tuple[str, ...]
) -> None:
    options = ContainerOptions(rootfs="/", networks=networks)
    made = [make_endpoint()] * endpoints
    assert view(*made, options=options, process=process).networks == shown


def test_how_programs_end() -> None:
    usage = Usage(1.5, 2, 0.5, 4096, None, 3, 10, 20)
    assert told(usage_document(RECORD, usage)) == {
        "name": "web", "cpu_s": 1.5, "throttled": 2, "throttled_s": 0.5, "memory_bytes": 4096,
        "memory_limit_bytes": None, "pids": 3, "rx_bytes": 10, "tx_bytes": 20,
    }  # fmt: skip
    assert told(ended_document(RECORD)) == {"name": "web", "exit_code": None}
    why = StartError("executable file `serve` not found in $PATH")
    failed = not_started_document(why)
    assert told(failed) == {"failed": str(why), "exit_status": 127}
    session = ExecSession("e1", Path("/r/attach"), Path("/r/winsz"), Path("/r/c1"))
    assert told(exec_document(session)) == {
        "id": "e1", "attach": "/r/attach", "window": "/r/winsz", "exit_file": "/r/c1",
    }  # fmt: skip


def test_images() -> None:
    config = ImageConfig(cmd=("serve",), volumes={"/b": {}, "/a": {}})
    digest = Digest("sha256:" + "0" * 64)
    document = ImageDocument("amd64", "linux", RootFs(type="layers", diff_ids=()), config=config)
    image = Image(
        digest,
        Descriptor(media_type="application/json", digest=digest, size=2),
        ("app:1",),
        document,
        (digest,),
        3,
        (),
    )
    listed = {
        "id": digest, "names": ["app:1"], "size_bytes": 3, "created": None, "layers": 1,
        "in_use": False, "containers": [],
    }  # fmt: skip
    assert told(image_summary(image)) == listed
    assert told(image_details(image)) == listed | {
        "digest": digest,
        "os": "linux",
        "architecture": "amd64",
        "diff_ids": [digest],
        "config": {
            "entrypoint": [], "cmd": ["serve"], "env": [], "user": "", "working_dir": "",
            "volumes": ["/a", "/b"], "exposed_ports": [], "stop_signal": "", "labels": {},
        },
    }  # fmt: skip
    removed = Removed(digest, ("app:1",), deleted=True)
    assert told(removed_image(removed)) == {"id": digest, "untagged": ["app:1"], "deleted": True}


def test_volumes() -> None:
    volume = StoredVolume("db", "/s/volumes/db/data", anonymous=False, created_s=1.5)
    assert told(volume_document(VolumeUse(volume, ("web",)))) == {
        "name": "db", "path": "/s/volumes/db/data", "anonymous": False, "created_s": 1.5,
        "containers": ["web"],
    }  # fmt: skip


def test_what_the_api_says_of_its_answers() -> None:
    nothing: Any = None
    operations = [
        *container_operations(nothing),
        *exec_operations(nothing),
        *volume_operations(nothing),
        *image_operations(nothing),
    ]
    described = describe(operations)["paths"]
    answers = {
        (path, method): found["responses"]["200"]["content"]
        for path, methods in described.items()
        for method, found in methods.items()
    }
    streams = {
        key: content for key, content in answers.items() if "application/json" not in content
    }
    assert streams == {
        ("/v1/containers/{name}/logs", "get"): {"application/octet-stream": {}},
        ("/v1/archives/{image}", "get"): {"application/x-tar": {}},
    }
    created = answers["/v1/containers", "post"]["application/json"]["schema"]
    assert created == {
        "anyOf": [
            {"$ref": "#/components/schemas/ContainerDetails"},
            {"$ref": "#/components/schemas/NotStartedDocument"},
        ]
    }
    documentation = (Path(__file__).parents[4] / "docs" / "api.md").read_text()
    for path, method in answers:
        shown = re.sub(r"\{(\w+)\}", lambda found: found[1].upper(), path)
        shown = shown.replace("/exec/NAME", "/exec/ID")
        assert re.search(rf"`{method.upper()} {re.escape(shown)}[`?\[]", documentation), shown
