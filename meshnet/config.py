"""The agent's settings: command line over environment over TOML file over defaults.

Every setting has one name: ``--lease-ttl`` on the command line is ``MESHNET_LEASE_TTL`` in the
environment and ``lease-ttl`` in the file.  An unknown key or variable is an error: a setting with
a typing error would otherwise keep its default, and nobody would notice.

Pure: the caller passes arguments, environment and the file's text.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from meshnet.errors import UsageError
from meshnet.text import check_name, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshnet.model import IpAddress


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        name: on the command line, without the dashes.
        metavar: what ``--help`` calls its value.
        help: what it does, for ``--help``.
        default: its value if nothing sets it.
        choices: the values that it may have, if they are few.
        secret: it is not an option, because ``ps`` shows the command line to everybody.
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
    Setting("etcd", "URL[,URL…]", "connect to etcd at these URLs, for example http://10.0.0.1:2379"),
    Setting("underlay-ip", "IP", "start tunnels from this address of the host"),
    Setting("underlay-dev", "IF", "start them from the first global address of this link instead"),
    Setting("host-id", "ID", "name this host in the mesh (default: the hostname)"),
    Setting("run-dir", "DIR", "make agent.sock in this directory", "/run/meshnet"),
    Setting("state-dir", "DIR", "keep here what survives a restart", "/var/lib/meshnet"),
    Setting("lease-ttl", "S", "count a host as dead after S seconds of silence", "15"),
    Setting("grace", "S", "keep routes to a dead host for S seconds", "3600"),
    Setting("resync", "S", "compare everything with the kernel every S seconds", "60"),
    Setting(
        "vxlan", "MODE", "choose what forwards packets: auto, kernel or userspace", "auto",
        choices=("auto", "kernel", "userspace"),
    ),
    Setting(
        "vtep-engine", "ENGINE", "choose the engine of userspace VTEPs: python, native, or auto: "
        "native where it is built", "auto",
        choices=("auto", "python", "native"),
    ),
    Setting(
        "takeover-confirm", "S",
        "after a bridge took the host's link over, undo that unless the gateway and etcd answer "
        "within S seconds", "5",
    ),
    Setting("image-max-bytes", "N", "limit an image to N bytes once unpacked", str(32 << 30)),
    Setting("image-max-entries", "N", "limit an image to N files", "1000000"),
    Setting(
        "userns-range", "FIRST:SIZE",
        "give containers with --userns auto ids of this range of the host",
        "2147483648:1073741824",
    ),
    Setting(
        "cgroup-driver", "DRIVER", "choose who makes the containers' cgroups: cgroupfs or systemd",
        "cgroupfs",
        choices=("cgroupfs", "systemd"),
    ),
    Setting(
        "open-firewalls", "MODE",
        "allow networks' packets in the host's other firewalls (Docker's rules, firewalld, ufw): "
        "auto or off", "auto",
        choices=("auto", "off"),
    ),
    Setting("etcd-ca", "FILE", "check etcd's certificate against this CA's (PEM)"),
    Setting("etcd-cert", "FILE", "show etcd this client certificate (PEM)"),
    Setting("etcd-key", "FILE", "use this key of the client certificate (PEM)"),
    Setting("etcd-user", "USER", "log in to etcd as this user"),
    Setting("etcd-password", "PASSWORD", "log in to etcd with this password", secret=True),
    Setting("etcd-password-file", "FILE", "read the password for etcd from this file's first line"),
    Setting(
        "log-level", "LEVEL", "log only from this level on: debug, info, warning or error", "info",
        choices=("debug", "info", "warning", "error"),
    ),
    Setting("log-format", "FORMAT", "log as text or json", "text", choices=("text", "json")),
)  # fmt: skip

_SHOWN, _LONGEST = 200, 4096
"""Characters of a wrong value that messages repeat, and characters that any value may have."""

CLIENT_VARIABLES = frozenset(("MESHNET_SOCKET", "MESHNET_ETCD"))
"""Variables of the client and the lab.  The agent ignores them: it may be started from a shell that
has them set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Checked settings.

    `__repr__` shows the host id alone: a password, or a URL with one in it, must not get into logs.
    """

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
    vtep_engine: str
    image_max_bytes: int
    image_max_entries: int
    takeover_confirm_s: float
    userns_range: str
    cgroup_driver: str
    open_firewalls: str
    etcd_ca: str | None
    etcd_cert: str | None
    etcd_key: str | None
    etcd_user: str | None
    etcd_password: str | None
    etcd_password_file: str | None
    log_level: str
    log_format: str

    def __repr__(self) -> str:
        return f"AgentConfig(host_id={self.host_id!r})"


def load_config(
    arguments: Mapping[str, str | None],
    environment: Mapping[str, str],
    toml_text: str | None,
    *,
    hostname: str,
    toml_name: str = "the config file",
) -> AgentConfig:
    """Merge all sources and check the result.

    Args:
        arguments: values by the settings' names; None for an option that was not given.
        environment: all variables of the process.
        toml_text: the config file's text, if there is a file.
        hostname: the default of ``host-id``.
        toml_name: what messages call the file.

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
                _check_text(name, value, source)
                values[name] = value
                sources[name] = source
    return _check(values, sources, hostname)


