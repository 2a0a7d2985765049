"""``meshnet run``, ``exec`` and ``start``: what a client may be attached to."""

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

exit status: the command's own; 127 it does not exist, 126 it cannot be executed, 128+N it was
ended by signal N, 125 the container could not be started; else that of all commands."""
_FLAGS = (
    (("-d", "--detach"), "return when it runs and its network is up; print its id"),
    (("--rm",), "remove it when it has ended"),
    (("--init",), "an init process that reaps zombies and forwards signals"),
    (("--privileged",), "all capabilities and devices, no seccomp: no protection"),
    (("--read-only",), "its root file system cannot be written"),
)
_TEXTS = (
    ("--name", "N", "name"),
    ("--hostname", "H", "host name (default: its id)"),
    ("--entrypoint", "PROGRAM", "instead of the image's"),
    ("--restart", "POLICY", "no, on-failure[:N] or always"),
    ("--cpuset-cpus", "LIST", "CPUs that it may use, such as 0-1"),
    ("--pid", "NS", "host or container:NAME"),
    ("--ipc", "NS", "host or container:NAME"),
    ("--uts", "NS", "host or container:NAME"),
    ("--userns", "NS", "host (default), auto: ids of its own, auto:ID:SIZE or container:NAME"),
    ("--stop-signal", "SIG", "what stop sends first"),
    ("--memory", "SIZE", "hard limit, such as 256m"),
    ("--memory-reservation", "SIZE", "soft limit"),
    ("--memory-swap", "SIZE", "memory and swap together; -1: no limit (default: twice memory)"),
    ("--shm-size", "SIZE", "of /dev/shm (default: 64m)"),
    ("--log-max-size", "SIZE", "its log begins anew at that size; 0: never (default: 64m)"),
)
_NUMBERS = (
    ("--cpu-shares", "share of the CPU when it is short (default: 1024)"),
    ("--pids-limit", "most processes"),
    ("--blkio-weight", "share of the disk, 10 to 1000"),
    ("--stop-timeout", "seconds that stop waits (default: 10)"),
)
_SEVERAL = (
    (("-v", "--volume"), "[SRC:]DST[:ro]", "mount a path of the host, or a volume"),
    (("-p", "--publish"), "PORT[:PORT][/udp]", "a port of the host leads to one of it"),
    (("--tmpfs",), "DIR[:OPTIONS]", "mount an empty directory in memory"),
    (("--cap-add",), "CAP", "give it a capability, or ALL"),
    (("--cap-drop",), "CAP", "take one away, or ALL"),
    (("--ulimit",), "NAME=SOFT[:HARD]", "a resource limit of its processes, as nofile=1024"),
    (("--device",), "SRC[:DST][:rwm]", "a device of the host"),
    (("--sysctl",), "K=V", "a kernel setting of its namespaces"),
    (("--group-add",), "GROUP", "a further group of its user"),
    (("--add-host",), "NAME:IP", "a line of /etc/hosts"),
    (("--dns",), "IP", "a name server, instead of the host's"),
    (("-l", "--label"), "K=V", "a note for ps --json and inspect"),
    (("--env-file",), "FILE", "variables, one K=V a line; -e wins"),
    (("--log-opt",), "K=V", "Docker's spelling of --log-max-size: max-size=SIZE"),
)
"""Options of run, by what they take."""


def add_parser(commands: Subparsers) -> None:
    """Add the commands."""
    _add_run(commands)
    _add_exec(commands)
    start = commands.add_parser("start", help="run a container again that has ended")
    start.add_argument("-a", "--attach", action="store_true", help="print what it prints, and wait")
    start.add_argument("-i", "--interactive", action="store_true", help="forward stdin (with -a)")
    start.add_argument("name", metavar="NAME").completer = complete_containers  # type: ignore[attr-defined]
    add_json(start)
    start.set_defaults(run=_start)


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _add_run(commands: Subparsers) -> None:
    run = commands.add_parser(
        "run",
        help="run a command in a new container",
        epilog=_RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [OPTION...] (IMAGE | --rootfs DIR) [CMD...]",
    )
    run.add_argument(
        "--net", metavar="NAME", action="append", default=[], dest="networks",
        help="a network (may be repeated), none, host or container:NAME (default: none)",
    ).completer = complete_networks  # type: ignore[attr-defined]  # fmt: skip
    run.add_argument("--rootfs", metavar="DIR", help="a directory instead of an image")
    for names, text in _FLAGS:
        run.add_argument(*names, action="store_true", help=text)
    _add_stdio(run)
    for name, metavar, text in _TEXTS:
        run.add_argument(name, metavar=metavar, help=text)
    for name, text in _NUMBERS:
        run.add_argument(name, metavar="N", type=int, help=text)
    run.add_argument("--cpus", metavar="F", type=_finite, help="how many CPUs it may use, as 0.5")
    for names, metavar, text in _SEVERAL:
        run.add_argument(*names, metavar=metavar, action="append", default=[], help=text)
    add_json(run)
    run.add_argument("words", metavar="...", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    run.set_defaults(run=_run)


def _add_stdio(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--interactive", action="store_true", help="forward stdin")
    parser.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    parser.add_argument("-u", "--user", metavar="U[:G]", help="user and group, name or number")
    parser.add_argument("-w", "--workdir", metavar="DIR", help="its working directory")
    parser.add_argument(
        "-e", "--env", metavar="K=V", action="append", default=[], help="a variable"
    )


def _add_exec(commands: Subparsers) -> None:
    execute = commands.add_parser(
        "exec",
        help="run another command in a running container",
        usage="%(prog)s [OPTION...] NAME CMD...",
    )
    _add_stdio(execute)
    execute.add_argument("name", metavar="NAME").completer = complete_containers  # type: ignore[attr-defined]
    execute.add_argument("words", metavar="CMD", nargs=argparse.REMAINDER)
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
            # Docker: 0 is no limit, and the default share or weight.
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
    """A number that JSON has."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no number: give one such as 0.5")
    return number


