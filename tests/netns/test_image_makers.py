"""Images that others make are loaded and run: by buildah, by ``docker save``, by umoci."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.bench.docker import open_docker
from tests.netns.containers import CLIENT, client, is_clean, leftovers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

pytestmark = pytest.mark.root
# As in docs/images.md, "Building images".
CONTAINERFILE = """\
FROM scratch AS build
COPY busybox /bin/busybox
RUN ["/bin/busybox", "sh", "-c", "echo buildah >/page"]

FROM scratch
COPY busybox /bin/busybox
COPY --from=build /page /srv/page
WORKDIR /srv
USER 70:71
ENTRYPOINT ["/bin/busybox"]
CMD ["cat", "page"]
"""


def test_images_of_other_makers_run(
    make_lab: Callable[..., Lab], rootfs: Path, tmp_path: Path
) -> None:
    (host,) = make_lab(1).hosts
    busybox = tmp_path / "busybox"
    shutil.copy(rootfs / "bin" / "busybox", busybox)
    made = {
        "buildah": by_buildah(host, busybox),
        "docker": by_docker(host, busybox),
        "umoci": by_umoci(host, busybox),
    }
    names = {"buildah": ["docker.io/library/built:1"], "docker": ["docker.io/library/saved:1"]}
    for maker, source in made.items():
        (image,) = json.loads(client(host, "image", "load", "--json", source))
        assert image["names"] == names.get(maker, [])
        assert run(host, image["id"]) == f"{maker}\n"
    assert run(host, "built:1", "id", "-u") == "70\n"
    assert run(host, "built:1", "ls", "/").split() == ["bin", "dev", "etc", "proc", "srv", "sys"]
    assert is_clean(host), leftovers(host)


def run(host: LabHost, *words: str) -> str:
    done = host.run([*CLIENT, "run", "--rm", *words], check=False)
    assert done.returncode == 0, done
    return done.stdout


def by_buildah(host: LabHost, busybox: Path) -> Path:
    directory = busybox.parent
    (directory / "Containerfile").write_text(CONTAINERFILE)
    archive = directory / "built.tar"
    buildah = [
        *("buildah", "--root", str(directory / "buildah"), "--runroot", str(directory / "runroot")),
        *("--storage-driver", "vfs"),
    ]
    build = ("build", "--isolation", "chroot", "--tag", "built:1", str(directory))
    host.run([*buildah, *build], timeout=120)
    host.run([*buildah, "push", "built:1", f"oci-archive:{archive}:built:1"])
    return archive


def by_docker(host: LabHost, busybox: Path) -> Path:
    archive = busybox.with_name("saved.tar")
    # Its sockets' paths must be short.
    with open_docker(host, host.run_dir / "docker", network=False) as docker:
        docker.load("saved:1", busybox, 'ENTRYPOINT ["/busybox"]', 'CMD ["echo","docker"]')
        docker.call("save", "--output", str(archive), "saved:1")
    return archive


def by_umoci(host: LabHost, busybox: Path) -> Path:
    layout, bundle = busybox.with_name("layout"), busybox.with_name("bundle")
    image = ("--image", f"{layout}:made")
    host.run(["umoci", "init", "--layout", str(layout)])
    host.run(["umoci", "new", *image])
    host.run(["umoci", "unpack", *image, str(bundle)])
    shutil.copy(busybox, bundle / "rootfs" / "busybox")
    host.run(["umoci", "repack", *image, str(bundle)])
    # A second layer, which takes a file of the first away.
    (bundle / "rootfs" / "gone").write_text("gone")
    host.run(["umoci", "repack", "--refresh-bundle", *image, str(bundle)])
    (bundle / "rootfs" / "gone").unlink()
    (bundle / "rootfs" / "maker").write_text("umoci\n")
    host.run(["umoci", "repack", "--refresh-bundle", *image, str(bundle)])
    script = "test ! -e /gone && /busybox cat /maker"
    command = [f"--config.cmd={word}" for word in ("/busybox", "sh", "-c", script)]
    host.run(["umoci", "config", *image, *command])
    return layout
