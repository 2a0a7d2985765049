"""What a container is asked to be: the options of ``meshnet run``, and how their words are read.

Words and defaults are Docker's (docs/run.md).  Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address

from meshnet.errors import UsageError

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([bkmgt]?)b?", re.IGNORECASE)
_RESTART = re.compile(r"no|always|on-failure(?::(\d+))?")
NO_NETWORKS = ("none", "host")
"""Words of ``--net`` that are not names of networks."""
_CONTAINER = "container:"
_VOLUME_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,62}")
"""Of two letters or more, as in Docker: a single one would be a drive of Windows there."""
MOST_TIMEOUT_S = 1 << 31
NO_SWAP_LIMIT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerOptions:
    """All options of one container.

    Attributes:
        image: reference of an image; None: `rootfs` is a plain directory.
        command: program and arguments; empty: the image's own.
        networks: names of networks, or one of ``none``, ``host`` and ``container:NAME``.
        publish: ports of the host that lead to the first network's endpoint.
        cpus: how many CPUs' time it may use; a fraction is usual.
        memory_bytes: hard limit; the kernel kills what exceeds it.
        volumes: see `parse_volume`.
        userns: see `meshnet.runtime.spec.userns.parse_userns`.
        memory_swap_bytes: memory and swap together; None: twice the memory; `NO_SWAP_LIMIT`.
        ulimits, devices, sysctls: see the modules of these names.
        add_hosts: ``NAME:IP``, lines of ``/etc/hosts``.
        labels: ``K=V``; they mean nothing to meshnet.
        log_max_bytes: the log begins anew when it has become so large; 0: never.
        pid, ipc, uts: ``host`` or ``container:NAME``; None: a namespace of its own.
        stop_timeout_s: seconds between the stop signal and SIGKILL.
    """

    image: str | None = None
    rootfs: str | None = None
    command: tuple[str, ...] = ()
    entrypoint: str | None = None
    name: str | None = None
    networks: tuple[str, ...] = ()
    publish: tuple[str, ...] = ()
    hostname: str | None = None
    env: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    tmpfs: tuple[str, ...] = ()
    user: str | None = None
    workdir: str | None = None
    init: bool = False
    tty: bool = False
    interactive: bool = False
    rm: bool = False
    restart: str = "no"
    cpus: float | None = None
    cpu_shares: int | None = None
    cpuset_cpus: str | None = None
    memory_bytes: int | None = None
    memory_swap_bytes: int | None = None
    memory_reservation_bytes: int | None = None
    shm_size_bytes: int = 64 << 20
    ulimits: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    sysctls: tuple[str, ...] = ()
    group_add: tuple[str, ...] = ()
    add_hosts: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    log_max_bytes: int = 64 << 20
    pids_limit: int | None = None
    blkio_weight: int | None = None
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    privileged: bool = False
    read_only: bool = False
    pid: str | None = None
    ipc: str | None = None
    uts: str | None = None
    userns: str = "host"
    stop_signal: str | None = None
    stop_timeout_s: int = 10


@dataclass(frozen=True, slots=True)
class Volume:
    """A directory or file of the host inside the container.

    Attributes:
        source: its path; or the name of a volume; empty: a new volume without a name.
    """

    source: str
    destination: str
    read_only: bool = False

    @property
    def is_bind(self) -> bool:
        """Whether the source is a path of the host."""
        return self.source.startswith("/")


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a container that ended is started again.

    Attributes:
        most: how many times in a row; None: without end.
    """

    always: bool = False
    on_failure: bool = False
    most: int | None = None

    def wants(self, exit_code: int, restarts: int) -> bool:
        """Whether a container that ended so, after so many restarts, is to run again."""
        if self.always:
            return True
        return self.on_failure and exit_code != 0 and (self.most is None or restarts < self.most)


def parse_size(text: str) -> int:
    """Bytes of ``256m``; units b, k, m, g, t are powers of 1024.

    Raises:
        UsageError: not a size.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise UsageError(f"size {text!r} is not usable: give bytes or a unit, such as 256m")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def parse_volume(text: str) -> Volume:
    """``SRC:DST[:ro|rw]``, SRC an absolute path or a volume's name; or ``DST`` alone.

    Raises:
        UsageError: anything else.
    """
    parts = text.split(":")
    mode = parts.pop() if len(parts) == 3 else "rw"
    if len(parts) == 1:
        parts.insert(0, "")
    source, destination = parts if len(parts) == 2 else ("", "")
    usable = source.startswith("/") or not source or _VOLUME_NAME.fullmatch(source) is not None
    if (
        mode not in ("ro", "rw")
        or not destination.startswith("/")
        or not usable
        or text.startswith(":")
    ):
        raise UsageError(
            f"volume {text!r} is not usable: give /SRC:/DST, NAME:/DST or /DST, and :ro if need be"
        )
    return Volume(source, destination, mode == "ro")


def parse_restart(text: str) -> RestartPolicy:
    """``no``, ``always``, ``on-failure`` or ``on-failure:N``.

    Raises:
        UsageError: anything else.
    """
    found = _RESTART.fullmatch(text)
    if found is None:
        raise UsageError(f"restart policy {text!r} is unknown: no, on-failure[:N] or always")
    return RestartPolicy(
        always=text == "always",
        on_failure=text.startswith("on-failure"),
        most=int(found[1]) if found[1] else None,
    )


def parse_add_host(text: str) -> tuple[str, str]:
    """Name and address of ``db:10.0.0.5``; the address may be IPv6.

    Raises:
        UsageError: anything else.
    """
    name, _, address = text.partition(":")
    try:
        if not name or name.split() != [name]:
            raise ValueError
        return name, str(ip_address(address.strip("[]")))
    except ValueError as error:
        raise UsageError(f"--add-host {text!r} is not usable: give NAME:IP") from error


def parse_label(text: str) -> tuple[str, str]:
    """``K=V``, or ``K`` alone.

    Raises:
        UsageError: no key.
    """
    key, _, value = text.partition("=")
    if not key:
        raise UsageError(f"label {text!r} is not usable: give K=V")
    return key, value


def shared_with(text: str | None) -> str | None:
    """The container of ``container:NAME``; None for any other word."""
    if text is None or not text.startswith(_CONTAINER):
        return None
    return text.removeprefix(_CONTAINER)
