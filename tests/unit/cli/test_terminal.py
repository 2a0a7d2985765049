"""The client's end of a container's stdio when conmon is gone already."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CLIENT = """
import sys
from meshnet.cli.terminal import Attachment
Attachment(*sys.argv[1:], tty=True, interactive=True).run(lambda name: None)
"""


def test_a_program_that_ended_before_its_client_was_ready(tmp_path: Path) -> None:
    attach, window = tmp_path / "attach", tmp_path / "winsz"
    os.mkfifo(window)  # nobody reads it any more
    ours, theirs = pty.openpty()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(attach))
        listener.listen()
        child = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(attach), str(window)],
            stdin=theirs,
            stdout=subprocess.PIPE,
        )
        connection, _ = listener.accept()
        connection.send(b"\x02its last words\n")
        connection.close()
        try:
            output, _ = child.communicate(timeout=30)
        finally:
            child.kill()
            child.wait()
    os.close(ours)
    os.close(theirs)
    assert (child.returncode, output) == (0, b"its last words\n")
