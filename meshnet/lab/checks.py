"""Checks the machine before a lab is built, and claims the lab's name.

May import only the standard library, `meshnet.errors` and the lab's lower modules.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from meshnet.errors import ConflictError, NotFoundError, PolicyRefusedError, UsageError
from meshnet.lab.netns import DEFAULT_LAB, list_netns
from meshnet.lab.state import agent_socket

if TYPE_CHECKING:
    from pathlib import Path

_SOCKET_PATH_BYTES = 107  # unix(7): sun_path, less its final zero
_PROGRAMS = {
    "ip": "iproute2",
    "bridge": "iproute2",
    "nsenter": "util-linux",
    "etcd": "etcd-server",
    "etcdctl": "etcd-client",
}


def check_machine() -> None:
    """Refuse to build a lab if the machine lacks a program, or the caller is not root.

    Raises:
        PolicyRefusedError: the caller is not root.
        NotFoundError: programs are missing; the message names their packages.
    """
    if os.geteuid() != 0:
        raise PolicyRefusedError("a lab makes network namespaces, which needs root: use sudo")
    missing = [
        f"{program} (package {package})"
        for program, package in _PROGRAMS.items()
        if shutil.which(program) is None
    ]
    if missing:
        raise NotFoundError(
            f"a lab needs programs that are not installed: install {', '.join(missing)}"
        )


def check_socket_path(base_dir: Path, host: str) -> None:
    """Refuse a lab directory so deep that an agent cannot bind its socket in it.

    Raises:
        UsageError: the path is too long.
    """
    path = agent_socket(base_dir, host)
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise UsageError(
            f"socket path {path} is too long for the kernel: "
            f"use a directory or lab name that makes it {_SOCKET_PATH_BYTES} bytes or less"
        )


def claim(name: str, base_dir: Path) -> None:
    """Claim a lab's name by making its directory: of two programs at once, mkdir(2) lets one.

    Raises:
        ConflictError: a lab of that name is there, or left something; the message has the remedy.
    """
    option = "" if name == DEFAULT_LAB else f" --name {name}"
    remedy = f"use it, or remove it with 'meshnet lab down{option}'"
    left = list_netns(name)
    if left:
        raise ConflictError(f"lab {name!r} exists already (namespace {', '.join(left)}): {remedy}")
    try:
        # Twice, because another lab's 'down' removes the parent when it finds it empty, perhaps
        # between these two calls.
        with contextlib.suppress(FileNotFoundError):
            base_dir.parent.mkdir(parents=True, exist_ok=True)
            base_dir.mkdir()
            return
        base_dir.mkdir(parents=True)
    except FileExistsError as exc:
        raise ConflictError(f"lab {name!r} exists already ({base_dir}): {remedy}") from exc
