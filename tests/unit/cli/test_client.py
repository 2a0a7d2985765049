"""The client where no agent is needed: help, completion, usage."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest

from meshnet.cli import client as module
from meshnet.cli.main import GROUPS, groups_for, make_parser, run_command
from meshnet.unix_http import HttpConnection

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
        "ps --js",
        "network create x --sub 10.0.0.0/16",
        "network ls more",
        "run --nothing image",
        "run --cpus nan image",
        "network inspect a/b",
    ],
)
def test_usage_errors_are_one_line_and_status_2(arguments: str) -> None:
    done = client(*arguments.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "--help" in done.stderr or "a/b" in done.stderr


@pytest.mark.parametrize("arguments", ["network ls more", "run --nothing image"])
def test_the_help_that_is_named_is_the_commands_own(arguments: str) -> None:
    command = " ".join(word for word in arguments.split() if word not in ("more", "image"))
    command = command.removesuffix(" --nothing")
    assert f"see meshnet {command} --help" in client(*arguments.split()).stderr


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


SLOW = ("http.client", "email", "ssl", "typing", "dataclasses", "shutil", "threading", "subprocess",
        "tarfile", "urllib.parse", "ipaddress")  # fmt: skip
LIBRARIES = ("trio", "pyroute2", "etcd3", "grpc", "msgspec", "scapy", "argcomplete")


@pytest.mark.parametrize(
    "arguments",
    [
        ("attach", "1", "--net", "prod", "--json"),
        ("run", "--rm", "--net", "prod", "image", "true"),
        ("exec", "web", "true"),
        ("status",),
        ("network", "ls"),
    ],
    ids=" ".join,
)
def test_what_is_slow_to_import_is_not(arguments: tuple[str, ...]) -> None:
    """Looks at the imports up to the point where no agent answers."""
    code = (
        "import sys; from meshnet.cli.main import run_command; "
        "status = run_command(['--socket', '/nowhere/agent.sock', *sys.argv[1:]]); "
        "print(status, *sys.modules)"
    )
    argv = [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"]
    done = subprocess.run([*argv, *arguments], capture_output=True, text=True, check=True)
    status, *loaded = done.stdout.split()
    assert status == "3", done
    assert not {*SLOW, *LIBRARIES} & set(loaded)


def test_the_table_of_commands_is_what_the_groups_add() -> None:
    for group, commands in GROUPS.items():
        assert commands_of([group]) == list(commands)
        for command in commands:
            assert groups_for(["--json", "--socket", "/a", command, "image"]) == [group]


@pytest.mark.parametrize("arguments", [(), ("-h", "run"), ("rnu",), ("--version",)], ids=str)
def test_help_and_wrong_words_know_all_commands(arguments: tuple[str, ...]) -> None:
    assert groups_for(arguments) == GROUPS


def commands_of(groups: list[str]) -> list[str]:
    usage = make_parser(groups).format_help()
    return re.findall(r"^    (\w+)", usage.partition("commands:")[2].partition("exit")[0], re.M)


@pytest.mark.parametrize(
    "command",
    ["run -d image", "run image", "exec web true", "stop -t 300 web", "rm -f web", "wait web"],
)
def test_the_life_of_containers_takes_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    """A stop that took longer than the client waited once counted as an agent without an answer."""
    timeouts = []

    class Timed(HttpConnection):
        def __init__(self, path: str, timeout_s: float | None) -> None:
            timeouts.append(timeout_s)
            super().__init__(path, timeout_s)

    monkeypatch.setattr(module, "HttpConnection", Timed)
    assert run_command(["--socket", str(tmp_path / "none"), *command.split()]) == 3
    assert timeouts == [None]
    assert run_command(["--socket", str(tmp_path / "none"), "ps"]) == 3
    assert timeouts[1] is not None
