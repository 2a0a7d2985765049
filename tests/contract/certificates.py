"""Certificates for etcd and its clients, made by openssl."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def make_ca(directory: Path, name: str) -> None:
    """A self-signed CA: ``NAME.crt`` and ``NAME.key``."""
    _openssl(directory, f"req -x509 -subj /CN={name} -keyout {name}.key -out {name}.crt -days 2")


def make_certificate(directory: Path, name: str, ca: str = "ca") -> None:
    """A certificate for loopback with that common name, of a CA in the same directory."""
    _openssl(
        directory,
        f"req -x509 -subj /CN={name} -keyout {name}.key -out {name}.crt -days 2 "
        f"-CA {ca}.crt -CAkey {ca}.key -addext subjectAltName=IP:127.0.0.1 "
        "-addext basicConstraints=critical,CA:FALSE "
        "-addext extendedKeyUsage=serverAuth,clientAuth",
    )


def server_flags(directory: Path) -> list[str]:
    """etcd's flags for TLS with client certificates; it is ``server``."""
    return [
        "--client-cert-auth",
        f"--cert-file={directory / 'server.crt'}",
        f"--key-file={directory / 'server.key'}",
        f"--trusted-ca-file={directory / 'ca.crt'}",
    ]


def client_flags(directory: Path, name: str) -> list[str]:
    """etcdctl's flags to be that client."""
    return [
        f"--cert={directory / name}.crt",
        f"--key={directory / name}.key",
        f"--cacert={directory / 'ca.crt'}",
    ]


def _openssl(directory: Path, arguments: str) -> None:
    subprocess.run(
        ["openssl", *arguments.split(), "-nodes", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1"],
        cwd=directory, check=True, capture_output=True, timeout=10,
    )  # fmt: skip
