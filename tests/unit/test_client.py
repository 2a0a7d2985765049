"""The client where no agent is needed: help, completion, usage."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest

from meshnet.cli import client as module
from meshnet.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = (
    "",
    "network",
    "network create",
    "network ls",
    "network inspect",
    "network rm",
    "attach",
    "detach",
    "endpoint",
    "endpoint ls",
    "endpoint publish",
    "endpoint unpublish",
    "hosts",
    "host",
    "host rm",
    "status",
    "image",
    "image load",
    "image ls",
    "image inspect",
    "image rm",
    "image pull",
    "image push",
    "lab",
    "lab up",
    "lab exec",
    "lab down",
    "completion",
)


def client(*arguments: str, module: str = "meshnet.cli.main") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    done = client(*command.split(), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: meshnet {command}".rstrip())
    assert done.stderr == ""


def test_agent_help_names_every_setting() -> None:
    from meshnet.config import SETTINGS

    done = client("--help", module="meshnet_agent")
    assert done.returncode == 0
    for setting in SETTINGS:
        assert (f"--{setting.name} " in done.stdout) is not setting.secret


def test_version() -> None:
    assert client("--version").stdout == f"meshnet {version('meshnet')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        "nothing",
        "network",
        "attach",
        "attach x --net a",
        "endpoint publish web",
        "--nothing",
        "completion csh",
    ],
)
def test_usage_errors_are_one_line_and_status_2(arguments: str) -> None:
    done = client(*arguments.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "--help" in done.stderr


def test_no_command_shows_the_help() -> None:
    done = client()
    assert done.returncode == 2
    assert "commands:" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    done = client("completion", shell)
    assert done.returncode == 0
    assert "meshnet" in done.stdout


def test_bash_completes_commands() -> None:
    """Through bash itself, as a user's Tab does."""
    script = (
        'source /dev/stdin; COMP_WORDS=(meshnet net); COMP_CWORD=1; COMP_LINE="meshnet net"; '
        "COMP_POINT=11; _python_argcomplete meshnet; echo ${COMPREPLY[@]}"
    )
    code = client("completion", "bash").stdout
    done = subprocess.run(
        ["bash", "-c", script], input=code, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "network"


def test_the_client_starts_without_the_agents_libraries() -> None:
    code = "import sys, meshnet.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"trio", "pyroute2", "etcd3", "grpc", "msgspec", "scapy", "argcomplete"}


@pytest.mark.parametrize(
    "command",
    ["run -d image", "run image", "exec web true", "stop -t 300 web", "rm -f web", "wait web"],
)
def test_the_life_of_containers_takes_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    """A stop that waits longer than the client did was an agent that does not answer."""
    timeouts = []

    class Connection(module._UnixConnection):
        def __init__(self, path: str, timeout_s: float | None) -> None:
            timeouts.append(timeout_s)
            super().__init__(path, timeout_s)

    monkeypatch.setattr(module, "_UnixConnection", Connection)
    assert main(["--socket", str(tmp_path / "none"), *command.split()]) == 3
    assert timeouts == [None]
    assert main(["--socket", str(tmp_path / "none"), "ps"]) == 3
    assert timeouts[1] is not None
