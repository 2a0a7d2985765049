"""From options to an OCI runtime configuration (``config.json``, runtime-spec 1.0.2).

Defaults are Docker's: capabilities, seccomp, masked and read-only paths, devices and mounts;
on top of them no-new-privileges.  Pure: the caller brings what has to be looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meshnet.errors import UsageError
from meshnet.runtime.spec.options import NO_SWAP_LIMIT, parse_volume
from meshnet.runtime.spec.sysctls import parse_sysctl
from meshnet.runtime.spec.ulimits import parse_ulimit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from meshnet.runtime.spec.devices import Device
    from meshnet.runtime.spec.id_ranges import IdRange
    from meshnet.runtime.spec.options import ContainerOptions, Volume
    from meshnet.runtime.spec.users import User

Document = dict[str, Any]

DEFAULT_CAPABILITIES = (
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
    "CAP_MKNOD", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP",
    "CAP_SETUID", "CAP_SYS_CHROOT",
)  # fmt: skip
CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
    "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
    "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)  # fmt: skip
"""By number: linux/capability.h."""
MASKED_PATHS = (
    "/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
)  # fmt: skip
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PERIOD_US = 100_000
_DEVICES = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2))
"""null, zero, full, random, urandom, tty, console, ptmx: what runtime-spec makes in any case."""
INIT_PATH = "/dev/init"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What had to be looked up or decided outside of the options.

    Attributes:
        args: the program and its arguments, of options and image.
        env: the image's variables, under those of the options.
        rootfs: where the root file system is mounted on the host.
        namespaces: paths of those that are joined, by type; None: the host's own.
        files: files of the host at fixed places of the container (``/etc/hosts`` and so on).
        effective: capabilities the agent itself may give away.
        init: the host's init program, if one is wanted.
        volumes: further ones, which have no path in the options.
        ids: of the host, if ``user`` is among the namespaces.
        devices: of the host, besides the usual ones.
        accounts_swap: whether the kernel can limit swap.
        unified_io: whether disks are shared by cgroups v2; for v1 see `set_blkio_weight`.
    """

    args: tuple[str, ...]
    env: tuple[str, ...] = ()
    workdir: str = "/"
    user: User
    hostname: str
    rootfs: str
    cgroup: str
    namespaces: Mapping[str, str | None]
    files: Mapping[str, str]
    seccomp: Document | None
    effective: frozenset[str] = frozenset(CAPABILITIES)
    init: str | None = None
    volumes: tuple[Volume, ...] = ()
    ids: IdRange | None = None
    devices: tuple[Device, ...] = ()
    accounts_swap: bool = False
    unified_io: bool = True


def capabilities(options: ContainerOptions, effective: frozenset[str]) -> tuple[str, ...]:
    """The bounding set: Docker's default, plus ``--cap-add``, less ``--cap-drop``.

    Raises:
        UsageError: an unknown capability.
    """
    if options.privileged:
        return tuple(sorted(effective))
    added, dropped = _named(options.cap_add), _named(options.cap_drop)
    if "CAP_ALL" in added:
        wanted = effective - (dropped - {"CAP_ALL"})
    elif "CAP_ALL" in dropped:
        wanted = frozenset(added)
    else:
        wanted = frozenset(DEFAULT_CAPABILITIES) - dropped | added
    return tuple(sorted(wanted & effective))


def _named(words: Iterable[str]) -> frozenset[str]:
    found = {"CAP_" + w.upper().removeprefix("CAP_") for w in words}
    for name in found - {"CAP_ALL", *CAPABILITIES}:
        raise UsageError(f"capability {name} is unknown: see capabilities(7)")
    return frozenset(found)


def merge_env(*layers: Iterable[str]) -> list[str]:
    """``K=V`` of several sources; a later one wins."""
    found: dict[str, str] = {}
    for layer in layers:
        for text in layer:
            key, _, value = text.partition("=")
            found[key] = value
    return [f"{key}={value}" for key, value in found.items()]


def make_process(
    options: ContainerOptions, around: Surroundings, args: tuple[str, ...], *, tty: bool
) -> Document:
    """The member ``process``, also of an exec."""
    given = list(capabilities(options, around.effective))
    held = given if around.user.uid == 0 or options.privileged else []
    base = [_PATH, f"HOSTNAME={around.hostname}", f"HOME={around.user.home}"]
    process: Document = {
        "terminal": tty,
        "user": {
            "uid": around.user.uid,
            "gid": around.user.gid,
            "additionalGids": list(around.user.groups),
        },
        "args": list(args),
        "env": merge_env(base, ["TERM=xterm"] if tty else [], around.env, options.env),
        "cwd": around.workdir,
        "capabilities": {
            "bounding": given,
            "effective": held,
            "permitted": held,
            "inheritable": [],
        },
        "noNewPrivileges": not options.privileged,
    }
    if options.ulimits:
        # A later one wins, as in Docker.
        limits = {u.name: u for u in map(parse_ulimit, options.ulimits)}
        process["rlimits"] = [
            {"type": f"RLIMIT_{name.upper()}", "soft": limit.soft, "hard": limit.hard}
            for name, limit in limits.items()
        ]
    return process


