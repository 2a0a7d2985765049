"""Runs a program as a unit's settings would have it: a small stand-in for systemd.

    python -m tests.netns.systemd_unit.confine SETTINGS.json PROGRAM [ARGUMENT…]

Done here: the bounding set of capabilities, no-new-privileges, read-only and hidden file systems,
and the filters of system calls (address families, namespaces, real-time scheduling, personality,
kernel modules, logs, clock, host name, memory that is written and executed).  Not done: what
systemd does with control groups, so ``DevicePolicy=`` and limits.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

_NEWNS, _NEWUTS = 0x0002_0000, 0x0400_0000
_NAMESPACES = {
    "cgroup": 0x0200_0000,
    "ipc": 0x0800_0000,
    "mnt": _NEWNS,
    "net": 0x4000_0000,
    "pid": 0x2000_0000,
    "user": 0x1000_0000,
    "uts": _NEWUTS,
}
_REALTIME = (1, 2, 6)
"""SCHED_FIFO, SCHED_RR, SCHED_DEADLINE (linux/sched.h)."""
_AF_MAX = 64
_PROT_WRITE, _PROT_EXEC, _SHM_EXEC = 2, 4, 0o100000
_MODULES = ("init_module", "finit_module", "delete_module")
_CLOCK = ("clock_settime", "clock_adjtime", "settimeofday", "adjtimex")
_EQ, _MASKED_EQ = 4, 7
_NO_NEW_PRIVILEGES = 3
"""SCMP_FLTATR_CTL_NNP (seccomp.h)."""
_ALLOW, _ERRNO = 0x7FFF_0000, 0x0005_0000


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


class Filter:
    """A filter of system calls that allows what is not denied (libseccomp)."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libseccomp.so.2", use_errno=True)
        self._lib.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._lib.seccomp_init(_ALLOW))
        # Whether new privileges may be had is the unit's to say.
        self._lib.seccomp_attr_set(self._context, _NO_NEW_PRIVILEGES, 0)
        self._denies = False

    def deny(
        self,
        call: str,
        *where: tuple[int, int, int] | tuple[int, int, int, int],
        error: int = errno.EPERM,
    ) -> None:
        """Deny a call with these arguments: (number, comparison, value or mask and value)."""
        number = self._lib.seccomp_syscall_resolve_name(call.encode())
        if number < 0:
            return  # this architecture has no such call
        found = (_Comparison * len(where))(*(_Comparison(*one) for one in where))
        failed = self._lib.seccomp_rule_add_array(
            self._context, _ERRNO | error, number, len(where), found
        )
        if failed:
            raise OSError(-failed, f"{call} cannot be denied")
        self._denies = True

    def load(self) -> None:
        """From here on; a filter that denies nothing is none."""
        if not self._denies:
            return
        if failed := self._lib.seccomp_load(self._context):
            raise OSError(-failed, "the filter of system calls cannot be loaded")


def confine(settings: dict[str, Any]) -> None:
    """Do to this process all but its capabilities."""
    values, lists = settings["values"], settings["lists"]
    on = {name for name, value in values.items() if value in ("yes", "true")}
    if values.get("ProtectSystem") == "strict":
        _protect_files(on, settings["writable"], settings["kept"])
    _filter_calls(on, values, lists)


