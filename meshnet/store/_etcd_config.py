"""How to reach etcd: the settings, checked.

Job: hold the options ``--etcd…`` for `meshnet.store.etcd`.  May import of meshnet only
`meshnet.errors`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from meshnet.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

_DEFAULT_PORT = 2379


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdConfig:
    """How to reach etcd.

    Attributes:
        endpoints: ``http://host[:port]`` or ``https://…``; IPv6 literals in brackets.
        ca_file: PEM of the CAs to trust for ``https``; None: the system's.
        cert_file: PEM of this host's client certificate, with `key_file`.
        key_file: PEM of its key.
        user: etcd user to log in as, with `password`.
        password: never printed.
        timeout_s: how long one call may take, all endpoints together.
        silence_s: how long a watch may hear nothing from etcd before it counts as broken.

    Raises:
        UsageError: an endpoint is malformed, or half of a pair is missing.
    """

    endpoints: tuple[str, ...]
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    timeout_s: float = 5.0
    silence_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise UsageError("no etcd endpoint is given: name at least one URL with --etcd")
        for url in self.endpoints:
            target(url)
        if (self.cert_file is None) != (self.key_file is None):
            raise UsageError("--etcd-cert and --etcd-key go together: give both or none")
        if (self.user is None) != (self.password is None):
            raise UsageError("--etcd-user and its password go together: give both or none")


def target(url: str) -> str:
    """``host:port`` for gRPC, from an endpoint's URL.

    Raises:
        UsageError: the URL is malformed.
    """
    try:
        parts = urlsplit(url)
        host, port, userinfo = parts.hostname, parts.port or _DEFAULT_PORT, "@" in parts.netloc
    except ValueError:
        host, port, userinfo = None, 0, "@" in url
        parts = urlsplit("")
    if userinfo:
        # Not repeated: it may hold a password.
        raise UsageError("an etcd endpoint has a user in its URL: use --etcd-user instead")
    if parts.scheme not in ("http", "https") or not host or parts.path.strip("/") or parts.query:
        raise UsageError(
            f"etcd endpoint {url[:200]!r} is malformed: write http://HOST:PORT or "
            "https://HOST:PORT, IPv6 literals in brackets"
        )
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_pem(path: Path | None, option: str) -> bytes | None:
    """The content of the file that `option` names; None without one.

    Raises:
        UsageError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as exc:
        raise UsageError(f"cannot read {option} {path}: {exc.strerror}") from exc
