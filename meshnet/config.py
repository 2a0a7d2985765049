"""The agent's settings: command line over environment over TOML file over defaults.

Every setting has one name: ``--lease-ttl`` on the command line is ``MESHNET_LEASE_TTL`` in the
environment and ``lease-ttl`` in the file.  An unknown key or variable is an error.

Pure: the caller brings arguments, environment and the file's text.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from meshnet.codec import check_name
from meshnet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshnet.model import IpAddress


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its name, what it takes, what it is for.

    Attributes:
        metavar: as shown by ``--help``.
        choices: the values it may have, if they are few.
        secret: never on the command line, where ``ps`` shows it.
    """

    name: str
    metavar: str
    help: str
    default: str | None = None
    choices: tuple[str, ...] = ()
    secret: bool = False

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return "MESHNET_" + self.name.upper().replace("-", "_")

    @property
    def field(self) -> str:
        """Its Python identifier."""
        return self.name.replace("-", "_")


SETTINGS = (
    Setting("etcd", "URL[,URL…]", "etcd's client URLs, such as http://10.0.0.1:2379"),
    Setting("underlay-ip", "IP", "this host's address that tunnels start from"),
    Setting("underlay-dev", "IF", "take the first global address of this link instead"),
    Setting("host-id", "ID", "name of this host in the mesh (default: the hostname)"),
    Setting("run-dir", "DIR", "holds agent.sock", "/run/meshnet"),
    Setting("state-dir", "DIR", "holds what survives a restart", "/var/lib/meshnet"),
    Setting("lease-ttl", "S", "seconds after which a silent host counts as dead", "15"),
    Setting("grace", "S", "seconds that routes to a dead host stay", "3600"),
    Setting("resync", "S", "seconds between full comparisons with the kernel", "60"),
    Setting(
        "vxlan", "MODE", "what forwards packets", "auto", choices=("auto", "kernel", "userspace")
    ),
    Setting(
        "takeover-confirm", "S",
        "seconds in which the gateway and etcd must answer through a bridge that took the host's "
        "link over", "5",
    ),
    Setting("etcd-ca", "FILE", "CA certificate that etcd's is checked against (PEM)"),
    Setting("etcd-cert", "FILE", "client certificate for etcd (PEM)"),
    Setting("etcd-key", "FILE", "key of the client certificate (PEM)"),
    Setting("etcd-user", "USER", "user name for etcd"),
    Setting("etcd-password", "PASSWORD", "password for etcd", secret=True),
    Setting("etcd-password-file", "FILE", "file whose first line is the password for etcd"),
    Setting(
        "log-level", "LEVEL", "least severe messages to log", "info",
        choices=("debug", "info", "warning", "error"),
    ),
    Setting("log-format", "FORMAT", "how to log", "text", choices=("text", "json")),
)  # fmt: skip

CLIENT_VARIABLES = frozenset(("MESHNET_SOCKET", "MESHNET_ETCD"))
"""Variables of the client and the lab, which the agent lets pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Checked settings.  `etcd_password` is kept out of `repr`-based logs by `__repr__`."""

    etcd: tuple[str, ...]
    underlay_ip: IpAddress | None
    underlay_dev: str | None
    host_id: str
    run_dir: str
    state_dir: str
    lease_ttl_s: int
    grace_s: float
    resync_s: float
    vxlan: str
    takeover_confirm_s: float
    etcd_ca: str | None
    etcd_cert: str | None
    etcd_key: str | None
    etcd_user: str | None
    etcd_password: str | None
    etcd_password_file: str | None
    log_level: str
    log_format: str

    def __repr__(self) -> str:
        return f"AgentConfig(host_id={self.host_id!r}, etcd={self.etcd!r})"


