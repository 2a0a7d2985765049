"""What a container's start needs on disk: root file system, ``config.json``, files of /etc.

Everything here blocks: it is called in threads.

::

    STATE/containers/ID/  container.json  log  exits/ID  hosts hostname resolv.conf
                          upper/ work/    the writable layer
                          rootfs/         where it is mounted while the container runs
    RUN/userns/ID/        where a container with ids of its own has its root file system
                          (`meshnet_agent.containers.mounts`)
    RUN/containers/ID/    config.json  attach winsz  pid conmon.pid   (gone after a reboot)
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import shutil
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from ipaddress import ip_interface
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshnet.errors import KernelRefusedError, PolicyRefusedError, UsageError
from meshnet.runtime.engine.cgroups import accounts_swap, has_unified_io
from meshnet.runtime.images.oci import ImageConfig
from meshnet.runtime.images.store import ImageStore
from meshnet.runtime.spec import seccomp
from meshnet.runtime.spec.config import (
    CAPABILITIES,
    Surroundings,
    capabilities,
    make_process,
    make_spec,
)
from meshnet.runtime.spec.devices import parse_device
from meshnet.runtime.spec.options import parse_add_host, parse_volume
from meshnet.runtime.spec.users import add_groups, resolve_user
from meshnet_agent.containers.host_support import check_kernel, find_devices
from meshnet_agent.containers.mounts import Mounts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshnet.runtime.engine.volumes import VolumeStore
    from meshnet.runtime.images.oci import Digest
    from meshnet.runtime.spec.options import ContainerOptions, Volume
    from meshnet.runtime.spec.users import User
    from meshnet_agent.containers.record import Record

_GROUP = "meshnet"
_ETC = {"/etc/hosts": "hosts", "/etc/hostname": "hostname", "/etc/resolv.conf": "resolv.conf"}
_INITS = ("catatonit", "tini", "tini-static")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a container is made from: a directory, or an image that it holds."""

    lowerdirs: tuple[str, ...]
    config: ImageConfig = field(default_factory=ImageConfig)
    image_id: Digest | None = None


class Sources:
    """Where root file systems come from: images by reference, directories by path."""

    def __init__(self, images: Path) -> None:
        self._store = ImageStore(images)
        self._empty = images / "empty"

    def hold(self, options: ContainerOptions, container: str) -> Source:
        """Find what to run, and keep it until `release`.

        Raises:
            NotFoundError: no such image.
            UsageError: the directory is none.
        """
        if options.image is None:
            rootfs = str(options.rootfs)
            if not Path(rootfs).is_dir():
                raise UsageError(f"rootfs {rootfs} is no directory: give one with a file system")
            return Source(lowerdirs=(rootfs,))
        image = self._store.hold(options.image, container)
        lowerdirs = self._store.lowerdirs(image)
        if not lowerdirs:
            self._empty.mkdir(exist_ok=True)
        return Source(
            lowerdirs=tuple(map(str, lowerdirs or (self._empty,))),
            config=image.document.config or ImageConfig(),
            image_id=image.id,
        )

    def release(self, image_id: Digest, container: str) -> None:
        """Let go of an image.  Idempotent."""
        self._store.release(image_id, container)


@cache
def _profile() -> dict[str, Any]:
    profile: dict[str, Any] = json.loads(
        files("meshnet.runtime.spec").joinpath("seccomp.json").read_text()
    )
    return profile


