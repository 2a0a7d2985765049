"""``meshnet attach``, ``detach`` and ``endpoint``: processes on networks, and their ports."""

from __future__ import annotations

import sys

from meshnet.cli.client import Client
from meshnet.cli.commands.completion import (
    complete_endpoints,
    complete_networks,
    complete_published,
)
from meshnet.cli.output import joined, print_either, print_json, print_table

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    import argparse

    from meshnet.cli.commands.completion import Subparsers


def add_parser(commands: Subparsers) -> None:
    """Add the commands."""
    _add_attach(commands)
    detach = commands.add_parser(
        "detach",
        help="take a process off a network",
        description="Undo what attach did: interface, addresses and routes go.",
    )
    _add_target(detach)
    detach.set_defaults(run=_detach)
    group = commands.add_parser("endpoint", help="list endpoints, publish their ports")
    actions = group.add_subparsers(prog=group.prog, metavar="ACTION", required=True)
    ls = actions.add_parser("ls", help="list the endpoints of all hosts")
    ls.add_argument("--json", action="store_true", help="print one JSON document")
    ls.set_defaults(run=_ls)
    _add_publication(actions)


def _add_attach(commands: Subparsers) -> None:
    attach = commands.add_parser(
        "attach",
        help="put a running process on a network",
        description="Give the network namespace of a process an interface on a network. The "
        "interface stays as long as a process is in the namespace.",
        epilog="example: unshare --net sleep 1000 & meshnet attach $! --net prod",
    )
    _add_target(attach)
    attach.add_argument(
        "--ifname", metavar="IF", default="eth0", help="name the interface (default: %(default)s)"
    )
    attach.add_argument(
        "--ip",
        metavar="A",
        help="take this address of the host's subnet (default: the lowest free)",
    )
    attach.add_argument(
        "--name", metavar="N", help="name the endpoint (default: made from the pid and its id)"
    )
    attach.add_argument(
        "--no-default-route",
        dest="default_route",
        action="store_false",
        help="route only the network's own addresses through the interface",
    )
    attach.add_argument(
        "--publish",
        metavar="SPEC",
        action="append",
        default=[],
        help="publish a port of the process on this host: [[IP:]HOST:]PORT[/udp], for example "
        "8080:80; may be repeated",
    )
    attach.set_defaults(run=_attach)


def _add_publication(actions: Subparsers) -> None:
    """Publishing and its reverse: the same words on the command line."""
    publish = actions.add_parser(
        "publish",
        help="publish ports of an endpoint of this host",
        description="Publish ports of an endpoint on this host, at once.",
        epilog="example: meshnet endpoint publish web 8080:80 127.0.0.1:5353:53/udp",
    )
    unpublish = actions.add_parser(
        "unpublish",
        help="stop publishing ports of an endpoint",
        description="Stop publishing ports of an endpoint. Open connections go on.",
        epilog="example: meshnet endpoint unpublish web 8080",
    )
    for parser, run, what in (
        (publish, _publish, "a port to publish: [[IP:]HOST:]PORT[/udp]"),
        (unpublish, _unpublish, "a port as it was published, or the host's port: HOST[/udp]"),
    ):
        name = parser.add_argument("name", metavar="NAME", help="the endpoint's name or id")
        name.completer = complete_endpoints  # type: ignore[attr-defined]
        ports = parser.add_argument("ports", metavar="SPEC", nargs="+", help=what)
        if parser is unpublish:
            ports.completer = complete_published  # type: ignore[attr-defined]
        parser.add_argument("--json", action="store_true", help="print one JSON document")
        parser.set_defaults(run=run)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pid", metavar="PID", type=int, help="a process in a network namespace of its own"
    )
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
            "publish": args.publish or None,
        },
    )
    return print_either(args.json, document, document["address"])


def _publish(args: argparse.Namespace) -> int:
    return _change_published(args, "publish")


def _unpublish(args: argparse.Namespace) -> int:
    return _change_published(args, "unpublish")


def _change_published(args: argparse.Namespace, what: str) -> int:
    document = Client(args.socket).post(what, body={"endpoint": args.name, "ports": args.ports})
    return print_either(args.json, document, joined(document["published"]))


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
        ("NETWORK", "HOST", "NAME", "PID", "IFNAME", "ADDRESS", "ADDRESS6", "PUBLISHED"),
        (
            (
                e["network"],
                e["host"],
                e["name"],
                e["pid"],
                e["ifname"],
                e["address"],
                e.get("address6", "-"),
                joined(e["published"]),
            )
            for e in answer["endpoints"]
        ),
    )
    return 0
