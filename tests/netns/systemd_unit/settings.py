"""Reads what a systemd unit and its drop-ins say about a service, from the files themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_DIRECTORY = Path(__file__).parents[3] / "agent" / "systemd"
UNIT = _DIRECTORY / "meshnet-agent.service"
CONTAINERS = _DIRECTORY / "containers.conf"
_EVERYTHING = "~"
_LISTS = {
    *("CapabilityBoundingSet", "AmbientCapabilities", "DeviceAllow", "ReadWritePaths"),
    *("RestrictAddressFamilies", "SystemCallFilter", "SystemCallArchitectures"),
}
_TAKES_CAPABILITIES = {
    "ProtectClock": ("sys_time", "wake_alarm"),
    "ProtectKernelLogs": ("syslog",),
    "ProtectKernelModules": ("sys_module",),
    "ProtectHostname": (),
    "ProtectControlGroups": (),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The section ``[Service]``: each setting's last value, of lists all words since the last
    empty one (systemd.exec(5)).

    Attributes:
        capabilities: without ``CAP_``, in lower case; None: all.
    """

    values: dict[str, str]
    lists: dict[str, list[str]]
    capabilities: frozenset[str] | None

    def is_on(self, name: str) -> bool:
        """Whether a switch is on."""
        return self.values.get(name, "no") in ("yes", "true", "on", "1")

    def without(self, capability: str) -> Settings:
        """The same with one capability less."""
        assert self.capabilities is not None
        return Settings(self.values, self.lists, self.capabilities - {capability})


def read_settings(*files: Path) -> Settings:
    """Read a unit and its drop-ins."""
    values: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    for name, value in _assignments(files):
        if name in _LISTS:
            lists[name] = [*lists.get(name, []), *value.split()] if value else []
        else:
            values[name] = value
    words = lists.get("CapabilityBoundingSet", [_EVERYTHING])
    if words == [_EVERYTHING]:
        return Settings(values, lists, None)
    kept = frozenset(word.removeprefix("CAP_").lower() for word in words)
    taken = {cap for name, caps in _TAKES_CAPABILITIES.items() for cap in caps if values.get(name)}
    return Settings(values, lists, kept - taken)


def _assignments(files: Iterable[Path]) -> Iterable[tuple[str, str]]:
    for file in files:
        section = ""
        for raw in file.read_text().splitlines():
            line = raw.strip()
            if line.startswith("["):
                section = line
            elif section == "[Service]" and line and line[0] not in "#;":
                name, _, value = line.partition("=")
                yield name.strip(), value.strip()
