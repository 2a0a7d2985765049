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
    inspect = actions.add_parser("inspect", help="show a network, its hosts and endpoints here")
    inspect.add_argument("name", metavar="NAME", help="the network").completer = complete_networks  # type: ignore[attr-defined]
    inspect.add_argument("--json", action="store_true", help="print one JSON document")
    inspect.set_defaults(run=_inspect)
    rm = actions.add_parser(
        "rm",
        help="remove a network that has no endpoints",
        description="Remove a network from every host. Detach its endpoints first.",
    )
    rm.add_argument("name", metavar="NAME", help="the network").completer = complete_networks  # type: ignore[attr-defined]
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
    create.add_argument("name", metavar="NAME", help="name of the network")
    create.add_argument(
        "--subnet",
        metavar="CIDR",
        action="append",
        required=True,
        help="set the network's addresses; repeat for IPv4 and IPv6",
    )
    _add_mode(create)
    _add_overlay(create)
    _add_physical(create)
    create.add_argument("--json", action="store_true", help="print one JSON document")
    create.set_defaults(run=_create)


def _add_overlay(create: argparse.ArgumentParser) -> None:
    """Options of subnets and tunnels between hosts."""
    create.add_argument(
        "--host-prefix",
        metavar="N",
        type=int,
        help="set the prefix length of each host's subnet (default: 24; in an IPv6-only network "
        "64)",
    )
    create.add_argument(
        "--host-prefix6",
        metavar="N",
        type=int,
        help="set the prefix length of each host's IPv6 subnet in a dual-stack network (default: "
        "64)",
    )
    create.add_argument(
        "--vni",
        metavar="N",
        type=int,
        help="set the VXLAN network identifier (default: the lowest free from 4097)",
    )
    create.add_argument(
        "--port",
        metavar="N",
        type=int,
        help="set the tunnel's UDP port (default: 4789; in mode udp 20000 + VNI modulo 10000)",
    )
    create.add_argument(
        "--mtu",
        metavar="N",
        type=int,
        help="set the endpoints' MTU in bytes (default: the underlay's less the encapsulation)",
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
        help="send through a userspace VTEP on another port to peers that VXLAN does not reach "
        "(default: %(default)s)",
    )


def _add_mode(create: argparse.ArgumentParser) -> None:
    from meshnet.modes import DEFAULT_MODE, Mode

    create.add_argument(
        "--mode",
        metavar="MODE",
        choices=[str(mode) for mode in Mode],
        default=str(DEFAULT_MODE),
        help="choose the mode: %(choices)s (default: %(default)s)",
    )


def _add_physical(create: argparse.ArgumentParser) -> None:
    """Add the options that concern the physical network and the host, not the overlay."""
    create.add_argument(
        "--parent",
        metavar="IF",
        help="name the hosts' link on the physical network (modes macvlan and underlay-bridge)",
    )
    create.add_argument(
        "--range",
        metavar="FIRST-LAST",
        action="append",
        default=[],
        help="give endpoints only these addresses of the physical network; repeat for IPv4 and "
        "IPv6 (default: the whole CIDR)",
    )
    create.add_argument(
        "--gateway",
        metavar="IP",
        action="append",
        default=[],
        help="name the physical network's router; repeat for IPv4 and IPv6 (default: none)",
    )
    create.add_argument(
        "--internal",
        action="store_true",
        help="give endpoints no way out of the network (modes macvlan and underlay-bridge: no "
        "default route, but they reach the physical network)",
    )
    create.add_argument(
        "--host-access",
        action="store_true",
        help="let a host reach its own endpoints, which mode macvlan otherwise prevents",
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
        ("ENDPOINT", "PID", "OWNER", "ADDRESS", "IFNAME", "PUBLISHED"),
        (
            (
                e["name"],
                e["pid"] or "-",
                e["owner"] or "-",
                e["address"],
                e["ifname"],
                joined(e["published"]),
            )
            for e in document["endpoints"]
        ),
    )
    return 0


def _rm(args: argparse.Namespace) -> int:
    document = Client(args.socket).delete("networks", args.name)
    return print_either(args.json, document, document["name"])
