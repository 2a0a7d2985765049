"""``meshnet run``, ``exec`` and ``start``: the commands that can attach to a container's stdio."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time

from meshnet.cli.client import Client
from meshnet.cli.commands.completion import complete_containers, complete_networks
from meshnet.cli.output import print_either
from meshnet.errors import AgentUnreachableError, MeshnetError, NotFoundError, UsageError

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from meshnet.cli.commands.completion import Subparsers

_ASK_AGAIN_S = 0.05
_RUN_EPILOG = """\
examples:
  meshnet run --net prod --detach --name web web:1
  meshnet run --rm -it --net prod --memory 256m --rootfs /srv/tree /bin/sh

exit status: the command's own; 127 if it does not exist, 126 if it cannot be executed, 128+N if
signal N ended it, 125 if the container could not be started; otherwise as for all commands."""
_FLAGS = (
    (("-d", "--detach"), "return once it runs and its network is up; print its id"),
    (("--rm",), "remove it when it ends"),
    (("--init",), "run it under an init process that reaps zombies and forwards signals"),
    (("--privileged",), "give it all capabilities and devices, without seccomp: unprotected"),
    (("--read-only",), "make its root file system read-only"),
)
_TEXTS = (
    ("--name", "N", "name the container (default: c- and its id)"),
    ("--hostname", "H", "set its host name (default: its id)"),
    ("--entrypoint", "PROGRAM", "run this program (default: the image's)"),
    ("--restart", "POLICY", "restart it: no, on-failure[:N] or always (default: no)"),
    ("--cpuset-cpus", "LIST", "let it use these CPUs only, for example 0-1 (default: all)"),
    ("--pid", "NS", "share the PID namespace of host or container:NAME (default: its own)"),
    ("--ipc", "NS", "share the IPC namespace of host or container:NAME (default: its own)"),
    ("--uts", "NS", "share the UTS namespace of host or container:NAME (default: its own)"),
    ("--userns", "NS", "use the ids of host, auto (its own), auto:FIRST:SIZE or container:NAME "
     "(default: host)"),
    ("--stop-signal", "SIG", "set the signal that stop sends first (default: the image's, or "
     "SIGTERM)"),
    ("--memory", "SIZE", "limit its memory, for example to 256m (default: no limit)"),
    ("--memory-reservation", "SIZE", "set a soft limit of its memory (default: none)"),
    ("--memory-swap", "SIZE", "limit memory and swap together; -1: no limit (default: twice "
     "--memory)"),
    ("--shm-size", "SIZE", "set the size of /dev/shm (default: 64m)"),
    ("--log-max-size", "SIZE", "start its log over at this size; 0: never (default: 64m)"),
)  # fmt: skip
_NUMBERS = (
    ("--cpu-shares", "set its share of CPU time when that is short (default: 1024)"),
    ("--pids-limit", "limit the number of its processes (default: no limit)"),
    ("--blkio-weight", "set its share of the disk, 10 to 1000 (default: the kernel's)"),
    ("--stop-timeout", "set how many seconds stop waits before SIGKILL (default: 10)"),
)
_SEVERAL = (
    (("-v", "--volume"), "[SRC:]DST[:ro]", "mount a path of the host or a volume"),
    (("-p", "--publish"), "[[IP:]HOST:]PORT[/udp]", "publish one of its ports on this host"),
    (("--tmpfs",), "DIR[:OPTIONS]", "mount an empty directory in memory"),
    (("--cap-add",), "CAP", "give it a capability, or ALL"),
    (("--cap-drop",), "CAP", "take a capability from it, or ALL"),
    (("--ulimit",), "NAME=SOFT[:HARD]", "set a resource limit, for example nofile=1024"),
    (("--device",), "SRC[:DST][:rwm]", "give it a device of the host"),
    (("--sysctl",), "K=V", "set a kernel parameter of its namespaces"),
    (("--group-add",), "GROUP", "add a group to its user's"),
    (("--add-host",), "NAME:IP", "add a line to its /etc/hosts"),
    (("--dns",), "IP", "set a name server (default: the host's)"),
    (("-l", "--label"), "K=V", "set a label, which ps --json and inspect show"),
    (("--env-file",), "FILE", "read variables from a file, one K=V a line; -e wins"),
    (("--log-opt",), "K=V", "accept Docker's spelling of --log-max-size: max-size=SIZE"),
)
"""Options of `run`, by the kind of value that they take; those of `_SEVERAL` may be repeated."""


def add_parser(commands: Subparsers) -> None:
    """Add the commands."""
    _add_run(commands)
    _add_exec(commands)
    start = commands.add_parser("start", help="start a container that has ended")
    start.add_argument(
        "-a", "--attach", action="store_true", help="print its output and wait until it ends"
    )
    start.add_argument("-i", "--interactive", action="store_true", help="forward stdin (with -a)")
    start.add_argument(
        "name", metavar="NAME", help="the container's name or id"
    ).completer = complete_containers  # type: ignore[attr-defined]
    add_json(start)
    start.set_defaults(run=_start)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _add_run(commands: Subparsers) -> None:
    run = commands.add_parser(
        "run",
        help="run a command in a new container",
        description="Run a command in a new container. Options with several values may be "
        "repeated.",
        epilog=_RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [OPTION...] (IMAGE | --rootfs DIR) [CMD...]",
    )
    run.add_argument(
        "--net", metavar="NAME", action="append", default=[], dest="networks",
        help="join a network (may be repeated), none, host or container:NAME (default: none)",
    ).completer = complete_networks  # type: ignore[attr-defined]  # fmt: skip
    run.add_argument("--rootfs", metavar="DIR", help="use a directory instead of an image")
    for names, text in _FLAGS:
        run.add_argument(*names, action="store_true", help=text)
    _add_stdio(run)
    for name, metavar, text in _TEXTS:
        run.add_argument(name, metavar=metavar, help=text)
    for name, text in _NUMBERS:
        run.add_argument(name, metavar="N", type=int, help=text)
    run.add_argument(
        "--cpus",
        metavar="F",
        type=_finite,
        help="limit its CPU time to so many CPUs, for example 0.5 (default: no limit)",
    )
    for names, metavar, text in _SEVERAL:
        run.add_argument(*names, metavar=metavar, action="append", default=[], help=text)
    add_json(run)
    run.add_argument("words", metavar="...", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    run.set_defaults(run=_run)


def _add_stdio(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--interactive", action="store_true", help="forward stdin")
    parser.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    parser.add_argument(
        "-u", "--user", metavar="U[:G]", help="set user and group, by name or number"
    )
    parser.add_argument("-w", "--workdir", metavar="DIR", help="set its working directory")
    parser.add_argument(
        "-e", "--env", metavar="K=V", action="append", default=[],
        help="set a variable; a name alone takes your own value; may be repeated",
    )  # fmt: skip


def _add_exec(commands: Subparsers) -> None:
    execute = commands.add_parser(
        "exec",
        help="run another command in a running container",
        usage="%(prog)s [OPTION...] NAME CMD...",
    )
    _add_stdio(execute)
    execute.add_argument(
        "name", metavar="NAME", help="the container's name or id"
    ).completer = complete_containers  # type: ignore[attr-defined]
    execute.add_argument(
        "words", metavar="CMD", nargs=argparse.REMAINDER, help="the command and its arguments"
    )
    execute.set_defaults(run=_exec)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    words = list(args.words)
    if words[:1] == ["--"]:
        words = words[1:]
    image = None
    if args.rootfs is None:
        if not words:
            raise UsageError("give an image, or --rootfs DIR and a command")
        image = words.pop(0)
    sizes = {
        f"{name}_bytes": _size(value) if value is not None else None
        for name, value in (
            ("shm_size", args.shm_size),
            ("log_max", _log_max_size(args)),
        )
    }
    for name in ("memory", "memory_reservation"):
        text = getattr(args, name)
        sizes[f"{name}_bytes"] = _size(text) or None if text is not None else None
    if args.memory_swap is not None:
        unlimited = args.memory_swap == "-1"
        sizes["memory_swap_bytes"] = -1 if unlimited else _size(args.memory_swap) or None
    same = (
        "name", "hostname", "entrypoint", "restart", "cpuset_cpus", "pid", "ipc", "uts", "userns",
        "user", "workdir", "stop_signal", "pids_limit", "cpus", "rm", "init", "privileged",
        "read_only", "interactive", "tty", "tmpfs", "publish", "cap_add", "cap_drop", "group_add",
        "dns",
    )  # fmt: skip
    return (
        sizes
        | {name: getattr(args, name) for name in same}
        | {
            "image": image,
            "rootfs": os.path.abspath(args.rootfs) if args.rootfs else args.rootfs,
            "command": words,
            "networks": args.networks or ["none"],
            # As with Docker, 0 asks for the default share or weight.
            "cpu_shares": args.cpu_shares or None,
            "blkio_weight": args.blkio_weight or None,
            "env": _env([*_env_files(args.env_file), *args.env]),
            "volumes": args.volume,
            "ulimits": args.ulimit,
            "devices": args.device,
            "sysctls": args.sysctl,
            "add_hosts": args.add_host,
            "labels": args.label,
            "stop_timeout_s": args.stop_timeout,
        }
    )


def _finite(text: str) -> float:
    """Parse a number.  JSON has neither NaN nor infinity, so these are refused here."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: give one such as 0.5")
    return number


