"""What a container's start needs on disk: root file system, ``config.json``, files of /etc.

Everything here blocks, so call it in threads.

::

    STATE/containers/ID/  container.json  log  exits/ID  hosts hostname resolv.conf
                          upper/ work/    the writable layer
                          rootfs/         where it is mounted while the container runs
    RUN/userns/ID/        where a container with ids of its own has its root file system
                          (`meshnet_agent.containers.bundle.mounts`)
    RUN/containers/ID/    config.json  attach winsz  pid conmon.pid   (gone after a reboot)
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshnet.errors import KernelRefusedError, UsageError
from meshnet.runtime.engine.cgroups import accounts_swap, has_unified_io
from meshnet.runtime.engine.conmon import ATTACH, WINDOW_SIZE
from meshnet.runtime.spec import seccomp
from meshnet.runtime.spec.config import Surroundings, capabilities, make_process, make_spec
from meshnet.runtime.spec.devices import parse_device
from meshnet.runtime.spec.options import parse_volume
from meshnet.runtime.spec.users import add_groups, resolve_user
from meshnet_agent.containers.bundle.devices import find_devices
from meshnet_agent.containers.bundle.etc import etc_files, write_etc
from meshnet_agent.containers.bundle.limits import check_limits
from meshnet_agent.containers.bundle.mounts import Mounts
from meshnet_agent.containers.bundle.privileges import capabilities_to_give
from meshnet_agent.containers.bundle.run_dir import make_run_dir

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshnet.runtime.engine.volumes import VolumeStore
    from meshnet.runtime.spec.options import ContainerOptions, Volume
    from meshnet.runtime.spec.users import User
    from meshnet_agent.containers.record import ContainerRecord

_INITS = ("catatonit", "tini", "tini-static")


@cache
def _profile() -> dict[str, Any]:
    profile: dict[str, Any] = json.loads(
        files("meshnet.runtime.spec").joinpath("seccomp.json").read_text()
    )
    return profile


@dataclass(frozen=True, slots=True)
class Bundle:
    """A container's directories.

    Attributes:
        userns: where its mounts are if it has ids of its own.
        volumes: the store of this host's volumes.
    """

    state: Path
    run: Path
    userns: Path
    volumes: VolumeStore

    @property
    def mounts(self) -> Mounts:
        """Its mounts while it runs."""
        return Mounts(self.state, self.userns)

    @property
    def attach(self) -> Path:
        """Socket of its terminal or its standard streams."""
        return self.run / ATTACH

    @property
    def window(self) -> Path:
        """FIFO that takes the terminal's size."""
        return self.run / WINDOW_SIZE

    @property
    def exit_file(self) -> Path:
        """Where conmon writes how it ended; the container's id is the directory's name."""
        return self.exits / self.state.name

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
        record: ContainerRecord,
        namespaces: Mapping[str, str | None],
        etc: Bundle | None,
        cgroup: str,
    ) -> None:
        """Mount the root file system and write ``config.json``.

        Args:
            namespaces: see `Surroundings`.
            etc: the bundle whose files of /etc it shares; None: it has its own.
            cgroup: see `OciRuntime.cgroup`.

        Raises:
            MeshnetError: a directory, a user or an option is not usable.
        """
        for volume in map(parse_volume, record.options.volumes):
            if volume.is_bind and not os.path.exists(volume.source):
                raise UsageError(
                    f"volume {volume.source} does not exist on this host: make it, or give another"
                )
        check_limits(record.options)
        # The status of an earlier run would be taken for this one's.
        for path in self.exits.iterdir():
            path.unlink()
        volumes = self.mounts.mount(record, self.volumes)
        own = self if etc is None else etc
        if etc is None:
            write_etc(self.state, record)
        around = self._surroundings(
            record,
            namespaces,
            etc_files(own.state),
            volumes,
            cgroup,
        )
        (self.run / "config.json").write_text(json.dumps(make_spec(record.options, around)))

    def _surroundings(
        self,
        record: ContainerRecord,
        namespaces: Mapping[str, str | None],
        etc: Mapping[str, str],
        volumes: tuple[Volume, ...],
        cgroup: str,
    ) -> Surroundings:
        options = record.options
        rootfs = self.mounts.root_of(record)
        effective = capabilities_to_give()
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
        self,
        record: ContainerRecord,
        options: ContainerOptions,
        directory: Path,
        env: tuple[str, ...],
    ) -> Path:
        """Write the process of an exec into a directory of its own; returns the file.

        Args:
            options: the container's, with the exec's command, user, workdir and terminal.
            env: the container's own variables.
        """
        rootfs = self.mounts.root_of(record)
        # Only what a process is made of: looking up devices, cgroups and the filter of system calls
        # takes time, and the runtime has them from the container's config.json.
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
                effective=capabilities_to_give(),
            ),
            options.command,
            tty=options.tty,
        )
        make_run_dir(directory)
        file = directory / "process.json"
        file.write_text(json.dumps(process))
        return file

    def unmount(self) -> None:
        """Undo `mount`.  Idempotent."""
        self.mounts.unmount()
        shutil.rmtree(self.run, ignore_errors=True)

    def remove(self) -> None:
        """Remove everything; call `unmount` first.

        Raises:
            KernelRefusedError: the disk refused.
        """
        try:
            shutil.rmtree(self.run, ignore_errors=True)
            if self.state.exists():
                shutil.rmtree(self.state)
        except OSError as error:
            raise KernelRefusedError(f"{self.state} cannot be removed: {error}") from error


def _read(rootfs: Path, name: str) -> str:
    """A file of the container's /etc; empty if it has none.  Follows no links."""
    # The agent reads as root what the image put there: a link could name any file of the host.
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


def _find_init() -> str:
    for name in _INITS:
        found = shutil.which(name)
        if found is not None:
            return str(Path(found).resolve())
    raise KernelRefusedError("--init needs catatonit or tini: install one of them")
