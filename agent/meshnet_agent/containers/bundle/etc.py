"""A container's own ``/etc/hosts``, ``/etc/hostname`` and ``/etc/resolv.conf``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from meshnet.runtime.spec.options import parse_add_host

if TYPE_CHECKING:
    from meshnet.runtime.spec.options import ContainerOptions
    from meshnet_agent.containers.record import ContainerRecord

_FILES = ("hosts", "hostname", "resolv.conf")


def etc_files(directory: Path) -> dict[str, str]:
    """The files in a container's directory, by where the container sees them."""
    return {f"/etc/{name}": str(directory / name) for name in _FILES}


def write_etc(directory: Path, record: ContainerRecord) -> None:
    """Write the files in place: a container that is being made may have them mounted."""
    (directory / "hosts").write_text("\n".join(_hosts(record)) + "\n")
    (directory / "hostname").write_text(record.hostname + "\n")
    (directory / "resolv.conf").write_text(_resolv_conf(record.options))
    for name in _FILES:
        (directory / name).chmod(0o644)
        if record.ids is not None:
            os.chown(directory / name, record.ids.first, record.ids.first)


def _hosts(record: ContainerRecord) -> list[str]:
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    if record.options.networks == ("host",):
        with contextlib.suppress(OSError):
            lines = Path("/etc/hosts").read_text().splitlines()
    name = "" if record.name == record.hostname else f" {record.name}"
    for endpoint in record.endpoints:
        lines += [f"{address}\t{record.hostname}{name}" for address in endpoint.addresses]
    for other, address in map(parse_add_host, record.options.add_hosts):
        lines.append(f"{address}\t{other}")
    return lines


def _resolv_conf(options: ContainerOptions) -> str:
    """The host's file, with the name servers of ``--dns`` instead of its own.

    Without ``--dns``, those at loopback addresses are left out: inside nobody answers there.
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
