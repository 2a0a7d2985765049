"""The lab itself, without agents: what tests on labs rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from meshnet.errors import (
    AgentUnreachableError,
    ConflictError,
    NotFoundError,
    PoolExhaustedError,
    StoreUnavailableError,
    UsageError,
)
from meshnet.lab.commands import CommandFailedError
from meshnet.lab.netns import add_netns, list_netns, netns_name
from meshnet.lab.poll import wait_until
from meshnet.lab.process import ProcessRef, end_processes, identify, netns_id, process_netns_id
from meshnet.lab.topology import Lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meshnet.lab.commands import Namespace
    from meshnet.lab.etcd import EtcdServer

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root


def ping(source: Namespace, address: object, *options: str) -> bool:
    """Whether one ping is answered within a second."""
    argv = ["ping", "-n", "-c1", "-W1", *options, str(address)]
    return source.run(argv, check=False).returncode == 0


class TestUnderlay:
    @pytest.mark.parametrize("family", [4, 6])
    def test_hosts_reach_each_other_the_outside_and_etcd(
        self, make_lab: MakeLab, family: int
    ) -> None:
        lab = make_lab(3, underlay_family=family, start_agents=False)
        assert [host.name for host in lab.hosts] == ["h1", "h2", "h3"]
        assert {host.underlay_ip.version for host in lab.hosts} == {family}
        for source in lab.hosts:
            for target in lab.hosts:
                assert ping(source, target.underlay_ip)
            assert ping(source, lab.outside_ip)
        endpoints = f"--endpoints={lab.etcd_url}"
        lab.host("h1").run(["etcdctl", endpoints, "put", "key", "value"])
        assert lab.host("h3").run(["etcdctl", endpoints, "get", "key"]).stdout == "key\nvalue\n"
        assert lab.etcd.ctl("get", "key") == "key\nvalue\n"

    def test_mtu_is_that_of_every_link(self, make_lab: MakeLab) -> None:
        lab = make_lab(2, mtu=2000, start_agents=False)
        host, peer = lab.hosts
        assert ping(host, peer.underlay_ip, "-M", "do", "-s", str(2000 - 28))
        assert not ping(host, peer.underlay_ip, "-M", "do", "-s", str(2000 - 27))

    def test_without_a_gateway_there_is_no_default_route(self, make_lab: MakeLab) -> None:
        lab = make_lab(1, gateway=False, start_agents=False)
        assert lab.host("h1").run(["ip", "route", "show", "default"]).stdout == ""

    def test_a_host_that_is_cut_off_keeps_its_link(self, make_lab: MakeLab) -> None:
        lab = make_lab(2, start_agents=False)
        host, peer = lab.hosts
        lab.cut("h2")
        assert not ping(host, peer.underlay_ip)
        assert "LOWER_UP" in peer.run(["ip", "link", "show", "eth0"]).stdout
        lab.mend("h2")
        wait_until(lambda: ping(host, peer.underlay_ip), 10, "h2 answers again")

    def test_etcd_survives_the_hosts_and_can_be_cut_off(self, make_lab: MakeLab) -> None:
        lab = make_lab(2, start_agents=False)
        lab.remove_host("h1")
        health = ["etcdctl", f"--endpoints={lab.etcd_url}", "--command-timeout=1s"]
        lab.host("h2").run([*health, "endpoint", "health"])
        lab.cut("etcd")
        assert lab.host("h2").run([*health, "endpoint", "health"], check=False).returncode != 0

    @pytest.mark.parametrize(
        "options",
        [
            {"mtu": 500},
            {"mtu": 1279, "underlay_family": 6},
            {"hosts": -1},
            {"etcd_members": 2},
            {"underlay_family": 5},
            {"name": "Lab"},
        ],
        ids=str,
    )
    def test_options_out_of_range_are_refused(
        self, make_lab: MakeLab, options: dict[str, int]
    ) -> None:
        with pytest.raises(UsageError):
            make_lab(**options)

    def test_host_numbers_out_of_range_are_refused(self, make_lab: MakeLab) -> None:
        with pytest.raises(PoolExhaustedError, match="70000"):
            make_lab(up=False).underlay.host_ip(70000)


class TestEtcds:
    @pytest.fixture
    def lab(self, make_lab: MakeLab) -> Lab:
        return make_lab(1, etcd_members=3, start_agents=False)

    def test_quorum_lives_with_one_member_less(self, lab: Lab) -> None:
        first, second, third = lab.etcds.values()
        assert lab.etcd is first
        health = ["etcdctl", f"--endpoints={lab.etcd_url}", "--command-timeout=2s"]
        lab.host("h1").run([*health, "endpoint", "health"])
        third.kill()
        wait_until(lambda: _puts(first, "one lost"), 10, "two members are enough")
        second.pause()
        wait_until(lambda: not _puts(first, "two lost"), 10, "one member is not")
        second.resume()
        third.start()
        third.wait_healthy()
        lab.cut("etcd")
        wait_until(lambda: _puts(second, "cut off"), 10, "the others go on without the first")
        lab.mend("etcd")
        wait_until(lambda: first.ctl("get", "key") == "key\ncut off\n", 10, "it caught up")

    def test_a_member_that_lost_its_data_joins_again(self, lab: Lab) -> None:
        first, second, third = lab.etcds.values()
        _puts(first, "kept")
        third.lose_data()
        wait_until(lambda: _puts(second, "kept"), 10, "two members are enough")
        third.rejoin(first)
        third.wait_healthy()
        assert third.ctl("get", "key") == "key\nkept\n"
        assert len(first.ctl("member", "list").splitlines()) == 3

    def test_a_snapshot_is_restored_by_all(self, lab: Lab) -> None:
        snapshot = lab.base_dir / "snapshot"
        _puts(lab.etcd, "old")
        lab.etcd.ctl("snapshot", "save", str(snapshot))
        _puts(lab.etcd, "new")
        for etcd in lab.etcds.values():
            etcd.restore(snapshot)
        for etcd in lab.etcds.values():
            etcd.start()
        for etcd in lab.etcds.values():
            etcd.wait_healthy()
            assert etcd.ctl("get", "key") == "key\nold\n"

    def test_down_finds_members_that_another_program_started(self, lab: Lab) -> None:
        lab.etcds["etcd2"].restart()
        Lab.attach(lab.name).down()
        assert not any(etcd.running for etcd in lab.etcds.values())


def _puts(etcd: EtcdServer, value: str) -> bool:
    """Tell whether etcd accepts a value within a second."""
    try:
        etcd.ctl("--command-timeout=1s", "put", "key", value)
    except StoreUnavailableError:
        return False
    return True


class TestHosts:
    def test_commands_find_their_agent_and_etcd(self, make_lab: MakeLab) -> None:
        lab = make_lab(2, start_agents=False)
        host = lab.host("h2")
        script = 'echo "$MESHNET_SOCKET $MESHNET_ETCD"; echo text >&2; exit "$1"'
        result = host.run(["sh", "-c", script, "sh", "0"])
        assert result.stdout.split() == [str(host.socket_path), lab.etcd_url]
        with pytest.raises(CommandFailedError, match=r"(?s)status 3.*stderr: text"):
            host.run(["sh", "-c", script, "sh", "3"])

    def test_unknown_host_lists_those_there_are(self, make_lab: MakeLab) -> None:
        with pytest.raises(NotFoundError, match="h1, h2"):
            make_lab(2, start_agents=False).host("h9")

    def test_a_host_that_comes_back_has_its_address_and_state(self, make_lab: MakeLab) -> None:
        lab = make_lab(2, start_agents=False)
        address = lab.host("h1").underlay_ip
        (lab.host("h1").state_dir / "file").write_text("kept")
        container = lab.host("h1").spawn_container()
        lab.remove_host("h1", keep_state=True)
        assert not container.is_alive()
        assert [host.name for host in lab.hosts] == ["h2"]
        host = lab.add_host("h1")
        assert host.underlay_ip == address
        assert (host.state_dir / "file").read_text() == "kept"
        assert ping(lab.host("h2"), address)
        lab.remove_host("h1")
        assert not host.state_dir.exists()

    def test_added_hosts_have_addresses_of_their_own(self, make_lab: MakeLab) -> None:
        lab = make_lab(1, start_agents=False)
        added = [lab.add_host(name) for name in ("edge", "h3", "other")]
        assert len({host.underlay_ip for host in lab.hosts}) == 4
        assert all(ping(lab.host("h1"), host.underlay_ip) for host in added)
        with pytest.raises(ConflictError, match="edge"):
            lab.add_host("edge")
        for name in ("sw", "etcd", "a-b", "Big", ""):
            with pytest.raises(UsageError):
                lab.add_host(name)

    def test_no_agent_is_told_as_such(self, make_lab: MakeLab) -> None:
        host = make_lab(1, start_agents=False).host("h1")
        assert not host.is_agent_running()
        with pytest.raises(NotFoundError, match="no agent runs on lab host h1"):
            _ = host.agent_pid
        assert host.stop_agent() is None

    def test_attached_lab_is_the_same_lab(self, make_lab: MakeLab) -> None:
        lab = make_lab(2, underlay_family=6, mtu=1400, start_agents=False)
        again = Lab.attach(lab.name)
        assert again.underlay == lab.underlay
        assert again.host("h2").underlay_ip == lab.host("h2").underlay_ip
        assert again.etcd.ctl("get", "nothing") == ""
        again.down()
        with pytest.raises(NotFoundError, match="meshnet lab up"):
            Lab.attach(lab.name)


class TestContainers:
    def test_a_container_has_a_namespace_of_its_own(self, make_lab: MakeLab) -> None:
        lab = make_lab(1, start_agents=False)
        first = lab.host("h1").spawn_container()
        second = lab.host("h1").spawn_container(["sh", "-c", "sleep 1000"])
        namespaces = {process_netns_id(pid) for pid in (first.pid, second.pid, os.getpid())}
        assert len(namespaces) == 3
        links = first.run(["ip", "-br", "link"]).stdout.splitlines()
        assert [line.split()[:2] for line in links] == [["lo", "DOWN"]]

    def test_end_takes_along_what_runs_in_its_namespace(self, make_lab: MakeLab) -> None:
        lab = make_lab(1, start_agents=False)
        container = lab.host("h1").spawn_container()
        other = lab.host("h1").spawn_container()
        server = container.popen(["sleep", "1000"])
        wait_until(
            lambda: process_netns_id(server.pid) == process_netns_id(container.pid), 5, "entered"
        )
        container.end()
        assert not container.is_alive()
        assert server.wait(5) == -signal.SIGTERM
        assert other.is_alive()

    def test_a_container_that_cannot_start_says_why(self, make_lab: MakeLab) -> None:
        host = make_lab(1, start_agents=False).host("h1")
        container = host.spawn_container(["no-such-program"])
        wait_until(lambda: not container.is_alive(), 5, "container ended")
        assert "no-such-program" in (host.log_path.parent / "containers.log").read_text()


class TestDown:
    def test_everything_in_the_lab_is_ended(self, make_lab: MakeLab) -> None:
        lab = make_lab(2, start_agents=False)
        host = lab.host("h1")
        container = host.spawn_container()
        own = [
            host.popen(["sleep", "1000"]),
            container.popen(["sleep", "1000"]),
            # It ignores SIGTERM, and has a child in a namespace that the lab does not know.
            host.popen(
                ["sh", "-c", "trap : TERM; unshare --net sleep 1000 & while :; do wait; done"]
            ),
        ]
        # Started by somebody else, as by 'lab exec'.
        strange = subprocess.Popen(["nsenter", f"--net={host.netns_path}", "sleep", "1000"])
        inside = netns_id(host.netns_path)
        wait_until(lambda: process_netns_id(strange.pid) == inside, 5, "entered")
        child = wait_until(lambda: _children(own[2].pid), 5, "the shell has a child")
        grandchild = identify(child[0])
        bystander = subprocess.Popen(["sleep", "1000"])
        try:
            lab.down(deadline_s=0.5)
            assert strange.wait(5) == -signal.SIGTERM
            assert [child.wait(5) for child in own][:2] == [-signal.SIGTERM] * 2
            assert not grandchild.is_alive()
            assert not container.is_alive()
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()

    def test_twice_and_never_up_are_harmless(self, make_lab: MakeLab) -> None:
        lab = make_lab(1, start_agents=False)
        assert lab.down().anything
        assert not lab.down().anything
        assert not make_lab(up=False).down().anything

    def test_a_lab_can_be_up_again_after(self, make_lab: MakeLab) -> None:
        lab = make_lab(1, start_agents=False)
        lab.down()
        lab.up()
        assert ping(lab.host("h1"), lab.outside_ip)

    @pytest.mark.parametrize("state", ["paused", "killed"])
    def test_etcd_may_be_in_any_state(self, make_lab: MakeLab, state: str) -> None:
        lab = make_lab(1, start_agents=False)
        if state == "paused":
            lab.etcd.pause()
        else:
            os.kill(lab.etcd.pid, signal.SIGKILL)
        lab.down()

    def test_files_mounted_below_its_directory_survive(
        self, make_lab: MakeLab, tmp_path: Path
    ) -> None:
        lab = make_lab(1, start_agents=False)
        (tmp_path / "file").write_text("the user's")
        mount_point = lab.host("h1").state_dir / "a volume"
        mount_point.mkdir()
        subprocess.run(["mount", "--bind", tmp_path, mount_point], check=True)
        lab.down()
        assert (tmp_path / "file").read_text() == "the user's"

    def test_a_directory_that_is_not_a_labs_is_left_alone(
        self, make_lab: MakeLab, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("the user's")
        lab = Lab("notmine", base_dir=tmp_path)
        with pytest.raises(ConflictError, match="exists already"):
            lab.up()
        with pytest.raises(ConflictError, match="left alone"):
            lab.down()
        other = make_lab(0, start_agents=False)
        with pytest.raises(ConflictError, match=other.name):
            Lab("notmine", base_dir=other.base_dir).down()


class TestUp:
    def test_a_second_up_conflicts_and_harms_nothing(self, make_lab: MakeLab) -> None:
        lab = make_lab(1, start_agents=False)
        with pytest.raises(ConflictError, match=f"meshnet lab down --name {lab.name}"):
            make_lab(1, name=lab.name, start_agents=False)
        assert ping(lab.host("h1"), lab.outside_ip)

    def test_a_namespace_of_that_name_conflicts_and_down_removes_it(
        self, make_lab: MakeLab
    ) -> None:
        lab = make_lab(2, up=False, start_agents=False)
        add_netns([netns_name(lab.name, "h2")])
        with pytest.raises(ConflictError, match="-h2"):
            lab.up()
        assert list_netns(lab.name) == [netns_name(lab.name, "h2")]
        assert lab.down().namespaces == [netns_name(lab.name, "h2")]

    def test_a_lab_whose_name_begins_alike_is_another(self, make_lab: MakeLab) -> None:
        lab = make_lab(1, start_agents=False)
        alike = make_lab(1, name=f"{lab.name}-b", start_agents=False)
        lab.down()
        assert ping(alike.host("h1"), alike.outside_ip)

    def test_an_agent_that_does_not_start_undoes_all(self, make_lab: MakeLab) -> None:
        lab = make_lab(2, up=False, agent_args=["--no-such-option"])
        with pytest.raises(AgentUnreachableError, match=r"(?s)ended while starting.*meshnet.agent"):
            lab.up()
        assert list_netns(lab.name) == []
        assert not lab.base_dir.exists()

    def test_an_interrupt_undoes_all(self, make_lab: MakeLab) -> None:
        lab = make_lab(2, up=False, start_agents=False)

        def interrupt(step: str) -> None:
            if step.startswith("starting etcd"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            lab.up(interrupt)
        assert list_netns(lab.name) == []
        assert not lab.base_dir.exists()

    @pytest.mark.parametrize("step", ["making", "starting etcd", "starting 2 agents", "end"])
    def test_down_cleans_up_after_an_up_that_was_killed(self, make_lab: MakeLab, step: str) -> None:
        lab = make_lab(2, up=False)
        _run_and_kill(
            f"Lab({lab.name!r}, hosts=2, start_agents={step != 'end'}).up(progress)", step
        )
        assert lab.down().anything

    @pytest.mark.parametrize("step", ["ending agents", "ending etcd", "removing", "end"])
    def test_down_goes_on_after_a_down_that_was_killed(self, make_lab: MakeLab, step: str) -> None:
        lab = make_lab(2, start_agents=False)
        lab.host("h1").spawn_container()
        _run_and_kill(f"Lab.attach({lab.name!r}).down(progress)", step)
        lab.down()


class TestProcesses:
    def test_a_reused_pid_is_not_signalled(self) -> None:
        child = subprocess.Popen(["sleep", "1000"])
        try:
            ref = identify(child.pid)
            end_processes([ProcessRef(ref.pid, ref.start_time - 1)], deadline_s=0)
            assert ref.is_alive()
            end_processes([ref], deadline_s=5)
            assert not ref.is_alive()
        finally:
            child.kill()
            child.wait()
        with pytest.raises(ProcessLookupError):
            identify(child.pid)

    def test_wait_until_names_what_it_waited_for(self) -> None:
        assert wait_until(lambda: "value", 0, "never mind") == "value"
        with pytest.raises(TimeoutError, match=r"not within 0\.01 s: pigs fly"):
            wait_until(lambda: False, 0.01, "pigs fly")


def _children(pid: int) -> list[int]:
    result = subprocess.run(
        ["ps", "-o", "pid=,comm=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    rows = [line.split() for line in result.stdout.splitlines()]
    return [int(row[0]) for row in rows if row[1] == "sleep"]


def _run_and_kill(statement: str, step: str) -> None:
    """Run a statement in another program, and kill that when `progress` is told `step`."""
    script = f"""
        import os, signal
        from meshnet.lab.topology import Lab
        def progress(said):
            if said.startswith({step!r}):
                os.kill(os.getpid(), signal.SIGKILL)
        {statement}
        progress("end")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
