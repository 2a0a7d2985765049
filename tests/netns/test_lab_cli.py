"""``meshnet lab`` as scripts call it, without agents: exit status, output, environment."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from meshnet.errors import ConflictError, NotFoundError, UsageError
from meshnet.lab.netns import list_netns
from meshnet.lab.poll import wait_until
from meshnet.lab.process import netns_id, process_netns_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root


def meshnet(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "meshnet.cli.main", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def lab(make_lab: MakeLab) -> Lab:
    return make_lab(2, start_agents=False)


class TestExec:
    def test_runs_in_the_hosts_namespace_with_its_settings(self, lab: Lab) -> None:
        host = lab.host("h2")
        script = 'readlink /proc/self/ns/net; echo "$MESHNET_SOCKET"; echo "$MESHNET_ETCD"'
        result = meshnet("lab", "exec", "--name", lab.name, "h2", "--", "sh", "-c", script)
        netns = host.run(["readlink", "/proc/self/ns/net"]).stdout.strip()
        assert result.stdout.splitlines() == [netns, str(host.socket_path), lab.etcd_url]
        assert (result.returncode, result.stderr) == (0, "")

    @pytest.mark.parametrize(
        ("script", "status"),
        [
            ("exit 7", 7),
            ("kill -TERM $$", -signal.SIGTERM),
            # Python ignores these signals, and so would what it executes.
            ("kill -PIPE $$", -signal.SIGPIPE),
        ],
    )
    def test_ends_as_the_command_does(self, lab: Lab, script: str, status: int) -> None:
        result = meshnet("lab", "exec", "--name", lab.name, "h1", "--", "sh", "-c", script)
        assert result.returncode == status

    def test_arguments_are_passed_as_they_are(self, lab: Lab) -> None:
        arguments = ["--name", "a b", "--", "--json", ""]
        printf = ["printf", "%s\n", "first", *arguments]
        for separator in (["--"], []):
            result = meshnet("lab", "exec", "--name", lab.name, "h1", *separator, *printf)
            assert result.stdout.split("\n") == ["first", *arguments, ""]

    def test_the_switch_is_a_place_too(self, lab: Lab) -> None:
        result = meshnet("lab", "exec", "--name", lab.name, "sw", "--", "ip", "-br", "link")
        links = {line.split()[0].partition("@")[0] for line in result.stdout.splitlines()}
        assert links == {"lo", "br0", "etcd", "h1", "h2"}

    def test_unknown_host_lists_those_there_are(self, lab: Lab) -> None:
        result = meshnet("lab", "exec", "--name", lab.name, "h9", "--", "true")
        assert result.returncode == NotFoundError.exit_status
        assert "'h9'" in result.stderr
        assert "h1, h2" in result.stderr

    def test_a_lab_that_is_not_up_has_a_remedy(self, lab_name: str) -> None:
        result = meshnet("lab", "exec", "--name", lab_name, "h1", "--", "true")
        assert result.returncode == NotFoundError.exit_status
        assert f"meshnet lab up --name {lab_name}" in result.stderr
        assert len(result.stderr.splitlines()) == 1

    @pytest.mark.parametrize("command", [[], ["--"], ["--name", "x", "true"]], ids=str)
    def test_no_command_is_a_usage_error(self, lab: Lab, command: list[str]) -> None:
        result = meshnet("lab", "exec", "--name", lab.name, "h1", *command)
        assert result.returncode == UsageError.exit_status
        assert len(result.stderr.splitlines()) == 1

    def test_a_command_that_does_not_exist_is_named(self, lab: Lab) -> None:
        result = meshnet("lab", "exec", "--name", lab.name, "h1", "--", "no-such-program")
        assert result.returncode == NotFoundError.exit_status
        assert "no-such-program" in result.stderr


class TestDown:
    def test_another_program_leaves_nothing(self, lab: Lab) -> None:
        container = lab.host("h1").spawn_container()
        shell = subprocess.Popen(
            [
                *(sys.executable, "-m", "meshnet.cli.main"),
                *("lab", "exec", "--name", lab.name, "h2", "--", "sleep", "1000"),
            ]
        )
        inside = netns_id(lab.host("h2").netns_path)
        wait_until(lambda: process_netns_id(shell.pid) == inside, 5, "the shell is in h2")
        result = meshnet("lab", "down", "--name", lab.name, "--json")
        assert result.returncode == 0, result.stderr
        document = json.loads(result.stdout)
        assert document["name"] == lab.name
        assert len(document["namespaces"]) == 4
        assert result.stderr == ""
        assert shell.wait(5) == -signal.SIGTERM
        assert not container.is_alive()
        assert list_netns(lab.name) == []
        assert not lab.base_dir.exists()

    def test_not_up_is_harmless(self, lab_name: str) -> None:
        result = meshnet("lab", "down", "--name", lab_name)
        assert result.returncode == 0
        assert "nothing to do" in result.stdout

    def test_from_inside_is_refused(self, lab: Lab) -> None:
        down = [sys.executable, "-m", "meshnet.cli.main", "lab", "down", "--name", lab.name]
        result = lab.host("h1").run(down, check=False)
        assert result.returncode == ConflictError.exit_status
        assert "leave it" in result.stderr
        assert lab.etcd.running


class TestUpAndLs:
    def test_a_lab_of_that_name_conflicts(self, lab: Lab) -> None:
        result = meshnet("lab", "up", "--name", lab.name, "--json")
        assert result.returncode == ConflictError.exit_status
        assert result.stdout == ""
        assert f"meshnet lab down --name {lab.name}" in result.stderr

    @pytest.mark.parametrize(
        "options",
        [["--hosts", "-1"], ["--mtu", "9"], ["--name", "A"], ["--underlay", "ipx"]],
        ids=str,
    )
    def test_bad_options_are_usage_errors(self, options: list[str]) -> None:
        assert meshnet("lab", "up", *options).returncode == UsageError.exit_status

    def test_ls_has_every_lab(self, lab: Lab) -> None:
        result = meshnet("lab", "ls", "--json")
        assert result.returncode == 0
        document = next(item for item in json.loads(result.stdout) if item["name"] == lab.name)
        host = lab.host("h1")
        assert document["etcd"] == lab.etcd_url
        assert document["hosts"][0] == {
            "id": "h1",
            "underlay_ip": str(host.underlay_ip),
            "netns": host.netns,
            "socket": str(host.socket_path),
            "pid": None,
        }
        assert lab.name in meshnet("lab", "ls").stdout

    @pytest.mark.parametrize("command", [[], ["up"], ["exec"], ["down"], ["ls"]], ids=str)
    def test_help_has_an_example(self, command: list[str]) -> None:
        result = meshnet("lab", *command, "--help")
        assert result.returncode == 0
        assert "\n  meshnet lab " in result.stdout
