"""``meshnet network``: create, list, inspect and remove networks."""

from __future__ import annotations

import sys

from meshnet.cli.client import Client
from meshnet.cli.commands.completion import complete_networks
from meshnet.cli.output import joined, print_either, print_json, print_table

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    import argparse

    from meshnet.cli.commands.completion import Subparsers


def add_parser(commands: Subparsers) -> None:
    """Add the command group."""
    group = commands.add_parser("network", help="create, list, inspect and remove networks")
    actions = group.add_subparsers(prog=group.prog, metavar="ACTION", required=True)
    _add_create(actions)
    ls = actions.add_parser("ls", help="list networks")
    ls.add_argument("--json", action="store_true", help="print one JSON document")
    ls.set_defaults(run=_ls)
    inspect = actions.add_parser("inspect", help="show one network, its hosts and endpoints here")
    inspect.add_argument("name", metavar="NAME").completer = complete_networks  # type: ignore[attr-defined]
    inspect.add_argument("--json", action="store_true", help="print one JSON document")
    inspect.set_defaults(run=_inspect)
    rm = actions.add_parser(
        "rm",
        help="remove a network that has no endpoints",
        description="Remove a network from every host. Its endpoints must be detached before.",
    )
    rm.add_argument("name", metavar="NAME").completer = complete_networks  # type: ignore[attr-defined]
    rm.add_argument("--json", action="store_true", help="print one JSON document")
    rm.set_defaults(run=_rm)


def _add_create(actions: Subparsers) -> None:
    create = actions.add_parser(
        "create",
        help="create a network on all hosts",
        description="Create a network. Every host reserves one subnet of it and reaches the "
        "subnets of all others.",
        epilog="example: meshnet network create prod --subnet 10.42.0.0/16 --subnet fd00:42::/48",
    )
    create.add_argument("name", metavar="NAME")
    create.add_argument(
        "--subnet",
        metavar="CIDR",
        action="append",
        required=True,
        help="addresses of the network; give it twice for IPv4 and IPv6",
    )
    _add_mode(create)
    create.add_argument(
        "--host-prefix",
        metavar="N",
        type=int,
        help="prefix length of one host's subnet (default: 24; of an IPv6-only network 64)",
    )
    create.add_argument(
        "--host-prefix6",
        metavar="N",
        type=int,
        help="the same for the IPv6 subnet of a dual-stack network (default: 64)",
    )
    create.add_argument("--vni", metavar="N", type=int, help="default: the lowest free from 4097")
    create.add_argument(
        "--port",
        metavar="N",
        type=int,
        help="UDP port (default: 4789; mode udp: one of its own, 20000 to 29999)",
    )
    create.add_argument(
        "--mtu", metavar="N", type=int, help="default: the underlay's, less the encapsulation"
    )
    create.add_argument(
        "--direct-routing",
        action="store_true",
        help="reach peers on the same link without encapsulation",
    )
    create.add_argument(
        "--fallback",
        choices=("auto", "never"),
        default="never",
        help="auto: send to peers that VXLAN does not reach by a userspace VTEP on another port "
        "(default: never)",
    )
    _add_physical(create)
    create.add_argument("--json", action="store_true", help="print one JSON document")
    create.set_defaults(run=_create)


def _add_mode(create: argparse.ArgumentParser) -> None:
    from meshnet.modes import DEFAULT_MODE, Mode

    create.add_argument(
        "--mode",
        metavar="MODE",
        choices=[str(mode) for mode in Mode],
        default=str(DEFAULT_MODE),
        help="one of %(choices)s (default: %(default)s)",
    )


def _add_physical(create: argparse.ArgumentParser) -> None:
    """Options of what is beside the overlay: the physical network, and the host."""
    create.add_argument(
        "--parent",
        metavar="IF",
        help="the hosts' link on the physical network (modes macvlan and underlay-bridge)",
    )
    create.add_argument(
        "--range",
        metavar="FIRST-LAST",
        action="append",
        default=[],
        help="endpoints get addresses from these of the physical network; twice for IPv4 and IPv6 "
        "(default: the whole CIDR)",
    )
    create.add_argument(
        "--gateway",
        metavar="IP",
        action="append",
        default=[],
        help="the physical network's router; twice for IPv4 and IPv6",
    )
    create.add_argument(
        "--internal",
        action="store_true",
        help="endpoints have no way out of the network (modes macvlan and underlay-bridge: "
        "they get no default route, and reach the physical network)",
    )
    create.add_argument(
        "--host-access",
        action="store_true",
        help="let a host reach its own endpoints, which macvlan else forbids",
    )


def _create(args: argparse.Namespace) -> int:
    only_ipv6 = all(":" in cidr for cidr in args.subnet)
    document = Client(args.socket).post(
        "networks",
        body={
            "name": args.name,
            "mode": args.mode,
            "subnets": args.subnet,
            "host_prefix": None if only_ipv6 else args.host_prefix,
            "host_prefix6": args.host_prefix if only_ipv6 else args.host_prefix6,
            "vni": args.vni,
            "port": args.port,
            "mtu": args.mtu,
            "direct_routing": args.direct_routing or None,
            "fallback": args.fallback if args.fallback != "never" else None,
            "parent": args.parent,
            "ranges": args.range or None,
            "gateways": args.gateway or None,
            "internal": args.internal or None,
            "host_access": args.host_access or None,
        },
    )
    if "error" in document and not args.json:
        print(f"meshnet: warning: {document['error']}", file=sys.stderr)
    return print_either(args.json, document, document["name"])


def _ls(args: argparse.Namespace) -> int:
    documents = Client(args.socket).get("networks")
    if args.json:
        print_json(documents)
        return 0
    print_table(
        ("NAME", "MODE", "SUBNETS", "VNI", "PORT", "MTU", "DIRECT"),
        (
            (
                d["name"],
                d["mode"],
                joined(d["subnets"]),
                d["vni"],
                d["port"] or "-",
                d["mtu"] or "-",
                "yes" if d["direct_routing"] else "no",
            )
            for d in documents
        ),
    )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    document = Client(args.socket).get("networks", args.name)
    if args.json:
        print_json(document)
        return 0
    for key in ("name", "mode", "vni", "port", "mtu"):
        print(f"{key + ':':16}{document[key] or '-'}")
    print(f"{'direct routing:':16}{'yes' if document['direct_routing'] else 'no'}")
    print(f"{'fallback:':16}{document['fallback']}")
    print(f"{'subnets:':16}{joined(document['subnets'])}")
    print()
    print_table(("HOST", "SUBNETS"), ((h, joined(s)) for h, s in sorted(document["hosts"].items())))
    print()
    print_table(
        ("ENDPOINT", "PID", "ADDRESS", "IFNAME", "PUBLISHED"),
        (
            (e["name"], e["pid"], e["address"], e["ifname"], joined(e["published"]))
            for e in document["endpoints"]
        ),
    )
    return 0


def _rm(args: argparse.Namespace) -> int:
    document = Client(args.socket).delete("networks", args.name)
    return print_either(args.json, document, document["name"])
