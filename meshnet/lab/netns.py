"""The lab's network namespaces: their names, making and removing them, running things in them.

Commands enter with ``nsenter`` and not with ``ip netns exec``, which mounts a new /sys over the old
one: that costs time and hides the cgroup tree.  May import only the standard library,
`meshnet.errors` and `meshnet.system.libc`: ``meshnet lab exec`` imports it and must start fast.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError, NotFoundError, PolicyRefusedError, UsageError
from meshnet.system import libc

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NETNS_DIR = Path("/run/netns")
"""Where ip-netns(8) keeps named namespaces."""

DEFAULT_LAB = "lab"
SWITCH = "sw"
ETCD = "etcd"
ETCDS = (ETCD, "etcd2", "etcd3")
"""Names of the members of etcd; a lab has the first one or all."""
BRIDGE = "br0"
"""The switch's bridge.  Its ports have the names of the hosts and of etcd's members."""

_PREFIX = "mnlab-"
_LAB_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
# No hyphen: the host is what follows the last hyphen of a namespace's name, so that lab "a" can
# tell its namespaces from those of lab "a-b".  15 characters, as a host's port on the switch has
# its name: IFNAMSIZ of linux/if.h less the final zero.
_HOST_NAME = re.compile(r"[a-z][a-z0-9]{0,14}")
_RESERVED = frozenset({SWITCH, *ETCDS, BRIDGE, "lo", "all", "default"})
_IP_TIMEOUT_S = 60.0


def check_lab_name(name: str) -> None:
    """Refuse a name that a lab cannot have.

    Raises:
        UsageError: it is not 1 to 40 lower-case letters, digits and hyphens.
    """
    if not _LAB_NAME.fullmatch(name):
        raise UsageError(
            f"lab name {name!r}: use 1 to 40 lower-case letters, digits and hyphens, such as 'lab'"
        )


def check_host_name(name: str) -> None:
    """Refuse a name that a host of a lab cannot have.

    Raises:
        UsageError: it is reserved, or not a letter and up to 14 lower-case letters and digits.
    """
    if name in _RESERVED or not _HOST_NAME.fullmatch(name):
        raise UsageError(
            f"lab host {name!r}: use a letter and up to 14 lower-case letters and digits, "
            f"but not {', '.join(sorted(_RESERVED))}"
        )


def netns_name(lab: str, part: str) -> str:
    """Name the namespace of one host (or of the switch, or etcd) of a lab."""
    return f"{_PREFIX}{part}" if lab == DEFAULT_LAB else f"{_PREFIX}{lab}-{part}"


def netns_path(netns: str) -> Path:
    """Path of a named namespace, for setns(2) and nsenter(1)."""
    return NETNS_DIR / netns


def list_netns(lab: str) -> list[str]:
    """List the namespaces of a lab that exist, half-made ones included, by name."""
    prefix = netns_name(lab, "")
    try:
        names = os.listdir(NETNS_DIR)
    except FileNotFoundError:
        return []
    return sorted(
        name for name in names if name.startswith(prefix) and "-" not in name[len(prefix) :]
    )


def add_netns(names: Iterable[str]) -> None:
    """Make named namespaces.

    Raises:
        KernelRefusedError: one exists, or the kernel refused; those before it are made.
    """
    ip_batch([f"netns add {name}" for name in names])


def delete_netns(names: Sequence[str]) -> None:
    """Remove named namespaces, half-made ones too; skip those that do not exist.

    Raises:
        KernelRefusedError: one is still there.
    """
    present = [name for name in names if netns_path(name).exists()]
    if not present:
        return
    # -force: go on after a failure, as another program may remove the same ones.  So the status
    # says little, and what counts is what is left.
    result = _run_ip(["-force"], [f"netns del {name}" for name in present], None)
    left = [name for name in present if netns_path(name).exists()]
    if left:
        raise KernelRefusedError(
            f"network namespace {', '.join(left)} cannot be removed: {_last_line(result.stderr)}"
        )


def enter_argv(path: Path) -> tuple[str, ...]:
    """Argv to put before a command so that it runs in a namespace; the process id stays."""
    return ("nsenter", f"--net={path}", "--")


def ip_batch(lines: Sequence[str], *, netns: str | None = None) -> None:
    """Run ip(8) once for many commands, in a named namespace or the caller's.

    Once, because starting a program takes longer than what most of these commands do.

    Raises:
        NotFoundError: iproute2 or util-linux is not installed.
        KernelRefusedError: a command failed; it is named, and none after it was run.
    """
    result = _run_ip([], lines, netns)
    if result.returncode != 0:
        # The last line of stderr is "Command failed -:N", with N from 1.
        match = re.search(r"Command failed -:(\d+)", result.stderr)
        failed = lines[int(match[1]) - 1] if match else "-batch"
        reason = result.stderr.strip().splitlines()[:1]
        where = netns or "the current namespace"
        raise KernelRefusedError(f"ip {failed} in {where}: {''.join(reason)}")


def set_netns(path: Path) -> None:
    """Move the calling thread into the namespace at `path` for good.

    Meant for a program that is about to exec.  Python has os.setns only from 3.12 on.

    Raises:
        NotFoundError: there is no namespace at `path`.
        PolicyRefusedError: the caller is not root.
        KernelRefusedError: the kernel refused otherwise.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        raise NotFoundError(f"network namespace {path} does not exist") from exc
    try:
        libc.setns(descriptor, libc.CLONE_NEWNET)
    except PermissionError as exc:
        raise PolicyRefusedError(f"entering network namespace {path} needs root: use sudo") from exc
    except OSError as exc:
        raise KernelRefusedError(f"cannot enter network namespace {path}: {exc.strerror}") from exc
    finally:
        os.close(descriptor)


def _run_ip(
    options: Sequence[str], lines: Sequence[str], netns: str | None
) -> subprocess.CompletedProcess[str]:
    enter = () if netns is None else enter_argv(netns_path(netns))
    try:
        return subprocess.run(
            [*enter, "ip", *options, "-batch", "-"],
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            timeout=_IP_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as exc:
        raise NotFoundError(
            f"{exc.filename} is not installed: install iproute2 and util-linux"
        ) from exc


def _last_line(text: str) -> str:
    return "".join(text.strip().splitlines()[-1:]) or "no reason given"
