"""One machine under QEMU: booted, reached by ssh, put back to a snapshot, cut off its power."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

from meshnet.lab.poll import wait_until
from tests.vm.switch import GATEWAY, port_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from subprocess import CompletedProcess

    from tests.vm.image import Image
    from tests.vm.switch import Switch

_MEMORY_MIB = 768
_BOOT_S = 180
_CLEAN = "clean"
"""Name of the snapshot that `Machine.reset` goes back to."""


class Machine:
    """A machine; not started yet.

    Attributes:
        number: from 1 on.
        name: its host name.
        address: of its eth0; `address6` is the same of IPv6.
        switch: what its eth0 is plugged into.
    """

    def __init__(self, number: int, image: Image, switch: Switch, directory: Path) -> None:
        self.number = number
        self.name = f"vm{number}"
        self.address = f"192.0.2.1{number}"
        self.address6 = f"fd00:2::1{number}"
        self._image = image
        self.switch = switch
        self._disk = directory / f"{self.name}.qcow2"
        self._monitor = directory / f"{self.name}.mon"
        self._console = directory / f"{self.name}.console"
        self._ssh = directory / f"{self.name}.ssh"
        self._qemu: subprocess.Popen[bytes] | None = None

    # --- power ------------------------------------------------------------------------------------

    def make_disk(self) -> None:
        """Give it a new disk: a layer on the image's."""
        base = ("-b", str(self._image.disk), "-F", "raw")
        command = ["qemu-img", "create", "-q", "-f", "qcow2", *base, str(self._disk)]
        subprocess.run(command, check=True)

    def power_on(self) -> None:
        """Start it; returns at once."""
        assert self._qemu is None
        address = f"ip={self.address}::{GATEWAY}:255.255.255.0:{self.name}:eth0:none"
        kernel = f"root=/dev/vda rw console=ttyS0 net.ifnames=0 {address}"
        mac = f"52:54:00:00:00:{self.number:02x}"
        self._qemu = subprocess.Popen(
            [
                *self.switch.prefix,
                *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
                *("-accel", "tcg,thread=multi,tb-size=192", "-cpu", "max,la57=off"),
                *("-m", str(_MEMORY_MIB), "-smp", "1"),
                *("-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd)),
                *("-append", f"{kernel} systemd.hostname={self.name} panic=-1"),
                *("-drive", f"file={self._disk},if=virtio,format=qcow2,cache=writeback"),
                *("-netdev", f"tap,id=n0,ifname={port_of(self.number)},script=no,downscript=no"),
                *("-device", f"virtio-net-pci,netdev=n0,mac={mac}"),
                *("-device", "virtio-rng-pci"),
                *(
                    "-chardev",
                    f"file,id=c0,path={self._console},append=on",
                    "-serial",
                    "chardev:c0",
                ),
                *("-qmp", f"unix:{self._monitor},server=on,wait=off"),
            ],
            stdin=subprocess.DEVNULL,
        )

    def power_cut(self) -> None:
        """Take its power away: the process ends at once."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
            self._qemu = None
        self._forget_ssh()

    def wait_up(self) -> None:
        """Wait until it has booted and answers by ssh.

        Raises:
            TimeoutError: it does not; the message has the console's end.
        """

        def is_up() -> bool:
            assert self._qemu is not None
            assert self._qemu.poll() is None, f"{self.name}: QEMU ended: {self.console_tail()}"
            done = self._try("systemctl is-system-running")
            return done.stdout.strip() in ("running", "degraded")

        try:
            wait_until(is_up, _BOOT_S, f"{self.name} up")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; its console: {self.console_tail()}") from error

    def reboot(self) -> None:
        """Reboot it, as its administrator does, and wait until it is up again."""
        before = self.run("cat /proc/sys/kernel/random/boot_id").stdout
        self.run("systemctl reboot", check=False)
        self._forget_ssh()

        def has_booted() -> bool:
            done = self._try("cat /proc/sys/kernel/random/boot_id")
            return done.returncode == 0 and done.stdout != before

        wait_until(has_booted, _BOOT_S, f"{self.name} has booted again")
        self.wait_up()

    def _try(self, command: str) -> CompletedProcess[str]:
        """Run a command while it boots; a failure takes a second, for ssh is not cheap there."""
        done = self.run(command, check=False)
        if done.returncode:
            time.sleep(1)
        return done

    # --- snapshots --------------------------------------------------------------------------------

    def keep(self) -> None:
        """Keep its state, to `reset` to."""
        self._say(f"savevm {_CLEAN}")

    def reset(self) -> None:
        """Go back to the state that was kept; the clock is that of now."""
        if self._qemu is None:
            self.power_on()
            wait_until(self._monitor.is_socket, 10, "QEMU's monitor")
        self._forget_ssh()
        self._say(f"loadvm {_CLEAN}")
        self.run(f"date --set=@{time.time():.3f}")

    def _say(self, command: str) -> None:
        """Give QEMU a command of its human monitor."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(120)
            monitor.connect(str(self._monitor))
            with monitor.makefile("rw") as lines:
                lines.readline()  # its greeting
                for execute, arguments in (
                    ("qmp_capabilities", {}),
                    ("human-monitor-command", {"command-line": command}),
                ):
                    lines.write(json.dumps({"execute": execute, "arguments": arguments}) + "\n")
                    lines.flush()
                    answer: dict[str, Any] = {}
                    while "return" not in answer and "error" not in answer:
                        answer = json.loads(lines.readline())
        assert answer.get("return") == "", f"{command} of {self.name}: {answer}"

    # --- commands ---------------------------------------------------------------------------------

    def run(
        self, command: str, *, check: bool = True, timeout_s: float = 120, stdin: str | None = None
    ) -> CompletedProcess[str]:
        """Run a shell command as root.

        Raises:
            AssertionError: its status is not 0, and `check`; the message has its output.
            subprocess.TimeoutExpired: it runs for too long.
        """
        done = subprocess.run(
            [*self._ssh_argv(), "--", command],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),
        )
        if check:
            shown = f"{self.name}: {command}: {done.returncode}: {done.stdout}{done.stderr}"
            assert done.returncode == 0, shown
        return done

    def write(self, path: str, content: str) -> None:
        """Write a file."""
        self.run(f"cat > {shlex.quote(path)}", stdin=content)

    def spawn(self, command: str) -> int:
        """Run a shell command in a network namespace of its own, in the background; its pid."""
        inside = f"unshare --net sh -c {shlex.quote(command)}"
        started = f"setsid {inside} >/dev/null 2>&1 </dev/null & echo $!"
        return int(self.run(started).stdout)

    def _ssh_argv(self) -> Sequence[str]:
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "ConnectTimeout": "5",
            "ControlMaster": "auto",
            "ControlPath": str(self._ssh),
            "ControlPersist": "600",
        }
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        key = ("-i", str(self._image.key))
        return (*self.switch.prefix, "ssh", *key, *words, f"root@{self.address}")

    def _forget_ssh(self) -> None:
        """End the master connection: the machine does not know it any more."""
        argv = [*self.switch.prefix, "ssh", "-o", f"ControlPath={self._ssh}", "-O", "exit", "x"]
        subprocess.run(argv, check=False, stderr=subprocess.DEVNULL)
        self._ssh.unlink(missing_ok=True)

    # --- evidence ---------------------------------------------------------------------------------

    def console_tail(self) -> str:
        """The end of what it wrote to its console."""
        with contextlib.suppress(OSError):
            return self._console.read_text(errors="replace")[-2000:]
        return ""

    def journal_tail(self) -> str:
        """The end of its journal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.run("journalctl -b --no-pager -n 80", check=False, timeout_s=30).stdout
        return "(does not answer)"
