"""``meshnet hosts`` and ``host rm``: the members of the mesh."""

from __future__ import annotations

import sys

from meshnet.cli.client import Client
from meshnet.cli.output import joined, print_either, print_json, print_table

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    import argparse

    from meshnet.cli.commands.completion import Subparsers


def add_parser(commands: Subparsers) -> None:
    """Add the commands."""
    hosts = commands.add_parser("hosts", help="list the hosts of the mesh")
    hosts.add_argument("--json", action="store_true", help="print one JSON document")
    hosts.set_defaults(run=_hosts)
    group = commands.add_parser("host", help="remove a host that is gone for good")
    actions = group.add_subparsers(prog=group.prog, metavar="ACTION", required=True)
    rm = actions.add_parser(
        "rm",
        help="remove a host that is gone for good",
        description="Remove a host that is gone for good, and free its subnets and endpoints. All "
        "others drop their routes to it. Its agent must have stopped.",
    )
    rm.add_argument("id", metavar="ID", help="the host's id, as in hosts")
    rm.add_argument("--json", action="store_true", help="print one JSON document")
    rm.set_defaults(run=_rm)


def _hosts(args: argparse.Namespace) -> int:
    documents = Client(args.socket).get("hosts")
    if args.json:
        print_json(documents)
        return 0
    print_table(
        ("HOST", "UNDERLAY", "ALIVE", "SUBNETS", "PATH"),
        (
            (
                d["id"],
                d["underlay_ip"],
                "yes" if d["alive"] else _dead(d["dead_s"]),
                joined(
                    f"{name} {subnet}"
                    for part in (d["subnets"], d["subnets6"])
                    for name, subnet in part.items()
                ),
                joined(
                    f"{name} {way} (fallback)" if name in d["path_why"] else f"{name} {way}"
                    for name, way in d["path"].items()
                ),
            )
            for d in documents
        ),
    )
    return 0


def _dead(seconds: int | None) -> str:
    """No, and since when as far as it is known: in the largest unit of which it is two or more."""
    if seconds is None:
        return "no"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"no, for {seconds // length} {unit}"
    return f"no, for {seconds} s"


def _rm(args: argparse.Namespace) -> int:
    document = Client(args.socket).delete("hosts", args.id)
    if document["endpoints"] and not args.json:
        names = ", ".join(e["name"] for e in document["endpoints"])
        print(
            f"meshnet: warning: no host has a route to {names} any longer: if {args.id} still "
            "runs, what is attached there is cut off",
            file=sys.stderr,
        )
    return print_either(args.json, document, document["id"])
