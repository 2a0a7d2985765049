"""Who may talk to the agent, and that it reveals no secret: with real users and processes."""

from __future__ import annotations

import grp
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from meshnet.config import load_config
from meshnet.errors import UsageError
from meshnet_agent.api.server import listen
from meshnet_agent.edges import _read_password
from meshnet_agent.main import _read_config, main
from tests.contract.hosts import UNDERLAY_DEV, host_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

_MEMBERS, _NOBODY = 54_321, 65_534
_SECRET = "s3cret-of-etcd"
_AS_USER = """
import locale, os, sys
from meshnet.cli import main  # while the files may still be read
from meshnet.cli.commands import status
os.setgroups([int(group) for group in sys.argv[2:]])
os.setgid(65534)
os.setuid(65534)
sys.exit(main.run_command(["--socket", sys.argv[1], "status", "--json"]))
"""
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


@pytest.fixture
def path(root: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The agent's own socket, in a directory that anybody may look into; answers one request."""
    group = grp.struct_group(("meshnet", "x", _MEMBERS, []))
    monkeypatch.setattr(grp, "getgrnam", lambda name: {"meshnet": group}[name])
    with tempfile.TemporaryDirectory(prefix="meshnet-socket-") as directory:
        Path(directory).chmod(0o755)
        path = Path(directory, "agent.sock")
        listener = listen(path)
        listener.settimeout(10)

        def answer() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.recv(65_536)
                accepted.sendall(_ANSWER)

        thread = threading.Thread(target=answer)
        thread.start()
        yield path
        with socket.socket(socket.AF_UNIX) as last:  # whoever was refused left the thread waiting
            if thread.is_alive():
                last.connect(str(path))
                last.sendall(b"x")
                thread.join()
        listener.close()


def ask_as_user(path: Path, *groups: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _AS_USER, str(path), *map(str, groups)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_mode_and_group(path: Path) -> None:
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o660
    assert (found.st_uid, found.st_gid) == (0, _MEMBERS)


def test_an_ordinary_user_is_refused(path: Path) -> None:
    done = ask_as_user(path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert f"socket {path} may not be opened by this user" in done.stderr
    assert "group meshnet" in done.stderr


def test_a_member_of_the_group_is_served(path: Path) -> None:
    done = ask_as_user(path, _MEMBERS)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "{}", "")


@pytest.mark.parametrize("given", [("--etcd-password", _SECRET), (f"--etcd-password={_SECRET}",)])
def test_a_password_on_the_command_line_is_refused_and_not_repeated(
    given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--etcd", "http://127.0.0.1:1", "--underlay-dev", "lo", *given]) == 2
    shown = capsys.readouterr()
    assert "use --etcd-password-file" in shown.err
    assert _SECRET not in shown.out + shown.err


@pytest.mark.parametrize("content", [_SECRET.encode() + b"\xff", b""])
def test_a_password_file_that_cannot_be_used_is_not_quoted(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    arguments = {"etcd": "http://h", "underlay-dev": "lo", "etcd-password-file": str(file)}
    with pytest.raises(UsageError, match=str(file)) as refused:
        _read_password(load_config(arguments, {}, None, hostname="box"))
    assert _SECRET not in str(refused.value)
    assert refused.value.__cause__ is None


def test_the_password_is_in_no_message(root: None, tmp_path: Path) -> None:
    """An agent that logs all it can, and ends because etcd does not answer."""
    with host_namespace() as (name, _):
        done = subprocess.run(
            [
                *("ip", "netns", "exec", name, sys.executable, "-m", "meshnet_agent"),
                *("--etcd", "http://127.0.0.1:1", "--underlay-dev", UNDERLAY_DEV),
                *("--run-dir", str(tmp_path / "run"), "--state-dir", str(tmp_path / "state")),
                *("--etcd-user", "mesh", "--log-format", "json", "--log-level", "debug"),
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={**os.environ, "MESHNET_ETCD_PASSWORD": _SECRET},
        )
    assert done.returncode == 8, done.stderr
    assert _SECRET not in done.stdout + done.stderr
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or _SECRET.encode() not in file.read_bytes()


def test_programs_that_the_agent_starts_do_not_inherit_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MESHNET_ETCD_PASSWORD", _SECRET)
    config = _read_config(["--etcd", "http://h", "--underlay-dev", "lo"])
    assert config.etcd_password == _SECRET
    assert _SECRET not in os.environ.values()
