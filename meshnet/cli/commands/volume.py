"""``meshnet volume``: directories that outlive the containers that use them."""

from __future__ import annotations

from meshnet.cli.client import Client
from meshnet.cli.commands.completion import complete_volumes
from meshnet.cli.output import joined, print_either, print_json, print_table

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from meshnet.cli.commands.completion import Subparsers


def add_parser(commands: Subparsers) -> None:
    """Add the command group."""
    group = commands.add_parser("volume", help="list and remove volumes of this host")
    actions = group.add_subparsers(prog=group.prog, metavar="ACTION", required=True)
    _finish(actions.add_parser("ls", help="list volumes"), _ls)
    rm = actions.add_parser(
        "rm",
        help="remove a volume and its content",
        description="Remove a volume and its content. Refused while a container has it.",
    )
    argument = rm.add_argument("name", metavar="NAME", help="the volume")
    argument.completer = complete_volumes  # type: ignore[attr-defined]
    _finish(rm, _rm)
    prune = actions.add_parser(
        "prune",
        help="remove anonymous volumes that no container has",
        description="Remove anonymous volumes that no container has.",
    )
    prune.add_argument(
        "-a", "--all", action="store_true", help="remove also those that have a name"
    )
    _finish(prune, _prune)


def _finish(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def _ls(args: argparse.Namespace) -> int:
    documents = Client(args.socket).get("volumes")
    if args.json:
        print_json(documents)
        return 0
    print_table(
        ("NAME", "ANONYMOUS", "CONTAINERS", "PATH"),
        (
            (d["name"], "yes" if d["anonymous"] else "no", joined(d["containers"]), d["path"])
            for d in documents
        ),
    )
    return 0


def _rm(args: argparse.Namespace) -> int:
    document = Client(args.socket).delete("volumes", args.name)
    return print_either(args.json, document, document["name"])


def _prune(args: argparse.Namespace) -> int:
    query = {"all": "1"} if args.all else {}
    documents = Client(args.socket).delete("volumes", query=query)
    if args.json:
        print_json(documents)
    else:
        for document in documents:
            print(document["name"])
    return 0
