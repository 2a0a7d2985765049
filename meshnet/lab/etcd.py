"""One etcd server as a child process, for the hosts of labs and tests.

Job: start an etcd, alone or as a member of a cluster, wait until it answers, and do to it what
happens to etcd in real life (stop, kill, pause, resume, start again on the same data, lose the
data, restore a snapshot).  Place: control plane only; no packet passes here.  Synchronous, because
fixtures and ``meshnet lab`` call it outside any trio run.  May import only the standard library and
`meshnet.errors`.

Needs the programs ``etcd`` and ``etcdctl`` (3.4 or newer).  With a `prefix` such as
``("nsenter", "--net=/run/netns/x")`` both run inside that network namespace; the prefix must
``exec`` the command (as ``nsenter --net`` and ``ip netns exec`` do), so that `EtcdServer.pid` is
etcd's own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshnet.errors import NotFoundError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

_STOP_DEADLINE_S = 5.0
_CTL_TIMEOUT_S = 10.0
_POLL_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True)
class Membership:
    """The place of a server in a cluster.

    Attributes:
        name: the server's name in `urls`.
        urls: peer URL of every member, by name.
        token: the same for all members and different for every cluster, as etcd computes the
            cluster's id from it.  Empty: a random one for every new database.
    """

    name: str
    urls: Mapping[str, str]
    token: str = ""


ALONE = Membership("default", {"default": "http://127.0.0.1:0"})
"""A single member.  etcd insists on a peer port although no other member will use it, so the kernel
chooses one, on loopback."""


class EtcdServer:
    """An etcd with its data under `data_dir`.

    Args:
        data_dir: etcd's data directory; created by etcd, kept when the server ends.
        client_url: URL to listen on and advertise, ``http://`` or ``https://``.
        membership: which member of which cluster it is.
        prefix: argv to put before every command, such as ``nsenter --net=…``.
        log_file: where etcd's stdout and stderr are appended.
        extra_args: further etcd flags (TLS: ``--cert-file`` and so on).
        ctl_args: further etcdctl flags (``--cacert``, ``--cert``, ``--key``, ``--user``).
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        client_url: str,
        membership: Membership = ALONE,
        prefix: Sequence[str] = (),
        log_file: Path,
        extra_args: Sequence[str] = (),
        ctl_args: Sequence[str] = (),
    ) -> None:
        self.data_dir = data_dir
        self.client_url = client_url
        self.log_file = log_file
        self._membership = membership
        self._prefix = tuple(prefix)
        self._extra_args = tuple(extra_args)
        self._ctl_args = tuple(ctl_args)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the running etcd.

        Raises:
            NotFoundError: it was not started, or was stopped or killed.
        """
        if self._process is None:
            raise NotFoundError(f"etcd at {self.client_url} is not running: call start() first")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process exists (it may be paused)."""
        return self._process is not None and self._process.poll() is None

    @property
    def member(self) -> str:
        """Its name in the cluster."""
        return self._membership.name

    @property
    def peer_url(self) -> str:
        """URL for other members."""
        return self._membership.urls[self.member]

    def start(self, *, join: bool = False, more_args: Sequence[str] = ()) -> None:
        """Start etcd, on the data of an earlier run if there are any; returns at once.

        Args:
            join: it has no data, and joins a cluster that runs.
            more_args: further etcd flags, for this run only.

        Raises:
            NotFoundError: the ``etcd`` program is not installed.
        """
        if self.running:
            return
        argv = [
            *self._prefix,
            "etcd",
            f"--name={self.member}",
            f"--data-dir={self.data_dir}",
            f"--initial-cluster-state={'existing' if join else 'new'}",
            f"--listen-client-urls={self.client_url}",
            f"--advertise-client-urls={self.client_url}",
            f"--listen-peer-urls={self.peer_url}",
            # etcd ignores these if it has data.
            *self._cluster_args(),
            "--logger=zap",
            "--log-level=error",
            *self._extra_args,
            *more_args,
        ]
        try:
            with self.log_file.open("ab") as log:
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=_environment(),
                    # In another session, so that Ctrl-C in the terminal reaches only the lab,
                    # which then stops etcd last.
                    start_new_session=True,
                )
        except FileNotFoundError as exc:
            raise NotFoundError(f"{exc.filename} is not installed: install etcd-server") from exc

    def stop(self) -> None:
        """End etcd in an orderly way (SIGTERM, after 5 s SIGKILL) and reap it.  Idempotent."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            self.resume()  # a stopped process acts on SIGTERM only when it continues
        try:
            self._process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End etcd as a crash does (SIGKILL) and reap it.  Idempotent."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None

    def restart(self, deadline_s: float = 20.0) -> None:
        """Kill, start again on the same data and wait until it answers."""
        self.kill()
        self.start()
        self.wait_healthy(deadline_s)

    def pause(self) -> None:
        """Freeze etcd (SIGSTOP): its connections stay open, and it answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)  # until the last of its threads has stopped

    def resume(self) -> None:
        """Undo `pause`; harmless when not paused."""
        os.kill(self.pid, signal.SIGCONT)

    def lose_data(self) -> None:
        """Kill etcd, and remove all of its data."""
        self.kill()
        shutil.rmtree(self.data_dir, ignore_errors=True)

    def rejoin(self, other: EtcdServer) -> None:
        """Start anew after `lose_data`, as a new member in the old one's place.

        Args:
            other: a member that runs.

        Raises:
            StoreUnavailableError: the cluster has no quorum, or does not know this member.
        """
        # Raft does not let a member go on without its log under its old id: it may have agreed to
        # entries that it no longer has.  So it is removed, and added with a new id.
        lines = other.ctl("member", "list").splitlines()
        rows = [[field.strip() for field in line.split(",")] for line in lines]
        known = [row[0] for row in rows if row[2] == self.member]
        for member_id in known:
            other.ctl("member", "remove", member_id)
        other.ctl("member", "add", self.member, f"--peer-urls={self.peer_url}")
        self.start(join=True)

    def restore(self, snapshot: Path) -> None:
        """Replace the data by a snapshot's.  Call `start` afterwards.

        Every member of a cluster restores the same snapshot.  ``ctl("snapshot", "save", FILE)``
        makes one.

        Raises:
            StoreUnavailableError: the snapshot cannot be used.
        """
        self.lose_data()
        self.ctl(
            "snapshot",
            "restore",
            str(snapshot),
            f"--name={self.member}",
            f"--data-dir={self.data_dir}",
            *self._cluster_args(),
        )

    def _cluster_args(self) -> list[str]:
        members = ",".join(f"{name}={url}" for name, url in self._membership.urls.items())
        # With the same token every new database of these members would have the same cluster id.
        token = self._membership.token or secrets.token_hex(8)
        return [
            f"--initial-advertise-peer-urls={self.peer_url}",
            f"--initial-cluster={members}",
            f"--initial-cluster-token={token}",
        ]

    def wait_healthy(self, deadline_s: float = 20.0) -> None:
        """Block until etcd answers a linearizable read.

        Raises:
            StoreUnavailableError: etcd exited, or did not answer within `deadline_s` seconds.
        """
        deadline = time.monotonic() + deadline_s
        while True:
            if self._process is None or self._process.poll() is not None:
                raise StoreUnavailableError(
                    f"etcd at {self.client_url} exited while starting: {self._last_log_line()}"
                )
            result = self._run_ctl("--command-timeout=1s", "endpoint", "health")
            if result.returncode == 0:
                return
            if time.monotonic() > deadline:
                raise StoreUnavailableError(
                    f"etcd at {self.client_url} is not healthy after {deadline_s:g} s: "
                    f"see {self.log_file}"
                )
            time.sleep(_POLL_INTERVAL_S)

    def ctl(self, *args: str) -> str:
        """Run ``etcdctl`` with `args` against this server and return its stdout.

        Raises:
            NotFoundError: the ``etcdctl`` program is not installed.
            StoreUnavailableError: it failed; the message has its last line.
        """
        result = self._run_ctl(*args)
        if result.returncode != 0:
            reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
            # Only the subcommand: further arguments may be passwords.
            raise StoreUnavailableError(
                f"etcdctl {' '.join(args[:2])} on {self.client_url} failed: {''.join(reason)}"
            )
        return result.stdout

    def _run_ctl(self, *args: str) -> subprocess.CompletedProcess[str]:
        argv = [
            *self._prefix,
            "etcdctl",
            f"--endpoints={self.client_url}",
            "--dial-timeout=1s",
            *self._ctl_args,
            *args,
        ]
        try:
            return subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=_environment(),
                timeout=_CTL_TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError as exc:
            raise NotFoundError(f"{exc.filename} is not installed: install etcd-client") from exc
        except subprocess.TimeoutExpired as exc:
            raise StoreUnavailableError(
                f"etcdctl on {self.client_url} did not end within {_CTL_TIMEOUT_S:g} s"
            ) from exc

    def _last_log_line(self) -> str:
        lines = self.log_file.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"{self.log_file} is empty"


def _environment() -> dict[str, str]:
    """Return the environment without ETCD_… and ETCDCTL_…: etcd takes every flag from it, too."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD")}
