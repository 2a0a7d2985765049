"""``meshnet ps``, ``logs``, ``stop`` and so on: containers of this host.

`meshnet.cli.commands.run` has the commands that start one.
"""

from __future__ import annotations

import re
import sys
import time

from meshnet.cli.client import Client
from meshnet.cli.commands.completion import complete_containers
from meshnet.cli.commands.run import add_json, print_started
from meshnet.cli.output import joined, print_either, print_json, print_table
from meshnet.errors import UsageError

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from meshnet.cli.commands.completion import Subparsers

_AGO = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_UNIX_TIME = re.compile(r"\d+(?:\.\d+)?")


def add_parser(commands: Subparsers) -> None:
    """Add the commands."""
    ps = commands.add_parser("ps", help="list the containers of this host")
    ps.add_argument("-a", "--all", action="store_true", help="list also containers that do not run")
    ps.add_argument("-q", "--quiet", action="store_true", help="print only ids, one a line")
    add_json(ps)
    ps.set_defaults(run=_ps)
    logs = _add_one(commands, "logs", "print what a container printed", _logs, json=False)
    logs.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    logs.add_argument("-t", "--timestamps", action="store_true", help="print the time of each line")
    logs.add_argument(
        "-n", "--tail", default="all", metavar="N",
        help="print only the last N lines (default: %(default)s)",
    )  # fmt: skip
    logs.add_argument(
        "--since",
        metavar="TIME",
        help="leave out what is older: 10m, 2026-01-31T12:00:00 or Unix time",
    )
    stop = _add_one(commands, "stop", "stop a container: its stop signal, then SIGKILL", _stop)
    restart = _add_one(commands, "restart", "stop a container and start it again", _restart)
    for parser in (stop, restart):
        parser.add_argument(
            "-t", "--time", type=int, metavar="S",
            help="wait so many seconds before SIGKILL (default: its --stop-timeout, or 10)",
        )  # fmt: skip
    kill = _add_one(commands, "kill", "send a signal to a container", _kill)
    kill.add_argument(
        "-s", "--signal", default="KILL", metavar="SIG",
        help="send this signal (default: %(default)s)",
    )  # fmt: skip
    rm = _add_one(commands, "rm", "remove a container that has ended", _rm)
    rm.add_argument("-f", "--force", action="store_true", help="kill it first if it runs")
    rm.add_argument("-v", "--volumes", action="store_true", help="remove its anonymous volumes too")
    _add_one(commands, "inspect", "show everything about a container", _inspect)
    _add_one(commands, "wait", "wait until a container ends and print its status", _wait)
    _add_one(commands, "stats", "show what a running container uses", _stats)


def _add_one(
    commands: Subparsers,
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int],
    *,
    json: bool = True,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary)
    parser.add_argument(
        "name", metavar="NAME", help="the container's name or id"
    ).completer = complete_containers  # type: ignore[attr-defined]
    if json:
        add_json(parser)
    parser.set_defaults(run=run)
    return parser


def _ps(args: argparse.Namespace) -> int:
    documents = Client(args.socket).get("containers")
    if not args.all:
        documents = [d for d in documents if d["state"] == "running"]
    if args.json:
        print_json(documents)
        return 0
    if args.quiet:
        for document in documents:
            print(document["id"])
        return 0
    print_table(
        ("ID", "NAME", "IMAGE", "STATE", "PID", "ADDRESSES"),
        (
            (
                d["id"],
                d["name"],
                d["image"],
                d["state"] if d["exit_code"] is None else f"{d['state']} ({d['exit_code']})",
                d["pid"] or "-",
                joined(e["address"] for e in d["endpoints"]),
            )
            for d in documents
        ),
    )
    return 0


def _logs(args: argparse.Namespace) -> int:
    query = {"follow": "1"} if args.follow else {}
    if args.tail != "all":
        query["tail"] = str(args.tail)
    if args.since is not None:
        query["since"] = str(parse_since(args.since, time.time()))
    continued = {b"stdout": False, b"stderr": False}
    for line in Client(args.socket).stream("containers", args.name, "logs", query=query):
        # TIME STREAM P|F TEXT, the format k8s-file of conmon.  P marks a piece of a longer line:
        # the line feed after it is the log's and not the program's.
        fields = line.split(b" ", 3)
        if len(fields) == 4:
            when, stream, kind, text = fields
            if args.timestamps and not continued.get(stream):
                text = when + b" " + text
            continued[stream] = kind != b"F"
            output = sys.stderr if stream == b"stderr" else sys.stdout
            output.buffer.write(text if kind == b"F" else text.removesuffix(b"\n"))
            output.flush()
    return 0


def parse_since(text: str, now_s: float) -> float:
    """Convert what ``--since`` takes to Unix time, in seconds.

    Args:
        text: how long ago (``10m``, ``1h30m``), an RFC 3339 time (local if it has no zone), or a
            Unix time.
        now_s: the Unix time now.

    Raises:
        UsageError: `text` is something else.
    """
    from datetime import datetime

    ago = _AGO.fullmatch(text)
    try:
        if text and ago is not None:
            hours, minutes, seconds = (float(part or 0) for part in ago.groups())
            return now_s - 3600 * hours - 60 * minutes - seconds
        if _UNIX_TIME.fullmatch(text):
            return float(text)
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"--since {text!r} is not a time: give 10m, 2026-01-31T12:00:00 or Unix time"
        ) from error


def _restart(args: argparse.Namespace) -> int:
    document = Client(args.socket).post(
        "containers", args.name, "restart", body={"timeout_s": args.time}, timeout_s=None
    )
    return print_started(args.json, document)


def _one(args: argparse.Namespace, action: str, body: dict[str, Any]) -> int:
    document = Client(args.socket).post("containers", args.name, action, body=body, timeout_s=None)
    return print_either(args.json, document, document["name"])


def _stop(args: argparse.Namespace) -> int:
    return _one(args, "stop", {"timeout_s": args.time})


def _kill(args: argparse.Namespace) -> int:
    return _one(args, "kill", {"signal": args.signal})


def _rm(args: argparse.Namespace) -> int:
    query = {name: "1" for name in ("force", "volumes") if getattr(args, name)}
    document = Client(args.socket).delete("containers", args.name, query=query, timeout_s=None)
    return print_either(args.json, document, document["name"])


def _inspect(args: argparse.Namespace) -> int:
    print_json(Client(args.socket).get("containers", args.name))
    return 0


def _wait(args: argparse.Namespace) -> int:
    document = Client(args.socket).wait("containers", args.name, "wait")
    return print_either(args.json, document, document["exit_code"])


def _stats(args: argparse.Namespace) -> int:
    document = Client(args.socket).get("containers", args.name, "stats")
    if args.json:
        print_json(document)
        return 0
    limit = document["memory_limit_bytes"]
    print_table(
        ("NAME", "CPU S", "THROTTLED S", "MEMORY", "LIMIT", "PIDS", "RX BYTES", "TX BYTES"),
        [
            (
                document["name"],
                f"{document['cpu_s']:.2f}",
                f"{document['throttled_s']:.2f}",
                document["memory_bytes"],
                limit if limit is not None else "-",
                document["pids"],
                document["rx_bytes"],
                document["tx_bytes"],
            )
        ],
    )
    return 0
