"""A real registry: images go there and come back, by tag and by digest, with credentials."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.containers import CLIENT, busybox_layer, client, load_image

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

pytestmark = pytest.mark.root
PORT = 5000
HTPASSWD = "web:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"
"""User web, password secret (bcrypt)."""
CONFIG = """\
version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {directory}/registry}}}}
http: {{addr: "{address}:{port}"}}
auth: {{htpasswd: {{realm: test, path: {directory}/htpasswd}}}}
"""


def test_a_registry_that_wants_credentials(
    make_lab: Callable[..., Lab], rootfs: Path, tmp_path: Path
) -> None:
    (host,) = make_lab(1).hosts
    registry = start_registry(host, tmp_path)
    name, auth = f"{registry}/team/web", {"REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")}
    layer = busybox_layer(rootfs)
    load_image(host, tmp_path / "image.tar", f"{name}:1", layer, Cmd=["echo", "pulled"])
    (made,) = json.loads(client(host, "image", "ls", "--json"))
    digest = json.loads(client(host, "image", "inspect", "--json", made["id"]))["digest"]

    def image(*words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        argv = [*CLIENT, "image", *words, "--insecure", "--json"]
        done = host.run(argv, check=False, env=auth)
        assert done.returncode == status, done
        return done

    refused = image("push", f"{name}:1", status=9).stderr
    assert refused.count("\n") == 1
    assert f"image {name}:1" in refused
    assert "skopeo login" in refused
    login = ["skopeo", "login", "--tls-verify=false", "--username", "web", "--password"]
    assert host.run([*login, "wrong", registry], check=False, env=auth).returncode != 0
    host.run([*login, "secret", registry], env=auth)
    image("push", f"{name}:1")
    for reference in (f"{name}:1", f"{name}@{digest}"):
        client(host, "image", "rm", made["id"])
        assert json.loads(client(host, "image", "ls", "--json")) == []
        (pulled,) = json.loads(image("pull", reference).stdout)
        assert pulled["id"] == made["id"]
        found = json.loads(client(host, "image", "inspect", "--json", made["id"]))
        assert found["digest"] == digest
        done = host.run([*CLIENT, "run", "--rm", reference], check=False)
        assert (done.returncode, done.stdout) == (0, "pulled\n"), done
    assert "check name and registry" in image("pull", f"{name}:2", status=4).stderr
    assert "check name and registry" in image("pull", f"{registry}/team/none", status=4).stderr
    os.unlink(tmp_path / "auth.json")
    assert "skopeo login" in image("pull", f"{name}:1", status=9).stderr


def start_registry(host: LabHost, directory: Path) -> str:
    """Start Debian's docker-registry on a host, over HTTP; returns its address and port."""
    program = shutil.which("docker-registry")
    assert program is not None, "install docker-registry"
    address = str(host.underlay_ip)
    (directory / "htpasswd").write_text(HTPASSWD)
    config = directory / "registry.yml"
    config.write_text(CONFIG.format(directory=directory, address=address, port=PORT))
    with (directory / "registry.log").open("w") as log:
        child = host.popen([program, "serve", str(config)], stdout=log, stderr=log)

    def answers() -> bool:
        assert child.poll() is None, (directory / "registry.log").read_text()
        listening = host.run(["ss", "-Hltn", "sport", "=", f":{PORT}"]).stdout
        return bool(listening.strip())

    wait_until(answers, 30, "the registry listens")
    return f"{address}:{PORT}"