def _check_text(name: str, value: str, source: str) -> None:
    """Refuse a value that can neither name a file nor be sent to etcd.

    The message does not repeat the value: it may be a secret.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} ({source}) is not UTF-8: correct it") from error
    if "\0" in value or "\n" in value or len(value) > _LONGEST:
        raise UsageError(
            f"{name} ({source}) has a NUL, a line break or more than {_LONGEST} characters: "
            "correct it"
        )


def _from_toml(text: str | None, name: str) -> dict[str, str]:
    if text is None:
        return {}
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers of thousands of digits
        raise UsageError(f"{name} is not TOML: {printable(str(error), _SHOWN)}") from error
    known = {s.name for s in SETTINGS}
    values = {}
    for key, value in document.items():
        if key not in known:
            raise UsageError(
                f"{name} has unknown key {key[:_SHOWN]!r}: choose from {', '.join(sorted(known))}"
            )
        try:
            if key == "etcd" and isinstance(value, list) and all(isinstance(v, str) for v in value):
                values[key] = ",".join(value)
            # To Python a bool is an int, too; no setting takes one.
            elif isinstance(value, str | int | float) and not isinstance(value, bool):
                values[key] = str(value)
            else:
                # Not repeated: it may be a secret that somebody put in brackets.
                raise UsageError(
                    f"{name}: {key} is a {type(value).__name__}: give a string or a number"
                )
        except ValueError as error:  # a number of more digits than Python writes
            raise UsageError(f"{name}: {key} is a number out of range") from error
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
                f"environment variable {printable(variable, _SHOWN)} is unknown: settings are "
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
                f"{setting.name} is {_shown(value)} ({sources[setting.name]}): "
                f"choose {', '.join(setting.choices)}"
            )
    etcd = tuple(url.strip() for url in (values["etcd"] or "").split(",") if url.strip())
    if not etcd:
        raise UsageError("etcd is not set: give --etcd URL, such as http://10.0.0.1:2379")
    if bool(values["underlay-ip"]) == bool(values["underlay-dev"]):
        which = "both are given" if values["underlay-ip"] else "neither is given"
        raise UsageError(f"give --underlay-ip IP or --underlay-dev IF, one of them: {which}")
    if bool(values["etcd-cert"]) != bool(values["etcd-key"]):
        raise UsageError("give --etcd-cert and --etcd-key together")
    host_id = values["host-id"] or hostname
    check_name("host", host_id)
    text: dict[str, Any] = {s.field: values[s.name] or s.default for s in SETTINGS}
    text |= {
        "etcd": etcd,
        "underlay_ip": _ip(values["underlay-ip"], sources["underlay-ip"]),
        "host_id": host_id,
        "lease_ttl_s": int(_number(values, sources, "lease-ttl", 2, 3600)),
        "grace_s": _number(values, sources, "grace", 0, 365 * 86400),
        "resync_s": _number(values, sources, "resync", 1, 86400),
        "image_max_bytes": int(
            _number(values, sources, "image-max-bytes", 1, 1 << 50, unit="bytes")
        ),
        "image_max_entries": int(
            _number(values, sources, "image-max-entries", 1, 1 << 40, unit="a number")
        ),
        "takeover_confirm_s": _number(values, sources, "takeover-confirm", 1, 60),
    }
    for gone in ("lease_ttl", "grace", "resync", "takeover_confirm"):
        del text[gone]
    return AgentConfig(**text)


def _shown(value: str | None) -> str:
    return repr(value if value is None else value[:_SHOWN])


def _number(
    values: Mapping[str, str | None],
    sources: Mapping[str, str],
    name: str,
    least: int,
    most: int,
    *,
    unit: str = "seconds",
) -> float:
    try:
        number = float(values[name] or "")
    except ValueError:
        number = float("nan")  # which is in no range
    if not least <= number <= most:
        raise UsageError(
            f"{name} is {_shown(values[name])} ({sources[name]}): "
            f"give {unit} from {least} to {most}"
        )
    return number


def _ip(text: str | None, source: str) -> IpAddress | None:
    if not text:
        return None
    try:
        return ip_address(text)
    except ValueError as error:
        raise UsageError(f"underlay-ip is {_shown(text)} ({source}): give an IP address") from error
