"""``meshnet attach``, ``detach`` and ``endpoint ls``: processes on networks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from meshnet.cli.client import Client
from meshnet.cli.completion import complete_networks
from meshnet.cli.output import print_either, print_json, print_table

if TYPE_CHECKING:
    import argparse

    from meshnet.cli.completion import Subparsers


def add_parser(commands: Subparsers) -> None:
    """Add the commands."""
    attach = commands.add_parser(
        "attach",
        help="put a running process on a network",
        description="Give the network namespace of a process an interface on a network. It lives "
        "as long as the namespace has a process.",
        epilog="example: unshare --net sleep 1000 & meshnet attach $! --net prod",
    )
    _add_target(attach)
    attach.add_argument("--ifname", metavar="IF", default="eth0", help="default: eth0")
    attach.add_argument("--ip", metavar="A", help="this address of this host's subnet")
    attach.add_argument("--name", metavar="N", help="name of the endpoint")
    attach.add_argument(
        "--no-default-route",
        dest="default_route",
        action="store_false",
        help="route only the network's own addresses through the interface",
    )
    attach.set_defaults(run=_attach)
    detach = commands.add_parser(
        "detach",
        help="take a process off a network",
        description="Undo what attach did: interface, addresses and routes go.",
    )
    _add_target(detach)
    detach.set_defaults(run=_detach)
    group = commands.add_parser("endpoint", help="list endpoints")
    actions = group.add_subparsers(metavar="ACTION", required=True)
    ls = actions.add_parser("ls", help="list the endpoints of all hosts")
    ls.add_argument("--json", action="store_true", help="print one JSON document")
    ls.set_defaults(run=_ls)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pid", metavar="PID", type=int, help="a process with its own namespace")
    network = parser.add_argument("--net", metavar="NAME", required=True, help="the network")
    network.completer = complete_networks  # type: ignore[attr-defined]
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _attach(args: argparse.Namespace) -> int:
    document = Client(args.socket).post(
        "attach",
        body={
            "pid": args.pid,
            "network": args.net,
            "ifname": args.ifname,
            "ip": args.ip,
            "name": args.name,
            "default_route": args.default_route,
        },
    )
    return print_either(args.json, document, document["address"])


def _detach(args: argparse.Namespace) -> int:
    document = Client(args.socket).post("detach", body={"pid": args.pid, "network": args.net})
    return print_either(args.json, document, document["name"])


def _ls(args: argparse.Namespace) -> int:
    answer = Client(args.socket).get("endpoints")
    if answer["warning"]:
        print(f"meshnet: {answer['warning']}", file=sys.stderr)
    if args.json:
        print_json(answer["endpoints"])
        return 0
    print_table(
        ("NETWORK", "HOST", "NAME", "PID", "IFNAME", "ADDRESS", "ADDRESS6"),
        (
            (
                e["network"],
                e["host"],
                e["name"],
                e["pid"],
                e["ifname"],
                e["address"],
                e.get("address6", "-"),
            )
            for e in answer["endpoints"]
        ),
    )
    return 0
