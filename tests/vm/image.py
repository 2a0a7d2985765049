"""The disk of a machine: Debian 12 with the product installed, made once and kept.

Two layers, in a cache outside the tree: the Debian system, known by its recipe, and the disk with
the product in it, known by the recipe and all that the product is made of.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.vm.product import install, product_files, run

if TYPE_CHECKING:
    from collections.abc import Iterator

_PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "udev", "linux-image-cloud-amd64", "openssh-server"),
    *("iproute2", "iputils-ping", "iperf3", "ethtool", "tcpdump", "procps", "curl", "jq"),
    *("netcat-openbsd", "busybox-static", "ca-certificates", "netbase"),
    # Which the product needs, or recommends.
    *("nftables", "python3", "python3-venv", "conmon", "runc", "crun", "catatonit"),
    *("libseccomp2", "zstd"),
    # What runs beside it on real hosts.
    *("docker.io", "firewalld", "ufw", "network-manager", "iptables"),
)
_OFF = (
    *("docker.service", "docker.socket", "containerd.service", "firewalld.service", "ufw.service"),
    *("NetworkManager.service", "NetworkManager-wait-online.service", "nftables.service"),
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *("fstrim.timer", "systemd-timesyncd.service"),
)
"""Units that start only in a case that is about them."""
_DISK_GIB = 8
_ROOT_FILES = {
    "etc/ssh/sshd_config.d/tests.conf": "PermitRootLogin prohibit-password\nUseDNS no\n",
    "etc/sysctl.d/tests.conf": "kernel.printk = 5 4 1 7\n",
    "etc/fstab": "",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
}


@dataclass(frozen=True, slots=True)
class Image:
    """What machines are started from.

    Attributes:
        disk: raw ext4 file system, never written: each machine has a layer of its own on it.
        key: private key of ssh that root accepts.
    """

    disk: Path
    kernel: Path
    initrd: Path
    key: Path


def build_image() -> Image:
    """The image of the product as it is in this checkout; made if it is not in the cache.

    Raises:
        subprocess.CalledProcessError: a step failed; its output was printed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "meshnet-vm")
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache):
        system = _system(cache)
        files = product_files()
        name = hashlib.sha256(f"{system.name} {_digest(files)}".encode()).hexdigest()[:16]
        disk = cache / f"disk-{name}.img"
        if not disk.exists():
            print("tests.vm: making the disk", file=sys.stderr, flush=True)
            for old in cache.glob("disk-*.img"):  # of another state of the product
                old.unlink()
            install(system / "root")
            _make_disk(system / "root", disk)
    (kernel,) = (system / "root/boot").glob("vmlinuz-*")
    (initrd,) = (system / "root/boot").glob("initrd.img-*")
    return Image(disk, kernel, initrd, system / "key")


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _system(cache: Path) -> Path:
    """The directory of the Debian system: ``root`` and ``key``."""
    recipe = json.dumps([_PACKAGES, _OFF, _ROOT_FILES, "2"])
    system = cache / f"debian-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if system.exists():
        return system
    print("tests.vm: installing Debian, which takes some minutes", file=sys.stderr, flush=True)
    for old in cache.glob("debian-*"):
        shutil.rmtree(old)
    made = cache / "unfinished"
    if made.exists():
        shutil.rmtree(made)
    made.mkdir()
    root = made / "root"
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    run(
        "mmdebstrap",
        *("--mode=root", "--variant=important", f"--include={','.join(_PACKAGES)}"),
        *("--aptopt=Apt::Install-Recommends false", "bookworm", str(root)),
        *([str(sources)] if sources.exists() else []),
    )
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(made / "key"))
    authorized = root / "root/.ssh/authorized_keys"
    authorized.parent.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(made / "key.pub", authorized)
    for name, content in _ROOT_FILES.items():
        (root / name).write_text(content)
    run("chroot", str(root), "systemctl", "disable", "--quiet", *_OFF)
    run("chroot", str(root), "systemctl", "enable", "--quiet", "systemd-networkd")
    made.rename(system)
    return system


def _make_disk(root: Path, disk: Path) -> None:
    unfinished = disk.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("wb") as file:
        file.truncate(_DISK_GIB << 30)
    run("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(unfinished))
    unfinished.rename(disk)


def _digest(files: dict[str, bytes]) -> str:
    found = hashlib.sha256()
    for name, content in sorted(files.items()):
        found.update(f"{name}\0{len(content)}\0".encode() + content)
    return found.hexdigest()
