"""``meshnet``: parse the command line and run one command."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from meshnet.arguments import Parser
from meshnet.cli.client import DEFAULT_SOCKET
from meshnet.errors import MeshnetError, UsageError

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import NoReturn

GROUPS = {
    "network": ("network",),
    "endpoint": ("attach", "detach", "endpoint"),
    "run": ("run", "exec", "start"),
    "container": (
        "ps", "logs", "stop", "restart", "kill", "rm", "inspect", "wait", "stats",
    ),
    "host": ("hosts", "host"),
    "status": ("status",),
    "image": ("image",),
    "volume": ("volume",),
    "lab": ("lab",),
    "completion": ("completion",),
}  # fmt: skip
"""Modules of `meshnet.cli.commands`, in the order of the help, and the commands that each adds.

Written down here, so that only the given command's module is imported: importing all of them would
slow every command down.
"""
_EXIT_STATUSES = """\
exit status:
  0 done                  5 conflict (exists, already attached, address taken)
  2 usage                 6 pool exhausted
  3 agent unreachable     7 the kernel refused or lacks it
  4 not found             8 store unavailable
                          9 refused by policy

a first network:
  meshnet network create prod --subnet 10.42.0.0/16 --mode vxlan
  unshare --net sleep 1000 &
  meshnet attach $! --net prod
  meshnet status
"""


def make_parser(groups: Iterable[str] = GROUPS) -> argparse.ArgumentParser:
    """Make the parser of the whole command line, or of some groups' part of it."""
    parser = Parser(
        prog="meshnet",
        description="Put any process of any host on one network.",
        epilog=_EXIT_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument(
        "--socket",
        metavar="PATH",
        default=os.environ.get("MESHNET_SOCKET", DEFAULT_SOCKET),
        help=f"the agent's socket (default: $MESHNET_SOCKET or {DEFAULT_SOCKET})",
    )
    # With prog given, argparse need not format a usage to find it.
    commands = parser.add_subparsers(
        title="commands", prog=parser.prog, metavar="COMMAND", required=False
    )
    for group in groups:
        import_module(f"meshnet.cli.commands.{group}").add_parser(commands)
    parser.set_defaults(run=None)
    return parser


def groups_for(arguments: Sequence[str]) -> Iterable[str]:
    """Return the given command's group, or all groups if the help or an error must list them."""
    words = iter(arguments)
    for word in words:
        if word == "--socket":
            next(words, None)
        elif not word.startswith("-"):
            return [group for group, commands in GROUPS.items() if word in commands] or GROUPS
        elif word in ("-h", "--help"):
            break
    return GROUPS


def run_command(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit status."""
    # To complete a word the shell runs this program with that variable set.
    if "_ARGCOMPLETE" in os.environ:
        from meshnet.cli.commands.completion import complete

        complete(make_parser())
    parser = make_parser(groups_for(arguments))
    parsed = parser.parse_args(arguments)
    if parsed.version:
        from importlib.metadata import version

        print(f"meshnet {version('meshnet')}")
        return 0
    if parsed.run is None:
        parser.print_help(sys.stderr)
        return UsageError.exit_status
    try:
        status = int(parsed.run(parsed))
        sys.stdout.flush()
    except MeshnetError as error:
        print(f"meshnet: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"meshnet: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell has it: 128 + SIGINT
    return status


def main() -> NoReturn:
    """Run the program."""
    status = run_command(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an orderly end of the interpreter is a tenth of a short command's time


if __name__ == "__main__":
    main()