def _size(text: str) -> int:
    from meshnet.runtime.spec.options import parse_size

    return parse_size(text)


def _log_max_size(args: argparse.Namespace) -> str | None:
    size: str | None = args.log_max_size
    for text in args.log_opt:
        key, _, value = text.partition("=")
        if key != "max-size":
            raise UsageError(f"--log-opt {text!r} is unknown: give max-size=SIZE")
        size = value
    return size


def _env_files(names: list[str]) -> list[str]:
    """Return the lines of files without empty ones and comments."""
    lines = []
    for name in names:
        try:
            with open(name, encoding="utf-8") as file:
                lines += [line.lstrip() for line in file.read().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--env-file {name} cannot be read ({error}): correct it") from error
    return [line for line in lines if line and not line.startswith("#")]


def _env(words: list[str]) -> list[str]:
    """Complete variables: as with Docker, a name alone takes the client's own value."""
    full = (w if "=" in w else f"{w}={os.environ[w]}" for w in words if "=" in w or w in os.environ)
    return list(full)


def _run(args: argparse.Namespace) -> int:
    client = Client(args.socket)
    made = client.post("containers", body=_options(args), timeout_s=None)
    if "failed" in made:
        return _say_failed(made)
    if args.detach:
        started = client.post("containers", made["id"], "start", body={}, timeout_s=None)
        return print_either(args.json, made | started, made["id"])
    return _run_attached(client, made, args)


def _run_attached(client: Client, made: dict[str, Any], args: argparse.Namespace) -> int:
    """Attach to a container whose process waits, let it go on, and end with its status."""
    # Attached and asked before the start, or the output and the status of a fast command are gone.
    attachment = _attachment(made, args)
    ending = _Ending(args.socket, ("containers", made["id"], "wait"), made["exit_file"])
    client.post("containers", made["id"], "start", body={}, timeout_s=None)
    attachment.run(lambda name: _forward(client, made["id"], name))
    return ending.status()


def _start(args: argparse.Namespace) -> int:
    client = Client(args.socket)
    if not args.attach:
        if args.interactive:
            raise UsageError("-i forwards stdin only to a container that is attached: give -a too")
        return print_started(
            args.json, client.post("containers", args.name, "start", body={}, timeout_s=None)
        )
    made = client.post("containers", args.name, "prepare", body={}, timeout_s=None)
    if "failed" in made:
        return _say_failed(made)
    options = made["options"]
    args.tty = options["tty"]
    if args.interactive and not options["interactive"]:
        raise UsageError(
            f"container {args.name} has no stdin, as it was run without -i: leave -i out"
        )
    return _run_attached(client, made, args)


def print_started(json: bool, document: dict[str, Any]) -> int:
    """Print the name of a container that was started, or why the runtime could not start it."""
    if "failed" in document:
        return _say_failed(document)
    return print_either(json, document, document["name"])


def _exec(args: argparse.Namespace) -> int:
    client = Client(args.socket)
    made = client.post(
        "containers",
        args.name,
        "exec",
        body={
            "command": args.words[1:] if args.words[:1] == ["--"] else args.words,
            "env": _env(args.env),
            "user": args.user,
            "workdir": args.workdir,
            "tty": args.tty,
            "interactive": args.interactive,
        },
        timeout_s=None,
    )
    attachment = _attachment(made, args)
    ending = _Ending(args.socket, ("exec", made["id"], "wait"), made["exit_file"])
    started = client.post("exec", made["id"], "start", body={}, timeout_s=None)
    if "failed" in started:
        return _say_failed(started)
    attachment.run(lambda _name: None)
    return ending.status()


def _attachment(made: dict[str, Any], args: argparse.Namespace) -> Any:  # noqa: ANN401
    from meshnet.cli.terminal import Attachment

    return Attachment(made["attach"], made["window"], tty=args.tty, interactive=args.interactive)


def _forward(client: Client, identity: str, name: str) -> None:
    try:
        client.post("containers", identity, "kill", body={"signal": name})
    except MeshnetError as error:
        print(f"meshnet: {name} not forwarded: {error}", file=sys.stderr)


def _say_failed(answer: dict[str, Any]) -> int:
    print(f"meshnet: {answer['failed']}", file=sys.stderr)
    return int(answer["exit_status"])


class _Ending:
    """A container's exit status, asked for before the start: later, ``--rm`` may have removed it.

    While no agent answers, the file that conmon writes at the end is read instead, so that a
    container outlives a restart of the agent without a client losing its status.
    """

    def __init__(self, path: str, parts: tuple[str, ...], exit_file: str) -> None:
        self._client = Client(path)
        self._parts = parts
        self._file = exit_file
        self._asked = self._client.ask(*parts)

    def status(self) -> int:
        """Wait until the container has ended, and return its exit status."""
        ask: Callable[[], Any] = self._asked.result
        while True:
            try:
                return int(ask()["exit_code"])
            except AgentUnreachableError:
                found = self._look()
                time.sleep(_ASK_AGAIN_S)
            except (MeshnetError, TypeError, ValueError):
                found = self._look()
                if found is None:
                    raise NotFoundError(
                        "how the container ended is unknown: somebody removed it meanwhile"
                    ) from None
            if found is not None:
                return found
            ask = self._ask_again

    def _ask_again(self) -> Any:  # noqa: ANN401
        return self._client.wait(*self._parts)

    def _look(self) -> int | None:
        try:
            with open(self._file) as file:
                return int(file.read())
        except (OSError, ValueError):
            return None
