"""Shell completion, by argcomplete: options and commands, and names the agent knows."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    import argparse
    from typing import Any

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
    """What ``add_subparsers`` returns."""

_SHELLS = ("bash", "zsh", "fish")


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "completion",
        help="print a completion script for a shell",
        description="Print a script that makes a shell complete meshnet's commands, options and "
        "names.",
        epilog='example: eval "$(meshnet completion bash)"',
    )
    parser.add_argument("shell", choices=_SHELLS, help="the shell")
    parser.set_defaults(run=_completion)


def _completion(args: argparse.Namespace) -> int:
    import argcomplete

    sys.stdout.write(argcomplete.shellcode(["meshnet"], shell=args.shell))  # type: ignore[attr-defined]
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell's request for completions, and exit."""
    import argcomplete

    argcomplete.autocomplete(parser)


def complete_networks(parsed_args: argparse.Namespace, **_: Any) -> list[str]:  # noqa: ANN401
    """Names of networks, or none while no agent answers."""
    return [str(d["name"]) for d in _ask(parsed_args, "networks") or ()]


def complete_endpoints(parsed_args: argparse.Namespace, **_: Any) -> list[str]:  # noqa: ANN401
    """Names of this host's endpoints, or none while no agent answers."""
    return [str(d["name"]) for d in _local_endpoints(parsed_args)]


def complete_published(parsed_args: argparse.Namespace, **_: Any) -> list[str]:  # noqa: ANN401
    """Published ports of the endpoint that the command line names."""
    return [
        str(port)
        for d in _local_endpoints(parsed_args)
        if parsed_args.name in (d["name"], d["id"])
        for port in d["published"]
    ]


def _local_endpoints(parsed_args: argparse.Namespace) -> list[dict[str, Any]]:
    status, answer = _ask(parsed_args, "status"), _ask(parsed_args, "endpoints")
    if status is None or answer is None:
        return []
    return [d for d in answer["endpoints"] if d["host"] == status["host"]["id"]]


def _ask(parsed_args: argparse.Namespace, what: str) -> Any:  # noqa: ANN401
    """Return the agent's answer, or None without one: a completion must never print an error."""
    from meshnet.cli.client import Client
    from meshnet.errors import MeshnetError

    try:
        return Client(parsed_args.socket).get(what)
    except MeshnetError:
        return None


def complete_images(parsed_args: argparse.Namespace, **_: Any) -> list[str]:  # noqa: ANN401
    """Names of images, or none while no agent answers."""
    return [str(name) for d in _ask(parsed_args, "images") or [] for name in d["names"]]


def complete_containers(parsed_args: argparse.Namespace, **_: Any) -> list[str]:  # noqa: ANN401
    """Names of containers, or none while no agent answers."""
    return [str(d["name"]) for d in _ask(parsed_args, "containers") or []]


def complete_volumes(parsed_args: argparse.Namespace, **_: Any) -> list[str]:  # noqa: ANN401
    """Names of volumes, or none while no agent answers."""
    return [str(d["name"]) for d in _ask(parsed_args, "volumes") or []]
