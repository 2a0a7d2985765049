"""Docker's default seccomp profile, as the OCI runtime wants it.

``seccomp.json`` is moby's ``profiles/seccomp/default.json`` (Apache-2.0), unchanged.  Its rules
depend on the machine and on the container's capabilities; `resolve` decides them, as moby's
``seccomp_linux.go`` does.  Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_ARCHITECTURES = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"),
}
"""By `os.uname().machine`: Go's and libseccomp's names."""


def resolve(
    profile: Mapping[str, Any],
    capabilities: Collection[str],
    machine: str,
    kernel: tuple[int, int],
) -> dict[str, Any] | None:
    """The member ``linux.seccomp``; None for a machine that the profile does not know.

    Args:
        profile: content of ``seccomp.json``.
        capabilities: the container's bounding set.
        machine: as uname(2) says it.
        kernel: its version.
    """
    if machine not in _ARCHITECTURES:
        return None
    go_name, native = _ARCHITECTURES[machine]

    def applies(rule: Mapping[str, Any]) -> bool:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        if includes.get("arches") and go_name not in includes["arches"]:
            return False
        if any(c not in capabilities for c in includes.get("caps", ())):
            return False
        least = includes.get("minKernel")
        if least and kernel < _version(least):
            return False
        if go_name in excludes.get("arches", ()):
            return False
        return not any(c in capabilities for c in excludes.get("caps", ()))

    architectures = [native]
    for entry in profile["archMap"]:
        if entry["architecture"] == native:
            architectures += entry.get("subArchitectures") or []
    return {
        "defaultAction": profile["defaultAction"],
        "architectures": architectures,
        "syscalls": [_rule(r) for r in profile["syscalls"] if applies(r)],
    }


def _rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    found = {"names": rule["names"], "action": rule["action"], "args": rule.get("args") or []}
    if "errnoRet" in rule:
        found["errnoRet"] = rule["errnoRet"]
    return found


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)
