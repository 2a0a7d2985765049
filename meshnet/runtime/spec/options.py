"""What a container is asked to be: the options of ``meshnet run``, and how their words are read.

Words and defaults are Docker's (docs/run.md).  Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address

from meshnet.errors import UsageError
from meshnet.runtime.spec.devices import parse_device
from meshnet.runtime.spec.sysctls import check_sysctls
from meshnet.runtime.spec.ulimits import parse_ulimit
from meshnet.runtime.spec.userns import check_userns
from meshnet.text import check_name

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([bkmgt]?)b?", re.IGNORECASE)
_RESTART = re.compile(r"no|always|on-failure(?::(\d+))?")
NO_NETWORKS = ("none", "host")
"""Words of ``--net`` that are no network's name."""
_CONTAINER = "container:"
_VOLUME_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,62}")
"""Of two letters or more, as in Docker: a single one would be a drive of Windows there."""
_LEAST_LOG_BYTES = 64 << 10
_LEAST_MEMORY_BYTES = 6 << 20
"""Docker's: with less nothing can be started."""
_MOST_BYTES = (1 << 63) - 1
MOST_TIMEOUT_S = 1 << 31
_CPU_LIST = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
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


def check_options(options: ContainerOptions) -> None:
    """Refuse options that contradict each other or cannot be read.

    Raises:
        UsageError: the message says which.
    """
    if (options.image is None) == (options.rootfs is None):
        raise UsageError("give an image or --rootfs DIR, one of them")
    if options.rootfs is not None and not options.rootfs.startswith("/"):
        raise UsageError(f"rootfs {options.rootfs!r} is not an absolute path")
    if options.rootfs is not None and not (options.command or options.entrypoint):
        raise UsageError("a --rootfs says nothing of what to run: give a command")
    alone = [n for n in options.networks if n in NO_NETWORKS or shared_with(n) is not None]
    if alone and len(options.networks) > 1:
        raise UsageError(f"--net {alone[0]} goes with no other --net")
    if options.publish and (alone or not options.networks):
        raise UsageError("--publish needs a network of its own: give --net NAME")
    for word in (options.pid, options.ipc, options.uts):
        if word not in (None, "host") and not shared_with(word):
            raise UsageError(f"namespace {word!r} is unknown: host or container:NAME")
    if options.rm and options.restart != "no":
        raise UsageError("--rm and --restart contradict each other: give one")
    if len(options.networks) > len(set(options.networks)):
        raise UsageError(f"--net is given twice with one name: {', '.join(options.networks)}")
    for kind, name in (("container", options.name), ("host", options.hostname)):
        if name is not None:
            check_name(kind, name)
    parse_restart(options.restart)
    _check_numbers(options)
    check_process(options)
    check_userns(options)
    for volume in options.volumes:
        parse_volume(volume)
    _check_memory(options)
    _check_etc(options)
    for ulimit in options.ulimits:
        parse_ulimit(ulimit)
    for device in options.devices:
        parse_device(device)
    for label in options.labels:
        parse_label(label)
    check_sysctls(options)
    if 0 < options.log_max_bytes < _LEAST_LOG_BYTES or options.log_max_bytes < 0:
        raise UsageError(f"--log-max-size {options.log_max_bytes} is too small: give 64k, or 0")
    for text in options.tmpfs:
        if not text.startswith("/") or "\0" in text:
            raise UsageError(f"--tmpfs {text!r} is not usable: give /DIR or /DIR:OPTIONS")


def check_process(options: ContainerOptions) -> None:
    """Refuse what no program can be started with.

    Raises:
        UsageError: the message says what.
    """
    if options.workdir is not None and not options.workdir.startswith("/"):
        raise UsageError(f"--workdir {options.workdir!r} is not usable: give an absolute path")
    for variable in options.env:
        if not variable.partition("=")[0]:
            raise UsageError(f"--env {variable!r} has no name: give K=V")
    for text in (*options.command, *options.env, options.workdir or ""):
        if "\0" in text:
            raise UsageError("a NUL is in an argument or a variable")


def _check_numbers(options: ContainerOptions) -> None:
    for option, value, least, most, remedy in (
        ("--cpus", options.cpus, 0.01, 100_000, "0.01 or more"),
        ("--cpu-shares", options.cpu_shares, 2, 1 << 18, "2 to 262144"),
        ("--pids-limit", options.pids_limit, -1, 1 << 22, "1 to 4194304, or -1"),
        ("--blkio-weight", options.blkio_weight, 10, 1000, "10 to 1000"),
        ("--stop-timeout", options.stop_timeout_s, 0, MOST_TIMEOUT_S, "seconds, 0 or more"),
        ("--memory", options.memory_bytes, _LEAST_MEMORY_BYTES, _MOST_BYTES, "6m or more"),
        ("--memory-reservation", options.memory_reservation_bytes, 1, _MOST_BYTES, "1 or more"),
        ("--shm-size", options.shm_size_bytes, 1, _MOST_BYTES, "one, as 64m"),
        ("--memory-swap", options.memory_swap_bytes, NO_SWAP_LIMIT, _MOST_BYTES, "one, or -1"),
    ):
        if value is not None and not least <= value <= most:
            raise UsageError(f"{option} {value} is out of range: give {remedy}")
    if options.cpuset_cpus is not None and not _CPU_LIST.fullmatch(options.cpuset_cpus):
        raise UsageError(
            f"--cpuset-cpus {options.cpuset_cpus!r} is not usable: give numbers of CPUs, as 0-1,3"
        )


def _check_memory(options: ContainerOptions) -> None:
    swap, memory = options.memory_swap_bytes, options.memory_bytes
    if swap is None or swap == NO_SWAP_LIMIT:
        return
    if memory is None:
        raise UsageError("--memory-swap is of memory and swap together: give --memory too")
    if swap < memory:
        raise UsageError(f"--memory-swap {swap} is less than --memory {memory}: give the same")


def _check_etc(options: ContainerOptions) -> None:
    """Options of /etc/hosts and /etc/resolv.conf."""
    for text in options.add_hosts:
        parse_add_host(text)
    for server in options.dns:
        try:
            ip_address(server)
        except ValueError as error:
            raise UsageError(f"--dns {server!r} is no address: give one of a server") from error
    shared = any(shared_with(n) is not None for n in options.networks)
    if shared and (options.add_hosts or options.dns):
        raise UsageError("--net container:NAME shares /etc: give --add-host and --dns to NAME")