def make_spec(options: ContainerOptions, around: Surroundings) -> Document:
    """The whole configuration.

    Raises:
        UsageError: an option cannot be read.
    """
    args = around.args
    mounts = _mounts(options, around)
    if around.init is not None:
        args = (INIT_PATH, "--", *args)
        mounts.append(_bind(around.init, INIT_PATH, read_only=True))
    linux: Document = {
        "cgroupsPath": around.cgroup,
        "namespaces": [
            {"type": kind} | ({"path": path} if path else {})
            for kind, path in {"mount": "", "cgroup": "", **around.namespaces}.items()
            if path is not None
        ],
        "resources": _resources(options, around),
    }
    if around.ids is not None:
        mapping = {"containerID": 0, "hostID": around.ids.first, "size": around.ids.size}
        linux |= {"uidMappings": [mapping], "gidMappings": [mapping]}
    if options.sysctls:
        linux["sysctl"] = dict(map(parse_sysctl, options.sysctls))
    if around.devices:
        linux["devices"] = [
            {
                "path": device.path,
                "type": device.kind,
                "major": device.major,
                "minor": device.minor,
                "fileMode": device.mode,
                "uid": device.uid,
                "gid": device.gid,
            }
            for device in around.devices
        ]
    if not options.privileged:
        linux |= {"maskedPaths": list(MASKED_PATHS), "readonlyPaths": list(READONLY_PATHS)}
        if around.seccomp is not None:
            linux["seccomp"] = around.seccomp
    spec: Document = {
        "ociVersion": "1.0.2",
        "process": make_process(options, around, args, tty=options.tty),
        "root": {"path": around.rootfs, "readonly": options.read_only},
        "mounts": mounts,
        "linux": linux,
    }
    if around.namespaces.get("uts") == "":
        spec["hostname"] = around.hostname
    return spec


_SAFE = ["nosuid", "noexec", "nodev"]


def standard_mounts(shm_size_bytes: int, *, writable: bool = False) -> list[Document]:
    """What every container has mounted, but for /sys.

    Args:
        writable: whether it may write to its control group.
    """
    return [
        _mount("/proc", "proc", _SAFE),
        _mount("/dev", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "/dev/pts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        _mount("/sys/fs/cgroup", "cgroup", [*_SAFE, "relatime", "rw" if writable else "ro"]),
        _mount("/dev/mqueue", "mqueue", _SAFE),
        _mount("/dev/shm", "tmpfs", [*_SAFE, "mode=1777", f"size={shm_size_bytes}"]),
    ]


def _mounts(options: ContainerOptions, around: Surroundings) -> list[Document]:
    writable = "rw" if options.privileged else "ro"
    mounts = standard_mounts(options.shm_size_bytes, writable=options.privileged)
    # sysfs shows the network namespace's own links, and only the owner of that may mount it.
    if around.namespaces.get("network", "") is None:
        mounts.insert(3, _bind("/sys", "/sys", read_only=not options.privileged))
    else:
        mounts.insert(3, _mount("/sys", "sysfs", [*_SAFE, writable]))
    if options.ipc is not None:
        mounts = [m for m in mounts if m["destination"] != "/dev/mqueue"]
    for text in options.tmpfs:
        path, _, extra = text.partition(":")
        mounts.append(_mount(path, "tmpfs", [*_SAFE, *filter(None, extra.split(","))]))
    mounts += [_bind(source, place) for place, source in around.files.items()]
    binds = [v for v in map(parse_volume, options.volumes) if v.is_bind]
    # What is mounted inside of another comes after it.
    for volume in sorted((*binds, *around.volumes), key=lambda v: v.destination.count("/")):
        mounts.append(_bind(volume.source, volume.destination, read_only=volume.read_only))
    return mounts


def _mount(destination: str, kind: str, options: list[str]) -> Document:
    return {"destination": destination, "type": kind, "source": kind, "options": options}


def _bind(source: str, destination: str, *, read_only: bool = False) -> Document:
    options = ["rbind", "rprivate", "ro" if read_only else "rw"]
    return {"destination": destination, "type": "bind", "source": source, "options": options}


def _resources(options: ContainerOptions, around: Surroundings) -> Document:
    allowed = [
        {"allow": True, "type": "c", "major": major, "minor": minor, "access": "rwm"}
        for major, minor in _DEVICES
    ]
    # Nodes may be made, not opened; pseudo-terminals are character devices 136.
    allowed += [
        {"allow": True, "type": "c", "access": "m"},
        {"allow": True, "type": "b", "access": "m"},
        {"allow": True, "type": "c", "major": 136, "access": "rwm"},
    ]
    allowed += [
        {
            "allow": True,
            "type": device.kind,
            "major": device.major,
            "minor": device.minor,
            "access": device.access,
        }
        for device in around.devices
    ]
    devices: list[Document] = [{"allow": options.privileged, "access": "rwm"}]
    resources: Document = {"devices": devices + ([] if options.privileged else allowed)}
    cpu: Document = {}
    if options.cpus is not None:
        cpu |= {"quota": round(options.cpus * _PERIOD_US), "period": _PERIOD_US}
    if options.cpu_shares is not None:
        cpu["shares"] = options.cpu_shares
    if options.cpuset_cpus is not None:
        cpu["cpus"] = options.cpuset_cpus
    memory = _memory(options, around)
    if cpu:
        resources["cpu"] = cpu
    if memory:
        resources["memory"] = memory
    if options.pids_limit is not None:
        resources["pids"] = {"limit": options.pids_limit}
    if options.blkio_weight is not None and around.unified_io:
        resources["blockIO"] = {"weight": options.blkio_weight}
    return resources


def _memory(options: ContainerOptions, around: Surroundings) -> Document:
    memory: Document = {}
    if options.memory_bytes is not None:
        memory["limit"] = options.memory_bytes
        if around.accounts_swap and options.memory_swap_bytes is None:
            memory["swap"] = 2 * options.memory_bytes
    if options.memory_swap_bytes is not None:
        # Memory and swap together, on cgroup v2 too: the runtime takes the memory off.
        swap = options.memory_swap_bytes
        if swap != NO_SWAP_LIMIT or options.memory_bytes is not None:
            memory["swap"] = swap
    if options.memory_reservation_bytes is not None:
        memory["reservation"] = options.memory_reservation_bytes
    return memory