def _size(text: str) -> int:
    from meshnet.runtime.spec.options import parse_size

    return parse_size(text)


def _log_max_size(args: argparse.Namespace) -> str | None:
    size: str | None = args.log_max_size
    for text in args.log_opt:
        key, _, value = text.partition("=")
        if key != "max-size":
            raise UsageError(f"--log-opt {text!r} is unknown: there is only max-size=SIZE")
        size = value
    return size


def _env_files(names: list[str]) -> list[str]:
    """Lines of files, less empty ones and comments."""
    lines = []
    for name in names:
        try:
            with open(name, encoding="utf-8") as file:
                lines += [line.lstrip() for line in file.read().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--env-file {name} cannot be read: {error}") from error
    return [line for line in lines if line and not line.startswith("#")]


def _env(words: list[str]) -> list[str]:
    """Docker: a name alone takes the client's own value."""
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
    attachment = _attachment(made, args)
    ending = _Ending(args.socket, ("containers", made["id"], "wait"), made["exit_file"])
    client.post("containers", made["id"], "start", body={}, timeout_s=None)
    attachment.run(lambda name: _forward(client, made["id"], name))
    return ending.status()


def _start(args: argparse.Namespace) -> int:
    client = Client(args.socket)
    if not args.attach:
        if args.interactive:
            raise UsageError("-i forwards stdin of an attached client: give -a too")
        return print_started(
            args.json, client.post("containers", args.name, "start", body={}, timeout_s=None)
        )
    made = client.post("containers", args.name, "prepare", body={}, timeout_s=None)
    if "failed" in made:
        return _say_failed(made)
    options = made["options"]
    args.tty = options["tty"]
    if args.interactive and not options["interactive"]:
        raise UsageError(f"container {args.name} has no stdin: it was run without -i")
    return _run_attached(client, made, args)


def print_started(json: bool, document: dict[str, Any]) -> int:
    """Print a container that was started, or why the runtime could not."""
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
    """The exit status, asked for before the start: afterwards ``--rm`` may have been faster.

    While no agent answers, conmon's own file is looked at.
    """

    def __init__(self, path: str, parts: tuple[str, ...], exit_file: str) -> None:
        self._client = Client(path)
        self._parts = parts
        self._file = exit_file
        self._asked = self._client.ask(*parts)

    def status(self) -> int:
        """Wait for the status."""
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
                        "how the container ended is not known: it was removed meanwhile"
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
