"""References, platforms, and documents that others wrote."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.errors import NotFoundError
from meshnet.runtime.images import oci
from meshnet.runtime.images.oci import BadImageError, Descriptor, Platform
from tests.images import config_of, dumps

SHA = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/me/app", "docker.io/me/app:latest"),
        ("me/app:v1", "docker.io/me/app:v1"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("reg.example.org/a/b/c__d:x", "reg.example.org/a/b/c__d:x"),
        ("[::1]:5000/app:v1", "[::1]:5000/app:v1"),
        (f"busybox@{SHA}", f"docker.io/library/busybox@{SHA}"),
        (f"busybox:1@{SHA}", f"docker.io/library/busybox:1@{SHA}"),
    ],
)
def test_reference(text: str, whole: str) -> None:
    found = oci.parse_reference(text)
    assert str(found) == whole
    assert oci.parse_reference(whole) == found


@pytest.mark.parametrize(
    "text",
    ["", "A", "a:", ":a", "a b", "a/../b", "/a", "a/", "a//b", "-a", "a:b:c", "a@", "a@sha256:1",
     "a:" + "t" * 129, "a" * 300, "a\n", "--help", "a:-x", f"a:@{SHA}"],
)  # fmt: skip
def test_no_reference(text: str) -> None:
    with pytest.raises(BadImageError, match=r"is none: give"):
        oci.parse_reference(text)


@given(st.text(max_size=40))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        found = oci.parse_reference(text)
    except BadImageError:
        return
    assert oci.parse_reference(str(found)) == found


def described(architecture: str, variant: str = "") -> Descriptor:
    platform = Platform("linux", architecture, variant)
    return Descriptor(digest=oci.Digest(SHA), size=1, platform=platform)


@pytest.mark.parametrize(
    ("host", "offered", "chosen"),
    [
        (("amd64", ""), [("arm64", "v8"), ("amd64", "")], ["amd64"]),
        (("arm", "v7"), [("arm", "v5"), ("arm", "v6"), ("arm", "v8")], ["arm/v6"]),
        (("arm", "v7"), [("arm", "v6"), ("arm", "v7")], ["arm/v7"]),
        (("arm64", "v8"), [("arm64", ""), ("unknown", "")], ["arm64"]),
    ],
)
def test_the_best_platform(
    host: tuple[str, str], offered: list[tuple[str, str]], chosen: list[str]
) -> None:
    found = oci.choose([described(*o) for o in offered], Platform("linux", *host), "x")
    assert [str(d.platform) for d in found] == [f"linux/{c}" for c in chosen]


def test_no_platform_fits() -> None:
    with pytest.raises(NotFoundError, match="linux/arm64, only linux/386, linux/amd64"):
        oci.choose(
            [described("amd64"), described("386")], Platform("linux", "arm64"), "the archive"
        )


def test_config_is_typed() -> None:
    raw = config_of(
        (b"x",),
        Entrypoint=["/init"],
        Cmd=["a", "b"],
        Env=["PATH=/bin", "E="],
        User="65534:100",
        WorkingDir="/srv",
        Volumes={"/data": {}},
        ExposedPorts={"80/tcp": {}},
        StopSignal="SIGQUIT",
        Labels={"a": "b"},
        OnBuild=None,
    )
    document = oci.decode_config(raw, "config")
    assert document.config is not None
    assert document.config.arguments() == ("/init", "a", "b")
    assert document.config.arguments(["c"]) == ("/init", "c")
    assert document.config.user == "65534:100"
    assert document.config.env == ("PATH=/bin", "E=")
    assert document.config.stop_signal == "SIGQUIT"
    assert oci.decode_config(config_of((), Entrypoint=None, Cmd=None, Env=None), "x").config


@pytest.mark.parametrize(
    "config",
    [
        {"Env": ["NOVALUE"]},
        {"Env": ["=x"]},
        {"Env": ["A=\0"]},
        {"Cmd": ["a\0b"]},
        {"Cmd": "not a list"},
        {"WorkingDir": "srv"},
        {"WorkingDir": "/a/../../b"},
        {"Volumes": {"/../etc": {}}},
        {"ExposedPorts": {"http": {}}},
        {"StopSignal": "TERM; rm"},
    ],
)
def test_bad_configs(config: dict[str, object]) -> None:
    with pytest.raises(BadImageError, match="config x"):
        oci.decode_config(config_of((), **config), "config x")


@pytest.mark.parametrize(
    ("field", "value"),
    [("created", "\x1b[2J"), ("os", "linux\n"), ("architecture", "a/b"), ("rootfs", {"type": "x"})],
)
def test_bad_documents(field: str, value: object) -> None:
    raw = dumps(json.loads(config_of(())) | {field: value})
    with pytest.raises(BadImageError, match="config x"):
        oci.decode_config(raw, "config x")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[",
        b"[" * 100_000,
        b"\xff",
        dumps({"config": {"digest": "sha512:ab", "size": 1}, "layers": []}),
        dumps({"config": {"digest": SHA, "size": -1}, "layers": []}),
        dumps({"config": {"digest": SHA + "\n", "size": 1}, "layers": []}),
        dumps({"config": {"digest": "sha256:../../../etc/passwd", "size": 1}, "layers": []}),
        dumps({"config": {"digest": SHA, "size": 1}, "layers": [{"digest": SHA, "size": 1}] * 128}),
        dumps({"schemaVersion": 1, "config": {"digest": SHA, "size": 1}, "layers": []}),
        b" " * (oci.MAX_DOCUMENT_BYTES + 1),
    ],
)
def test_bad_manifests(raw: bytes) -> None:
    with pytest.raises(BadImageError, match="manifest x"):
        oci.decode_manifest(raw, "manifest x")
