"""Whether the options of a container can be read and go together.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import TYPE_CHECKING

from meshnet.errors import UsageError
from meshnet.runtime.spec.devices import parse_device
from meshnet.runtime.spec.options import (
    MOST_TIMEOUT_S,
    NO_NETWORKS,
    NO_SWAP_LIMIT,
    parse_add_host,
    parse_label,
    parse_restart,
    parse_volume,
    shared_with,
)
from meshnet.runtime.spec.sysctls import check_sysctls
from meshnet.runtime.spec.ulimits import parse_ulimit
from meshnet.runtime.spec.userns import check_userns
from meshnet.text import check_name

if TYPE_CHECKING:
    from meshnet.runtime.spec.options import ContainerOptions

_LEAST_LOG_BYTES = 64 << 10
_LEAST_MEMORY_BYTES = 6 << 20
"""Docker's: with less nothing can be started."""
_MOST_BYTES = (1 << 63) - 1
_CPU_LIST = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


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
            raise UsageError(f"--dns {server!r} is not an address: give a name server's") from error
    shared = any(shared_with(n) is not None for n in options.networks)
    if shared and (options.add_hosts or options.dns):
        raise UsageError("--net container:NAME shares /etc: give --add-host and --dns to NAME")