@dataclass(frozen=True, slots=True)
class Bundle:
    """A container's two directories.

    Attributes:
        volumes: the store of this host's volumes.
    """

    state: Path
    run: Path
    volumes: VolumeStore

    @property
    def mounts(self) -> Mounts:
        """What of it is mounted while it runs."""
        return Mounts(self.state, self.run.parents[1] / "userns" / self.run.name)

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.state / "log"

    @property
    def exits(self) -> Path:
        """Where conmon writes the exit status."""
        return self.state / "exits"

    def make(self) -> None:
        """Make the directories."""
        for directory in (self.state, self.exits):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(self.run, ignore_errors=True)
        make_run_dir(self.run)

    def mount(
        self,
        record: Record,
        namespaces: Mapping[str, str | None],
        etc: Bundle | None,
        cgroup: str,
    ) -> None:
        """Mount the root file system and write ``config.json``.

        Args:
            namespaces: see `Surroundings`.
            etc: whose files of /etc it shares; None: its own.
            cgroup: see `OciRuntime.cgroup`.

        Raises:
            MeshnetError: a directory, a user or an option is not usable.
        """
        for volume in map(parse_volume, record.options.volumes):
            if volume.is_bind and not os.path.exists(volume.source):
                raise UsageError(f"volume {volume.source} does not exist on this host: make it")
        check_kernel(record.options)
        for path in self.exits.iterdir():
            path.unlink()
        volumes = self.mounts.mount(record, self.volumes)
        own = self if etc is None else etc
        if etc is None:
            self.write_etc(record)
        around = self._surroundings(
            record,
            namespaces,
            {place: str(own.state / name) for place, name in _ETC.items()},
            volumes,
            cgroup,
        )
        (self.run / "config.json").write_text(json.dumps(make_spec(record.options, around)))

    def _surroundings(
        self,
        record: Record,
        namespaces: Mapping[str, str | None],
        etc: Mapping[str, str],
        volumes: tuple[Volume, ...],
        cgroup: str,
    ) -> Surroundings:
        options = record.options
        rootfs = self.mounts.root_of(record)
        effective = _own_capabilities()
        machine, release = os.uname().machine, os.uname().release.split(".")
        held = capabilities(options, effective)
        kernel = (int(release[0]), int(release[1]))
        return Surroundings(
            args=record.args,
            env=record.env,
            workdir=record.workdir,
            user=_user_of(rootfs, record.user, options.group_add),
            hostname=record.hostname,
            rootfs=str(rootfs),
            cgroup=cgroup,
            namespaces=namespaces,
            files=etc,
            seccomp=seccomp.resolve(_profile(), held, machine, kernel),
            effective=effective,
            init=_find_init() if options.init else None,
            volumes=volumes,
            ids=record.ids,
            devices=tuple(d for w in map(parse_device, options.devices) for d in find_devices(w)),
            accounts_swap=accounts_swap(),
            unified_io=has_unified_io(),
        )

    def write_exec(
        self, record: Record, options: ContainerOptions, directory: Path, env: tuple[str, ...]
    ) -> Path:
        """Write the process of an exec into a directory of its own; returns the file.

        Args:
            options: the container's, with the exec's command, user, workdir and terminal.
            env: the container's own variables.
        """
        rootfs = self.mounts.root_of(record)
        process = make_process(
            options,
            Surroundings(
                args=options.command,
                env=env,
                workdir=options.workdir or record.workdir,
                user=_user_of(
                    rootfs,
                    options.user if options.user is not None else record.user,
                    options.group_add,
                ),
                hostname=record.hostname,
                rootfs=str(rootfs),
                cgroup="",
                namespaces={},
                files={},
                seccomp=None,
                effective=_own_capabilities(),
            ),
            options.command,
            tty=options.tty,
        )
        make_run_dir(directory)
        file = directory / "process.json"
        file.write_text(json.dumps(process))
        return file

    def write_etc(self, record: Record) -> None:
        """Write hosts, hostname and resolv.conf, into the same files if they are there."""
        hosts = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
        if record.options.networks == ("host",):
            with contextlib.suppress(OSError):
                hosts = Path("/etc/hosts").read_text().splitlines()
        for endpoint in record.endpoints:
            for key in ("address", "address6"):
                if key in endpoint:
                    name = "" if record.name == record.hostname else f" {record.name}"
                    hosts.append(f"{ip_interface(endpoint[key]).ip}\t{record.hostname}{name}")
        for name, address in map(parse_add_host, record.options.add_hosts):
            hosts.append(f"{address}\t{name}")
        (self.state / "hosts").write_text("\n".join(hosts) + "\n")
        (self.state / "hostname").write_text(record.hostname + "\n")
        (self.state / "resolv.conf").write_text(_resolv_conf(record.options))
        for name in _ETC.values():
            (self.state / name).chmod(0o644)
            if record.ids is not None:
                os.chown(self.state / name, record.ids.first, record.ids.first)

    def unmount(self) -> None:
        """Undo `mount`.  Idempotent."""
        self.mounts.unmount()
        shutil.rmtree(self.run, ignore_errors=True)

    def remove(self) -> None:
        """Remove everything; `unmount` came first.

        Raises:
            KernelRefusedError: the disk refused.
        """
        try:
            shutil.rmtree(self.run, ignore_errors=True)
            if self.state.exists():
                shutil.rmtree(self.state)
        except OSError as error:
            raise KernelRefusedError(f"{self.state} cannot be removed: {error}") from error


def make_run_dir(directory: Path) -> None:
    """A directory with sockets that the client uses: root's, and the group meshnet's."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    open_to_group(directory, 0o710)


def open_to_group(path: Path, mode: int) -> None:
    """Give a file to the group meshnet, where there is one; `mode` counts then."""
    with contextlib.suppress(KeyError, OSError):
        os.chown(path, -1, grp.getgrnam(_GROUP).gr_gid)
        path.chmod(mode)


def _read(rootfs: Path, name: str) -> str:
    """A file of the container's /etc; empty if it has none.  Follows no link out of it."""
    try:
        etc = os.open(rootfs / "etc", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=etc)
        with open(fd, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
    finally:
        os.close(etc)


def _user_of(rootfs: Path, name: str, groups: tuple[str, ...]) -> User:
    group = _read(rootfs, "group")
    return add_groups(resolve_user(name, _read(rootfs, "passwd"), group), groups, group)


def _resolv_conf(options: ContainerOptions) -> str:
    """The host's, with the name servers of ``--dns`` instead of its own.

    Without ``--dns`` less those that are the host itself: nobody answers there inside.
    """
    as_it_is = options.networks == ("host",)
    try:
        lines = Path("/etc/resolv.conf").read_text().splitlines()
    except OSError:
        lines = []
    kept = [
        line
        for line in lines
        if (as_it_is and not options.dns)
        or not line.startswith(
            ("nameserver",) if options.dns else ("nameserver 127.", "nameserver ::1")
        )
    ]
    kept += [f"nameserver {server}" for server in options.dns]
    return "\n".join(kept) + "\n"


def _find_init() -> str:
    for name in _INITS:
        found = shutil.which(name)
        if found is not None:
            return str(Path(found).resolve())
    raise KernelRefusedError("--init needs catatonit or tini: install one of them")


def check_may_run() -> None:
    """Refuse where the agent's unit keeps it, and so every container, from too much.

    Raises:
        PolicyRefusedError: it may gain no privileges (proc(5), NoNewPrivs).
    """
    if "NoNewPrivs:\t1" in Path("/proc/self/status").read_text():
        raise PolicyRefusedError(
            "this agent's unit does not let it run containers: install its drop-in containers.conf "
            "(docs/run.md)"
        )


def _own_capabilities() -> frozenset[str]:
    """What the agent may give away (proc(5), CapBnd)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            mask = int(line.split()[1], 16)
            return frozenset(c for bit, c in enumerate(CAPABILITIES) if mask >> bit & 1)
    return frozenset()
