"""Kernel settings of a container's own namespaces, ``--sysctl K=V``.

Which ones belong to a namespace: namespaces(7), and runc's list.  Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.errors import UsageError

if TYPE_CHECKING:
    from meshnet.runtime.spec.options import ContainerOptions

_OF_IPC = frozenset((
    "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall",
    "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
))  # fmt: skip


def parse_sysctl(text: str) -> tuple[str, str]:
    """``net.ipv4.ip_forward=1``; slashes instead of dots too.

    Raises:
        UsageError: it is of no namespace: it would change the host.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    name = key.replace("/", ".")
    if not equals or ".." in name or not (name in _OF_IPC or _of_net(name) or _of_mqueue(name)):
        raise UsageError(
            f"sysctl {text!r} is not usable: give K=V, K of net.*, fs.mqueue.* or "
            "kernel.msg*, sem and shm*, which a namespace has of its own"
        )
    # A dot of an interface's name (net/ipv4/conf/eth0.5/...) stays one.
    return key, value.strip()


def check_sysctls(options: ContainerOptions) -> None:
    """Refuse those of a namespace that is not the container's own.

    Raises:
        UsageError: the message names it.
    """
    for text in options.sysctls:
        name = parse_sysctl(text)[0].replace("/", ".")
        shared = any(n == "host" or n.startswith("container:") for n in options.networks)
        if (_of_net(name) and shared) or (not _of_net(name) and options.ipc is not None):
            kind = "net" if _of_net(name) else "ipc"
            raise UsageError(f"sysctl {name} would change the namespace that --{kind} shares")


def _of_net(name: str) -> bool:
    return name.startswith("net.")


def _of_mqueue(name: str) -> bool:
    return name.startswith("fs.mqueue.")
