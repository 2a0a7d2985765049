"""Images from the command line, through a real agent."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from meshnet.cli.main import run_command
from meshnet.cli.skopeo import error_of
from meshnet.errors import MeshnetError, NotFoundError, PolicyRefusedError
from meshnet.lab.poll import wait_until
from meshnet.runtime.images.store import ImageStore
from tests.images import Layout, Member, config_of, digest, docker_save, tar
from tests.netns.mesh import meshnet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root

BASE = tar(Member("etc/os", data=b"base" * 1000))
TOP = tar(Member("app", data=b"one"))
SKOPEO = f"""#!{sys.executable}
import json, os, shutil, sys
there = os.path.dirname(os.path.abspath(sys.argv[0]))
*_, source, target = sys.argv
with open(there + "/calls", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
if "nothere" in source:
    sys.exit('time="x" level=fatal msg="reading manifest latest: manifest unknown"')
if target.startswith("oci:"):
    shutil.copytree(there + "/registry", target.split(":")[1])
else:
    shutil.copy(source.split(":")[1], there + "/pushed.tar")
"""


def write_layout(layout: Layout, directory: Path) -> Path:
    for name, content in layout.files().items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def run(host: LabHost, *arguments: object, status: int = 0) -> str:
    """Run the client in this process: only the host's socket matters here; what it prints."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        found = run_command(["--socket", str(host.socket_path), "image", *map(str, arguments)])
    assert found == status, errors.getvalue()
    assert errors.getvalue().count("\n") == (status != 0)
    return errors.getvalue() if status else output.getvalue()


def document(host: LabHost, *arguments: object) -> Any:  # noqa: ANN401
    return json.loads(run(host, *arguments, "--json"))


def test_image_commands(make_lab: MakeLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (host,) = make_lab(1).hosts
    store = ImageStore(host.state_dir / "images")
    assert document(host, "ls") == []

    saved = tmp_path / "saved.tar.gz"
    saved.write_bytes(gzip.compress(docker_save("one:1", BASE, TOP)))
    (one,) = document(host, "load", saved)
    assert one == {
        "id": digest(config_of((BASE, TOP))),
        "names": ["docker.io/library/one:1"],
        "size_bytes": 4003,
        "created": "2026-01-02T03:04:05Z",
        "layers": 2,
        "in_use": False,
        "containers": [],
    }
    config = config_of((BASE,), Entrypoint=["/init"], Env=["A=b"], ExposedPorts={"80/tcp": {}})
    layout = write_layout(Layout().add("", BASE, config=config), tmp_path / "layout")
    (layout / "secret").write_text("not sent")
    (two,) = document(host, "load", layout, "--name", "reg.example.org:5000/a/two")
    assert two["names"] == ["reg.example.org:5000/a/two:latest"]
    assert document(host, "ls") == [one, two]

    details = document(host, "inspect", "reg.example.org:5000/a/two")
    assert details["id"] == two["id"]
    assert details["config"]["entrypoint"] == ["/init"]
    assert details["config"]["exposed_ports"] == ["80/tcp"]
    assert details["diff_ids"] == [digest(BASE)]

    hostile = tmp_path / "hostile.tar"
    hostile.write_bytes(docker_save("one:2", tar(Member("a\x1b[2J\udcff/../x"))))
    for arguments, status, words in (
        (["inspect", "nothere"], 4, "image nothere is not on this host"),
        (["rm", "NO"], 2, "image name 'NO' is none"),
        (["load", hostile], 2, "member 'a\\x1b[2J\\udcff/../x'"),
        (["load", tmp_path / "nothere"], 4, "does not exist"),
        (["load", tmp_path], 2, "cannot be read as an OCI image layout"),
        (["load", saved, "--name", "A B"], 2, "'A B' is none"),
    ):
        assert words in run(host, *arguments, status=status)
    store.hold("one:1", "web")
    assert "in use by container web" in run(host, "rm", "one:1", status=5)
    assert [d["in_use"] for d in document(host, "ls")] == [True, False]
    store.release(one["id"], "web")
    assert document(host, "rm", "one:1", two["id"][7:20]) == [
        {"id": one["id"], "untagged": one["names"], "deleted": True},
        {"id": two["id"], "untagged": two["names"], "deleted": True},
    ]
    assert os.listdir(host.state_dir / "images/layers") == []

    (again,) = document(host, "load", saved)
    table = run(host, "ls")
    assert table.splitlines()[1].split() == [
        "docker.io/library/one:1", again["id"][7:19], "2026-01-02", "2", "3.9", "KiB", "no",
    ]  # fmt: skip
    check_registries(host, tmp_path, monkeypatch)


def check_registries(host: LabHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "skopeo"
    program.write_text(SKOPEO)
    program.chmod(0o755)
    write_layout(Layout().add("image", BASE, TOP), tmp_path / "registry")
    name = "reg.example.org/a:1"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (image,) = document(host, "pull", name, "--insecure")
    assert name in image["names"]
    assert run(host, "push", name) == f"{name}\n"
    assert "nothere: reading manifest" in run(host, "pull", "nothere", status=4)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls[0][:4] == ["copy", "--quiet", "--src-tls-verify=false", "--"]
    assert calls[0][4] == calls[1][-1] == f"docker://{name}"
    # What is pushed is what was pulled, byte for byte.
    layer = digest(gzip.compress(BASE, mtime=0))[7:]
    assert f"blobs/sha256/{layer}".encode() in (tmp_path / "pushed.tar").read_bytes()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "install the package skopeo" in run(host, "pull", "a", status=7)


def test_the_agent_answers_while_images_are_sent(make_lab: MakeLab) -> None:
    (host,) = make_lab(1).hosts
    raw = docker_save("one:1", tar(Member("big", data=os.urandom(1 << 20))))
    with socket.socket(socket.AF_UNIX) as sender:
        sender.connect(str(host.socket_path))
        head = b"POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw)
        sender.sendall(head + raw[:-1000])
        assert meshnet(host, "status")["networks"] == []
        # Another image comes in meanwhile.
        command = [sys.executable, "-m", "meshnet.cli.main", "--socket", str(host.socket_path)]
        sent = subprocess.run(
            [*command, "image", "load", "-"],
            input=docker_save("two:1", BASE), capture_output=True, check=True,
        )  # fmt: skip
        assert sent.stdout == b"docker.io/library/two:1\n"
        sender.sendall(raw[-1000:])
        assert sender.recv(100).startswith(b"HTTP/1.1 200 ")
    # A sender that goes away leaves nothing.
    with socket.socket(socket.AF_UNIX) as sender:
        sender.connect(str(host.socket_path))
        sender.sendall(head + raw[:-1000])
    wait_until(lambda: not os.listdir(host.state_dir / "images/tmp"), 10, "the load to end")
    assert "request failed" not in host.log_path.read_text()
    assert [d["names"] for d in document(host, "ls")] == [
        ["docker.io/library/one:1"],
        ["docker.io/library/two:1"],
    ]


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        ('time="t" level=fatal msg="a \\"b\\": manifest unknown"', NotFoundError),
        ('time="t" level=fatal msg="unauthorized: authentication required"', PolicyRefusedError),
        ('time="t" level=fatal msg="dial tcp: connection refused"', MeshnetError),
        ("", MeshnetError),
    ],
)
def test_what_skopeo_says(stderr: str, kind: type[MeshnetError]) -> None:
    error = error_of(stderr, "a:1")
    assert type(error) is kind
    assert str(error).startswith("image a:1: ")
    assert "\\" not in str(error)
