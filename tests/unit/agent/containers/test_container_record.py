"""A container's record: the file of this version, and that of version 1."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import structlog

from meshnet.codec.checksum import with_checksum
from meshnet.runtime.spec.mount_points import MountPoint
from meshnet.runtime.spec.options import ContainerOptions
from meshnet_agent.containers.record import (
    FILE,
    ContainerEndpoint,
    ContainerRecord,
    ProcessId,
    State,
    decode,
    encode,
    load_all,
)

if TYPE_CHECKING:
    from pathlib import Path

V1 = (
    b'{"id":"2eff43975229","name":"web","options":{"image":"app:1","command":["serve"],'
    b'"networks":["prod","local"],"publish":["8080:80"],"hostname":"front"},'
    b'"created_s":1796103032.116502,"args":["serve"],"lowerdirs":["/s/images/layers/aa/diff"],'
    b'"image_id":"sha256:0b04","env":["PATH=/bin"],"user":"","workdir":"/",'
    b'"stop_signal":"SIGTERM","ids":null,"mount_points":[{"name":"a941","destination":"/c",'
    b'"read_only":false,"anonymous":true}],"state":"running","process":{"pid":6994,'
    b'"start_ticks":426629,"boot_id":"01234567-89ab-4cde-8f01-23456789abcd"},"shim":{"pid":6980,'
    b'"start_ticks":426627,"boot_id":"01234567-89ab-4cde-8f01-23456789abcd"},'
    b'"started_s":1796103033.5,"finished_s":null,"exit_code":null,"error":null,"restarts":0,'
    b'"stopped":false,"endpoints":[{"id":"6511f62fbca9","network":"prod","host":"h1",'
    b'"name":"web","pid":6994,"ifname":"eth0","address":"10.42.0.2/24","gateway":"10.42.0.1",'
    b'"mac":"02:65:0a:2a:00:02","mtu":1450,"default_route":true,"published":["8080:80/tcp"],'
    b'"address6":"fd00:42::3/64","gateway6":"fd00:42::1","agent_ms":29.762},'
    b'{"id":"f667050bca61","network":"local","host":"h1","name":"web.local","pid":6994,'
    b'"ifname":"eth1","address":"10.45.0.3/24","gateway":"10.45.0.1","mac":"02:65:0a:2d:00:03",'
    b'"mtu":1500,"default_route":false,"published":[],"agent_ms":6.369}],"v":1}'
)
"""As an agent wrote it that kept the API's documents of the endpoints."""

BOOT = "01234567-89ab-4cde-8f01-23456789abcd"
RECORD = ContainerRecord(
    id="2eff43975229",
    name="web",
    options=ContainerOptions(
        image="app:1",
        command=("serve",),
        networks=("prod", "local"),
        publish=("8080:80",),
        hostname="front",
    ),
    created_s=1796103032.116502,
    args=("serve",),
    lowerdirs=("/s/images/layers/aa/diff",),
    image_id="sha256:0b04",
    env=("PATH=/bin",),
    mount_points=(MountPoint("a941", "/c", anonymous=True),),
    state=State.RUNNING,
    process=ProcessId(6994, 426629, BOOT),
    shim=ProcessId(6980, 426627, BOOT),
    started_s=1796103033.5,
    endpoints=(
        ContainerEndpoint(
            id="6511f62fbca9", network="prod", pid=6994, addresses=("10.42.0.2", "fd00:42::3")
        ),
        ContainerEndpoint(id="f667050bca61", network="local", pid=6994, addresses=("10.45.0.3",)),
    ),
)


@pytest.mark.parametrize("raw", [V1, with_checksum(V1)])
def test_a_file_of_version_1_is_read(raw: bytes) -> None:
    assert decode(raw) == RECORD


def test_a_file_without_a_version_is_one_of_version_1() -> None:
    assert decode(V1.replace(b',"v":1}', b"}")) == RECORD


def test_what_is_written_has_nothing_of_the_api() -> None:
    written = json.loads(encode(decode(V1)))
    assert written["v"] == 2
    assert written["endpoints"] == [
        {
            "id": "6511f62fbca9",
            "network": "prod",
            "pid": 6994,
            "addresses": ["10.42.0.2", "fd00:42::3"],
        },
        {"id": "f667050bca61", "network": "local", "pid": 6994, "addresses": ["10.45.0.3"]},
    ]
    assert decode(encode(RECORD)) == RECORD


OTHER_ENDPOINTS: tuple[Any, ...] = (None, 7, [7], [{}], [{"id": "a", "pid": "x"}])


def _changed(**fields: Any) -> bytes:  # noqa: ANN401
    return msgspec.json.encode(msgspec.json.decode(V1) | fields)


@pytest.mark.parametrize(
    "raw",
    [
        *(V1[:size] for size in range(0, len(V1), 50)),
        *(b"[]", b"1", b"null", b"\xff", b'{"v":1}'),
        *(_changed(v=version) for version in (0, 2, 3, "1", None, [1])),
        *(_changed(endpoints=other) for other in OTHER_ENDPOINTS),
        *(_changed(state=s) for s in ("gone", None)),
    ],
)
def test_a_file_that_cannot_be_read_is_left_alone(tmp_path: Path, raw: bytes) -> None:
    """`v` of 2 is of another shape: what version 1 kept there is not taken for it."""
    good, bad = tmp_path / "good" / FILE, tmp_path / "bad" / FILE
    for file, content in ((good, encode(RECORD)), (bad, raw)):
        file.parent.mkdir()
        file.write_bytes(content)
    with structlog.testing.capture_logs() as logs:
        assert list(load_all(tmp_path)) == [RECORD]
    assert [(log["event"], log["file"]) for log in logs] == [("container cannot be read", str(bad))]
    assert bad.read_bytes() == raw