def load_config(
    arguments: Mapping[str, str | None],
    environment: Mapping[str, str],
    toml_text: str | None,
    *,
    hostname: str,
    toml_name: str = "the config file",
) -> AgentConfig:
    """Bring all sources together and check the result.

    Args:
        arguments: by setting name; absent ones None.

    Raises:
        UsageError: an unknown key or variable, or a value that does not fit; the message names
            the source.
    """
    values = {s.name: s.default for s in SETTINGS}
    sources = dict.fromkeys(values, "default")
    for source, layer in (
        (toml_name, _from_toml(toml_text, toml_name)),
        ("the environment", _from_environment(environment)),
        ("the command line", arguments),
    ):
        for name, value in layer.items():
            if value is not None:
                values[name] = value
                sources[name] = source
    return _check(values, sources, hostname)


def _from_toml(text: str | None, name: str) -> dict[str, str]:
    if text is None:
        return {}
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is not TOML: {error}") from error
    known = {s.name for s in SETTINGS}
    values = {}
    for key, value in document.items():
        if key not in known:
            raise UsageError(
                f"{name} has unknown key {key!r}: choose from {', '.join(sorted(known))}"
            )
        if key == "etcd" and isinstance(value, list):
            values[key] = ",".join(map(str, value))
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            values[key] = str(value)
        else:
            raise UsageError(f"{name}: {key} is {value!r}: give a string or a number")
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    by_variable = {s.variable: s.name for s in SETTINGS}
    values = {}
    for variable, value in environment.items():
        if variable in by_variable:
            values[by_variable[variable]] = value
        elif (
            variable.startswith("MESHNET_")
            and variable not in CLIENT_VARIABLES
            and variable != "MESHNET_CONFIG"
        ):
            raise UsageError(
                f"environment variable {variable} is unknown: settings are "
                f"{', '.join(sorted(by_variable))}"
            )
    return values


def _check(
    values: Mapping[str, str | None], sources: Mapping[str, str], hostname: str
) -> AgentConfig:
    for setting in SETTINGS:
        value = values[setting.name]
        if setting.choices and value not in setting.choices:
            raise UsageError(
                f"{setting.name} is {value!r} ({sources[setting.name]}): "
                f"choose {', '.join(setting.choices)}"
            )
    etcd = tuple(url.strip() for url in (values["etcd"] or "").split(",") if url.strip())
    if not etcd:
        raise UsageError("etcd is not set: give --etcd URL, such as http://10.0.0.1:2379")
    if bool(values["underlay-ip"]) == bool(values["underlay-dev"]):
        raise UsageError("give one of --underlay-ip IP and --underlay-dev IF, not both")
    if bool(values["etcd-cert"]) != bool(values["etcd-key"]):
        raise UsageError("give --etcd-cert and --etcd-key together")
    host_id = values["host-id"] or hostname
    check_name("host", host_id)
    text: dict[str, Any] = {s.field: values[s.name] or None for s in SETTINGS}
    text |= {
        "etcd": etcd,
        "underlay_ip": _ip(values["underlay-ip"], sources["underlay-ip"]),
        "host_id": host_id,
        "lease_ttl_s": int(_number(values, sources, "lease-ttl", 2, 3600)),
        "grace_s": _number(values, sources, "grace", 0, 365 * 86400),
        "resync_s": _number(values, sources, "resync", 1, 86400),
        "takeover_confirm_s": _number(values, sources, "takeover-confirm", 1, 60),
    }
    for gone in ("lease_ttl", "grace", "resync", "takeover_confirm"):
        del text[gone]
    return AgentConfig(**text)


def _number(
    values: Mapping[str, str | None], sources: Mapping[str, str], name: str, least: int, most: int
) -> float:
    try:
        number = float(values[name] or "")
    except ValueError:
        number = float("nan")
    if not least <= number <= most:
        raise UsageError(
            f"{name} is {values[name]!r} ({sources[name]}): give seconds from {least} to {most}"
        )
    return number


def _ip(text: str | None, source: str) -> IpAddress | None:
    if not text:
        return None
    try:
        return ip_address(text)
    except ValueError as error:
        raise UsageError(f"underlay-ip is {text!r} ({source}): give an IP address") from error
