"""``meshnet status``: how this host is doing."""

from __future__ import annotations

from meshnet.cli.client import Client
from meshnet.cli.output import print_json, print_table

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from meshnet.cli.commands.completion import Subparsers


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "status",
        help="show how this host is doing",
        description="Show whether the store is connected and, for each network, whether the kernel "
        "is in sync and what is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_status)


def _status(args: argparse.Namespace) -> int:
    document = Client(args.socket).get("status")
    if args.json:
        print_json(document)
    else:
        _print(document)
    return 0


def _print(document: dict[str, Any]) -> None:
    host, store = document["host"], document["store"]
    print(f"host    {host['id']} at {host['underlay_ip']}")
    state = "connected" if store["connected"] else "LOST, the data path goes on"
    print(f"store   {state}, revision {store['revision']}, last heard {store['lag_s']:.1f} s ago")
    if store["from_disk_s"] is not None:
        print(f"        started from disk, as of {store['from_disk_s']} s ago: nothing is deleted")
    if store["error"]:
        print(f"        {store['error']}")
    print()
    print_table(
        ("NETWORK", "MODE", "PEERS", "ENDPOINTS", "IN SYNC", "PENDING"),
        (
            (
                n["name"],
                n["mode"],
                n["peers"],
                n["endpoints"],
                "yes" if n["in_sync"] else "NO",
                n["pending"],
            )
            for n in document["networks"]
        ),
    )
    fallen = [
        f"{n['name']}: {f['host']} by udp for {f['since_s']:.0f} s: {f['why']}"
        for n in document["networks"]
        for f in n["fallen"]
    ]
    if fallen:
        print("\nin fallback:")
        for line in fallen:
            print(f"  {line}")
    if document["set_aside"]:
        print("\nset aside, machines outside the mesh answer for them:")
        for held in document["set_aside"]:
            print(f"  {held['network']}: {held['address']} by {held['mac']}")
    problems = [f"{n['name']}: {e}" for n in document["networks"] for e in n["errors"]]
    problems += document["errors"]
    problems += [f"store key {b['key']}: {b['reason']}" for b in document["bad_values"]]
    if problems:
        print("\nproblems:")
        for problem in problems:
            print(f"  {problem}")
    if document["notes"]:
        print("\nnotes:")
        for note in document["notes"]:
            print(f"  {note}")
