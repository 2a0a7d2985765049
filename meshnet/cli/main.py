"""``meshnet``: parses the command line and runs one command."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from meshnet.cli import completion, container, endpoint, host, image, lab, network, run, status
from meshnet.cli.client import DEFAULT_SOCKET
from meshnet.cli.parser import Parser
from meshnet.errors import MeshnetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="meshnet",
        description="Put any process of any host on one network.",
        epilog=_EXIT_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument(
        "--socket",
        metavar="PATH",
        default=os.environ.get("MESHNET_SOCKET", DEFAULT_SOCKET),
        help=f"the agent's socket (default: $MESHNET_SOCKET or {DEFAULT_SOCKET})",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=False)
    for group in (network, endpoint, run, container, host, status, image, lab, completion):
        group.add_parser(commands)
    parser.set_defaults(run=None)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:
        completion.complete(parser)
    parsed = parser.parse_args(arguments)
    if parsed.version:
        from importlib.metadata import version

        print(f"meshnet {version('meshnet')}")
        return 0
    if parsed.run is None:
        parser.print_help(sys.stderr)
        return UsageError.exit_status
    try:
        return int(parsed.run(parsed))
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
        return 130


if __name__ == "__main__":
    sys.exit(main())
