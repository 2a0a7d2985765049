"""Shell completion, by argcomplete: options and commands, and names the agent knows."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
    """What ``add_subparsers`` returns."""

_SHELLS = ("bash", "zsh", "fish")


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "completion",
        help="print a script that makes a shell complete meshnet's commands",
        epilog='example: eval "$(meshnet completion bash)"',
    )
    parser.add_argument("shell", choices=_SHELLS)
    parser.set_defaults(run=_completion)


def _completion(args: argparse.Namespace) -> int:
    import argcomplete

    sys.stdout.write(argcomplete.shellcode(["meshnet"], shell=args.shell))  # type: ignore[attr-defined]
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and exit."""
    import argcomplete

    argcomplete.autocomplete(parser)


def complete_networks(parsed_args: argparse.Namespace, **_: Any) -> list[str]:  # noqa: ANN401
    """Names of networks, or none while no agent answers."""
    from meshnet.cli.client import Client
    from meshnet.errors import MeshnetError

    try:
        return [str(d["name"]) for d in Client(parsed_args.socket).get("networks")]
    except MeshnetError:
        return []


def complete_images(parsed_args: argparse.Namespace, **_: Any) -> list[str]:  # noqa: ANN401
    """Names of images, or none while no agent answers."""
    from meshnet.cli.client import Client
    from meshnet.errors import MeshnetError

    try:
        return [str(n) for d in Client(parsed_args.socket).get("images") for n in d["names"]]
    except MeshnetError:
        return []


def complete_containers(parsed_args: argparse.Namespace, **_: Any) -> list[str]:  # noqa: ANN401
    """Names of containers, or none while no agent answers."""
    from meshnet.cli.client import Client
    from meshnet.errors import MeshnetError

    try:
        return [str(d["name"]) for d in Client(parsed_args.socket).get("containers")]
    except MeshnetError:
        return []
