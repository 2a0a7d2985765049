"""Reboots and power cuts: what was promised is on disk, and the mesh comes back by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from tests.vm.mesh import address_of, attach, inside, meshnet, wait_active

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.vm.machine import Machine
    from tests.vm.mesh import Mesh

_IMAGE = """
set -e
mkdir -p /root/image/bin
cp /bin/busybox /root/image/bin/
for name in sh sleep httpd cat; do ln -sf busybox /root/image/bin/$name; done
"""


def _comes_back(mesh: Mesh, end: Callable[[Machine], None]) -> None:
    """A machine with a container that is to restart ends in some way, and is whole again."""
    mesh.start_agents()
    mesh.create("prod", "--subnet", "10.42.0.0/16")
    one, two, _ = mesh.machines
    two.run(_IMAGE)
    two.run(
        "meshnet run -d --name web --net prod --restart always --rootfs /root/image sleep 1000000",
    )
    here = attach(one, "prod")
    attached = attach(two, "prod")
    (web,) = [e for e in meshnet(two, "endpoint", "ls") if e["name"] == "web"]
    inside(one, here, f"ping -c 2 -W 5 {address_of(web)}")
    subnets = {h["id"]: h["subnets"] for h in meshnet(one, "hosts")}
    end(two)
    wait_active(two)

    def is_back() -> bool:
        return [e["name"] for e in meshnet(two, "endpoint", "ls") if e["host"] == two.name] == [
            "web"
        ]

    wait_until(
        is_back, 60, "the container is back, and the endpoint of a process that ended is not"
    )
    (back,) = [e for e in meshnet(two, "endpoint", "ls") if e["name"] == "web"]
    assert back["address"] == web["address"]
    inside(one, here, f"ping -c 5 -W 5 {address_of(back)}")
    assert {h["id"]: h["subnets"] for h in meshnet(one, "hosts")} == subnets
    assert attached["id"] not in {e["id"] for e in meshnet(one, "endpoint", "ls")}


def test_a_reboot(mesh: Mesh) -> None:
    _comes_back(mesh, lambda machine: machine.reboot())


def test_a_reboot_while_etcd_is_silent(mesh: Mesh) -> None:
    """The host starts from its disk: its networks are there, and what is attached is reached."""
    mesh.start_agents()
    mesh.create("prod", "--subnet", "10.42.0.0/16", "--subnet", "fd00:42::/48")
    one, two, _ = mesh.machines
    here = attach(one, "prod")
    revision = meshnet(two, "status")["store"]["revision"]

    def is_saved() -> bool:
        saved = two.run("jq .revision /var/lib/meshnet/snapshot.json", check=False).stdout
        return saved.strip().isdigit() and int(saved) >= revision

    wait_until(is_saved, 60, "vm2 has on its disk what it knows")
    mesh.etcd.pause()
    try:
        two.reboot()
        wait_active(two)
        assert meshnet(two, "status")["store"]["from_disk_s"] is not None
        there = attach(two, "prod")
        for version in (4, 6):
            inside(two, there, f"ping -c 3 -W 5 {address_of(here, version)}")
    finally:
        mesh.etcd.resume()
    mesh.allowed += ["started from disk", "store lost", "lease", "endpoints not published"]
    wait_until(lambda: meshnet(two, "status")["store"]["connected"], 60, "etcd is followed")
    mesh.wait_in_sync()
    inside(one, here, f"ping -c 3 -W 5 {address_of(there)}")


def _cut(machine: Machine) -> None:
    machine.power_cut()
    machine.power_on()
    machine.wait_up()


def test_a_power_cut(mesh: Mesh) -> None:
    _comes_back(mesh, _cut)


def test_a_power_cut_while_endpoints_are_attached(mesh: Mesh) -> None:
    """No record is damaged, and no address is lost or given twice."""
    mesh.start_agents()
    mesh.create("prod", "--subnet", "10.42.0.0/16")
    one, two, _ = mesh.machines
    two.run(
        "for i in $(seq 40); do unshare --net sleep 1000 & meshnet attach $! --net prod; done "
        ">/root/attached 2>&1 </dev/null & sleep 6"
    )
    _cut(two)
    wait_active(two)
    status = meshnet(two, "status")
    assert status["bad_values"] == []
    assert not status.get("notes"), status["notes"]
    wait_until(lambda: not meshnet(two, "endpoint", "ls"), 30, "no endpoint outlives a power cut")
    here, there = attach(one, "prod"), attach(two, "prod")
    assert address_of(there).endswith(".2"), "the lowest address is free again"
    inside(one, here, f"ping -c 3 -W 5 {address_of(there)}")


def test_a_power_cut_while_an_image_is_loaded(mesh: Mesh) -> None:
    """The store of images is whole: what is listed runs, and the image can be loaded again."""
    mesh.start_agents()
    _, two, _ = mesh.machines
    two.run(_IMAGE)
    two.run(
        # An image's tar, large enough for the cut to fall into it.
        "set -e; cd /root; head -c 60000000 /dev/urandom > image/large;"
        "mkdir -p oci; tar -C image -cf oci/layer.tar .; cd oci;"
        "digest=$(sha256sum layer.tar | cut -d' ' -f1);"
        'printf \'{"architecture":"amd64","os":"linux","config":{"Cmd":["/bin/sleep","9"]},'
        '"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}\' $digest > config.json;'
        'printf \'[{"Config":"config.json","RepoTags":["big:1"],"Layers":["layer.tar"]}]\''
        " > manifest.json; tar -cf ../image.tar manifest.json config.json layer.tar"
    )
    two.run("sync; meshnet image load /root/image.tar >/root/loaded 2>&1 </dev/null & sleep 1.5")
    _cut(two)
    wait_active(two)
    meshnet(two, "image", "ls")
    meshnet(two, "image", "load", "/root/image.tar")
    assert two.run("meshnet run --rm --net none big:1 /bin/sh -c 'echo runs'").stdout == "runs\n"
