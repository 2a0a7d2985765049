"""``meshnet attach``, ``detach`` and ``endpoint``: processes on networks, and their ports."""

from __future__ import annotations

import contextlib
import os
import sys

from meshnet.cli.client import Client
from meshnet.cli.commands.completion import (
    complete_endpoints,
    complete_networks,
    complete_published,
)
from meshnet.cli.output import joined, print_either, print_json, print_table
from meshnet.errors import UsageError

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
        description="Undo what attach did: interface, addresses and routes go. With --owner all "
        "that this owner holds goes, also if its namespace is gone; doing so twice is not an "
        "error.",
        epilog="example: meshnet detach --owner job7",
    )
    _add_target(detach, "release what is held for this owner, on --net or on every network")
    detach.set_defaults(run=_detach)
    group = commands.add_parser("endpoint", help="list endpoints, publish their ports")
    actions = group.add_subparsers(prog=group.prog, metavar="ACTION", required=True)
    ls = actions.add_parser("ls", help="list the endpoints of all hosts")
    ls.add_argument("--json", action="store_true", help="print one JSON document")
    ls.set_defaults(run=_ls)
    _add_publication(actions)
    gc = actions.add_parser(
        "gc",
        help="free what owners hold that are gone",
        description="Free all that is held for owners of a kind, except for those that are given.",
        epilog="example: meshnet endpoint gc nomad/ nomad/alloc1 nomad/alloc2",
    )
    gc.add_argument("prefix", metavar="PREFIX", help="what the owners' keys begin with")
    gc.add_argument("valid", metavar="KEY", nargs="*", help="an owner that keeps what it holds")
    gc.add_argument("--json", action="store_true", help="print one JSON document")
    gc.set_defaults(run=_gc)


def _add_attach(commands: Subparsers) -> None:
    attach = commands.add_parser(
        "attach",
        help="put a running process on a network",
        description="Give a network namespace an interface on a network. That of a process has "
        "it as long as a process is in the namespace; that at a path has it until it is detached, "
        "and needs no process.",
        epilog="example: unshare --net sleep 1000 & meshnet attach $! --net prod",
    )
    _add_target(attach, "hold the namespace for this owner: any key (default: made from its inode)")
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


def _add_target(parser: argparse.ArgumentParser, owner_help: str) -> None:
    parser.add_argument(
        "pid",
        metavar="PID",
        type=int,
        nargs="?",
        help="a process in a network namespace of its own",
    )
    parser.add_argument(
        "--netns", metavar="PATH", help="a network namespace bound to a path, instead of a process"
    )
    parser.add_argument("--owner", metavar="KEY", help=owner_help)
    network = parser.add_argument("--net", metavar="NAME", help="the network")
    network.completer = complete_networks  # type: ignore[attr-defined]
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _attach(args: argparse.Namespace) -> int:
    if args.owner is not None and args.netns is None:
        raise UsageError("--owner is for a namespace at a path: give --netns PATH, too")
    document = Client(args.socket).post(
        "attach",
        body={
            **_target(args),
            "owner": args.owner,
            "network": _network(args),
            "ifname": args.ifname,
            "ip": args.ip,
            "name": args.name,
            "default_route": args.default_route,
            "publish": args.publish or None,
        },
    )
    if "warning" in document and not args.json:
        print(f"meshnet: warning: {document['warning']}", file=sys.stderr)
    return print_either(args.json, document, document["address"])


def _target(args: argparse.Namespace) -> dict[str, object]:
    """The process or the namespace that is meant, as the API takes it.

    Raises:
        UsageError: there is not exactly one.
    """
    if (args.pid is None) == (args.netns is None):
        raise UsageError("give either a PID or --netns PATH: see meshnet attach --help")
    if args.pid is not None:
        return {"pid": args.pid}
    # Which namespace this process sees there proves to the agent that it opens the same one.
    path = os.path.abspath(args.netns)
    seen = {}
    with contextlib.suppress(OSError):
        seen = {"inode": os.stat(path).st_ino}
    return {"netns": {"path": path, "pid": os.getpid(), **seen}}


def _network(args: argparse.Namespace) -> str:
    if args.net is None:
        raise UsageError("give the network: --net NAME")
    return str(args.net)


def _publish(args: argparse.Namespace) -> int:
    return _change_published(args, "publish")


def _unpublish(args: argparse.Namespace) -> int:
    return _change_published(args, "unpublish")


def _change_published(args: argparse.Namespace, what: str) -> int:
    document = Client(args.socket).post(what, body={"endpoint": args.name, "ports": args.ports})
    return print_either(args.json, document, joined(document["published"]))


def _detach(args: argparse.Namespace) -> int:
    client = Client(args.socket)
    if args.owner is not None:
        if args.pid is not None:
            raise UsageError("a process has no owner: give either PID or --owner KEY")
        released = client.post("release", body={"owner": args.owner, "network": args.net})
        return print_either(args.json, released, "\n".join(e["name"] for e in released))
    document = client.post("detach", body={**_target(args), "network": _network(args)})
    return print_either(args.json, document, document["name"])


def _gc(args: argparse.Namespace) -> int:
    body = {"prefix": args.prefix, "valid": args.valid}
    freed = Client(args.socket).post("collect", body=body)
    return print_either(args.json, freed, "\n".join(e["name"] for e in freed))


def _ls(args: argparse.Namespace) -> int:
    answer = Client(args.socket).get("endpoints")
    if answer["warning"]:
        print(f"meshnet: {answer['warning']}", file=sys.stderr)
    if args.json:
        print_json(answer["endpoints"])
        return 0
    print_table(
        ("NETWORK", "HOST", "NAME", "PID", "OWNER", "IFNAME", "ADDRESS", "ADDRESS6", "PUBLISHED"),
        (
            (
                e["network"],
                e["host"],
                e["name"],
                e["pid"] or "-",
                e["owner"] or "-",
                e["ifname"],
                e["address"],
                e.get("address6", "-"),
                joined(e["published"]),
            )
            for e in answer["endpoints"]
        ),
    )
    return 0
