"""A container's terminal: stdin, output, signals and the window's size, through conmon's socket.

Needs no agent, as the socket is conmon's own; `meshnet.runtime.engine.conmon` has the protocol.
So a client stays attached while the agent is restarted.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys

TYPE_CHECKING = False  # see meshnet.unix_http
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_INPUT_BYTES = 8192
_MESSAGE_BYTES = 64 * 1024
_STDIN, _STDOUT, _STDERR = 0, 1, 2
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
              signal.SIGUSR2)  # fmt: skip


class Attachment:
    """A connection to a container's stdio.  Open it before the container starts: conmon does not
    repeat what was printed earlier.

    Args:
        attach, window: paths of conmon's socket and of its FIFO for window sizes.
        tty: the container has a terminal.
        interactive: forward stdin.
    """

    def __init__(self, attach: str, window: str, *, tty: bool, interactive: bool) -> None:
        self._window = window
        self._tty = tty
        self._interactive = interactive
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(attach)

    def run(self, forward: Callable[[str], None]) -> None:
        """Copy until the container closes its output.

        Args:
            forward: sends a signal, by name, to the container.
        """
        with self._socket, _wakeups() as wakeup, self._raw_terminal():
            self._resize()  # conmon's terminal begins without a size
            reads = [self._socket.fileno(), wakeup]
            if self._interactive:
                reads.append(_STDIN)
            while True:
                ready, _, _ = select.select(reads, [], [])
                if wakeup in ready:
                    for number in os.read(wakeup, 64):
                        self._handle_signal(signal.Signals(number), forward)
                if _STDIN in ready and not self._send_input():
                    reads.remove(_STDIN)
                if self._socket.fileno() in ready and not self._print_output():
                    return

    def _handle_signal(self, number: signal.Signals, forward: Callable[[str], None]) -> None:
        if number is signal.SIGWINCH:
            self._resize()
        elif number in _FORWARDED:
            forward(number.name)

    def _send_input(self) -> bool:
        data = os.read(_STDIN, _INPUT_BYTES)
        # A container that has closed its stdin may still print: reading its output says the end.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if data:
                self._socket.send(data)
            else:
                self._socket.shutdown(socket.SHUT_WR)
        return bool(data)

    def _print_output(self) -> bool:
        try:
            message = self._socket.recv(_MESSAGE_BYTES)
        except ConnectionResetError:
            return False
        stream = _STDERR if message[:1] == b"\x03" else _STDOUT
        data = memoryview(message)[1:]
        while data:
            data = data[os.write(stream, data) :]
        return bool(message)

    def _resize(self) -> None:
        if self._tty and os.isatty(_STDIN):
            size = os.get_terminal_size(_STDIN)
            # The program and conmon, which reads the FIFO, may have ended by now.  Without
            # O_NONBLOCK the open would then wait for a reader for ever.
            with contextlib.suppress(OSError):
                fifo = os.open(self._window, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.write(fifo, b"%d %d\n" % (size.lines, size.columns))
                finally:
                    os.close(fifo)

    @contextlib.contextmanager
    def _raw_terminal(self) -> Iterator[None]:
        # Without -i the terminal stays as it is: Ctrl-C must still make a signal, which is
        # forwarded.  In raw mode it is a byte of input, and the container's terminal makes one.
        if not (self._tty and self._interactive and os.isatty(_STDIN)):
            yield
            return
        import termios
        import tty

        before = termios.tcgetattr(_STDIN)
        tty.setraw(_STDIN)
        try:
            yield
        finally:
            termios.tcsetattr(_STDIN, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _wakeups() -> Iterator[int]:
    """Yield a descriptor that has a byte for each signal; signals do nothing else meanwhile.

    select() alone would not notice them: Python resumes it after a handler has run (PEP 475).
    """
    sys.stdout.flush()  # os.write goes past Python's buffer from now on
    numbers = (*_FORWARDED, signal.SIGWINCH)
    # set_wakeup_fd takes only a descriptor that does not block.
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
