"""``meshnet-agent``: reads its settings, sets up the process and runs the agent.

This is the agent's only ``trio.run``.
"""

from __future__ import annotations

import gc
import os
import resource
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from meshnet.arguments import Parser
from meshnet.config import SETTINGS, AgentConfig, load_config
from meshnet.errors import MeshnetError, UsageError
from meshnet_agent.daemon import serve
from meshnet_agent.logs import configure_logs

if TYPE_CHECKING:
    from collections.abc import Sequence

_SWITCH_S = 0.0001
"""How long a thread may keep the interpreter while another one waits for it."""
_COLLECTED = 10_000, 20, 50
"""How many objects accumulate before the collector looks for cycles (`gc.set_threshold`).

Each client leaves about 30 objects in cycles, and until collected they hold memory: with a
threshold of 50,000 an agent grew for ten minutes.  A low threshold is slow: listing 10,000 hosts
makes 100,000 objects, and none of them is garbage.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent until it is told to stop.

    Args:
        arguments: the command line without the program's name; None: the process's own.

    Returns:
        The exit status: 0, or that of the `MeshnetError` that ended the agent.

    Raises:
        BaseExceptionGroup: something unexpected happened, alone or along with a `MeshnetError`.
    """
    try:
        config = _read_config(arguments)
        configure_logs(config.log_level, config.log_format)
        _set_up_process()
        trio.run(serve, config)
    except MeshnetError as error:
        return _fail(error)
    except BaseExceptionGroup as group:
        ours, rest = group.split(MeshnetError)
        if ours is None or rest is not None:
            # A bug must show its traceback, even where an expected error happened beside it.
            raise
        return _fail(_first(ours))
    return 0


def _fail(error: MeshnetError) -> int:
    print(f"meshnet-agent: {error}", file=sys.stderr)
    return error.exit_status


def _first(error: MeshnetError | BaseExceptionGroup[MeshnetError]) -> MeshnetError:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _set_up_process() -> None:
    # The agent holds one pidfd for each endpoint: it soon reaches the usual soft limit of 1,024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.set_threshold(*_COLLECTED)
    # A pass keeps its thread busy for a while.  With Python's default of 5 ms, an attach would wait
    # that long after each of its system calls.
    sys.setswitchinterval(_SWITCH_S)


def make_parser() -> Parser:
    """Make the parser of the command line: an option for each setting that is not a secret."""
    parser = Parser(
        prog="meshnet-agent",
        description="The meshnet agent: one on every host, as root.",
        epilog="Every option is also an environment variable (--lease-ttl: MESHNET_LEASE_TTL) and "
        "a key of the TOML file (lease-ttl). Example: meshnet-agent --etcd http://10.0.0.1:2379 "
        "--underlay-dev eth0",
    )
    for setting in SETTINGS:
        if not setting.secret:
            default = f" (default: {setting.default})" if setting.default else ""
            parser.add_argument(
                f"--{setting.name}",
                metavar=setting.metavar,
                help=setting.help + default,
                choices=setting.choices or None,
            )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    parser.add_argument(
        "--version", action="version", version=f"meshnet-agent {version('meshnet')}"
    )
    return parser


def _read_config(arguments: Sequence[str] | None) -> AgentConfig:
    parser = make_parser()
    given = sys.argv[1:] if arguments is None else arguments
    for setting in SETTINGS:
        if setting.secret and f"--{setting.name}" in {word.partition("=")[0] for word in given}:
            raise UsageError(  # the parser's own message would quote the secret
                f"--{setting.name} is not an option, because ps would show it: use "
                f"--{setting.name}-file"
            )
    parsed = vars(parser.parse_args(given))
    path = parsed.pop("config") or os.environ.get("MESHNET_CONFIG")
    text = None
    if path is not None:
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"config file {path} cannot be read: {error}") from error
    config = load_config(
        {s.name: parsed.get(s.field) for s in SETTINGS},
        os.environ,
        text,
        hostname=socket.gethostname(),
        toml_name=path or "",
    )
    for setting in SETTINGS:
        if setting.secret:
            # The processes of userspace VTEPs, which outlive the agent, would inherit it.
            os.environ.pop(setting.variable, None)
    return config


if __name__ == "__main__":
    sys.exit(main())