def _protect_files(on: set[str], writable: list[str], kept: list[str]) -> None:
    """Everything is read-only but the service's directories, /dev, /proc and /sys."""
    _unshare(_NEWNS | (_NEWUTS if "ProtectHostname" in on else 0))
    _mount("--make-rprivate", "/")
    hidden = []
    if "ProtectHome" in on:
        hidden += ["/home", "/root", "/run/user"]
    if "PrivateTmp" in on:
        hidden += ["/tmp", "/var/tmp"]
    held = [(path, os.open(path, os.O_PATH)) for path in [*kept, *writable]]
    for path in hidden:
        if Path(path).is_dir():
            _mount("-t", "tmpfs", "-o", "mode=755", "none", path)
    for path, fd in held:
        if not Path(path).exists():
            Path(path).mkdir(parents=True)
        # The directory itself, whatever hides it by now.
        _mount("-c", "--rbind", f"/proc/self/fd/{fd}", path, pass_fds=(fd,))
    own = {"/dev", "/proc", "/sys", *writable}
    if "PrivateTmp" in on:
        own |= {"/tmp", "/var/tmp"}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4]
        if not any(point == path or point.startswith(f"{path}/") for path in own):
            _mount("-o", "remount,bind,ro", point, may_fail=point != "/")
    if "ProtectControlGroups" in on:
        _mount("-o", "remount,bind,ro", "/sys/fs/cgroup", may_fail=True)


def _unshare(flags: int) -> None:
    """unshare(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def _mount(*arguments: str, may_fail: bool = False, pass_fds: tuple[int, ...] = ()) -> None:
    done = subprocess.run(
        ["mount", *arguments], capture_output=True, text=True, check=False, pass_fds=pass_fds
    )
    if done.returncode and not may_fail:
        raise OSError(f"mount {' '.join(arguments)}: {done.stderr.strip()}")


def _filter_calls(on: set[str], values: dict[str, str], lists: dict[str, list[str]]) -> None:
    calls = Filter()
    families = {int(getattr(socket, name)) for name in lists.get("RestrictAddressFamilies", [])}
    if families:
        for family in set(range(_AF_MAX)) - families:
            calls.deny("socket", (0, _EQ, family), error=errno.EAFNOSUPPORT)
    if values.get("RestrictNamespaces", "no") != "no":
        allowed = 0
        for name in values["RestrictNamespaces"].split():
            allowed |= _NAMESPACES.get(name, 0)
        calls.deny("clone3", error=errno.ENOSYS)
        calls.deny("setns", (1, _EQ, 0))
        for flag in _NAMESPACES.values():
            if not flag & allowed:
                calls.deny("unshare", (0, _MASKED_EQ, flag, flag))
                calls.deny("clone", (0, _MASKED_EQ, flag, flag))
                calls.deny("setns", (1, _MASKED_EQ, flag, flag))
    if "RestrictRealtime" in on:
        for policy in _REALTIME:
            calls.deny("sched_setscheduler", (1, _EQ, policy))
    if "LockPersonality" in on:
        for persona in (0x0008, 0x0004_0000, 0x0020_0000):  # PER_LINUX32, ADDR_NO_RANDOMIZE, …
            calls.deny("personality", (0, _EQ, persona))
    for name, denied in (
        ("ProtectKernelModules", _MODULES),
        ("ProtectClock", _CLOCK),
        ("ProtectKernelLogs", ("syslog",)),
        ("ProtectHostname", ("sethostname", "setdomainname")),
    ):
        if name in on:
            for call in denied:
                calls.deny(call)
    if "MemoryDenyWriteExecute" in on:
        both = _PROT_WRITE | _PROT_EXEC
        calls.deny("mmap", (2, _MASKED_EQ, both, both))
        calls.deny("mprotect", (2, _MASKED_EQ, _PROT_EXEC, _PROT_EXEC))
        calls.deny("pkey_mprotect", (2, _MASKED_EQ, _PROT_EXEC, _PROT_EXEC))
        calls.deny("shmat", (2, _MASKED_EQ, _SHM_EXEC, _SHM_EXEC))
    calls.load()


def main() -> None:
    """Confine this process and become the program."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    confine(settings)
    argv = ["setpriv"]
    if settings["capabilities"] is not None:
        kept = "".join(f",+{name}" for name in settings["capabilities"])
        argv += [f"--bounding-set=-all{kept}", "--inh-caps=-all"]
    if settings["values"].get("NoNewPrivileges") == "yes":
        argv.append("--no-new-privs")
    os.execvp(argv[0], [*argv, *sys.argv[2:]])


if __name__ == "__main__":
    main()
