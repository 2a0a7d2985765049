"""One HTTP/1.1 request over a Unix socket (RFC 9112): what the client needs, and fast to import.

Importing `http.client`, which brings the e-mail parser and TLS, takes longer than everything else
that the client does before its request.  May import only the standard library.
"""

from __future__ import annotations

import select
import socket

# In place of typing.TYPE_CHECKING: importing typing takes longer than this whole file.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader

# The limits of http.client: an answer that never ends must not fill the memory.
_LINE_BYTES = 64 * 1024
_HEADERS = 100
_READ_BYTES = 64 * 1024


class BadAnswerError(OSError):
    """The answer is not HTTP, or ended early."""


class HttpConnection:
    """A connection for one request.  Close it, or use it as a context manager.

    Args:
        path: of the socket.
        timeout_s: seconds that each call of the socket may wait; None: for ever.

    Raises:
        OSError: nobody listens there.  All methods raise it when the other end goes away.
    """

    def __init__(self, path: str, timeout_s: float | None) -> None:
        self._file: BufferedReader | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> HttpConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, and the file of its answer."""
        if self._file is not None:
            self._file.close()
        self._socket.close()

    def request(self, method: str, target: str, document: bytes | None = None) -> None:
        """Send a request, with a JSON document as its body.

        Args:
            target: path and query, quoted.
        """
        body = b"" if document is None else document
        fields = "" if document is None else _JSON.format(len(body))
        self._socket.sendall(_head(method, target, fields) + body)

    def begin_upload(self, method: str, target: str) -> None:
        """Send the beginning of a request with a body of any length; `write` it, then `finish`."""
        self._socket.sendall(_head(method, target, "Transfer-Encoding: chunked\r\n"))

    def write(self, data: bytes) -> int:
        """Send some of the body, in the chunked coding (RFC 9112 §7.1)."""
        if data:  # an empty chunk would be the end
            self._socket.sendall(b"%x\r\n%b\r\n" % (len(data), data))
        return len(data)

    def finish(self) -> None:
        """End the body."""
        self._socket.sendall(b"0\r\n\r\n")

    def has_answer(self, timeout_s: float | None) -> bool:
        """Wait until the answer begins; False if it does not within `timeout_s` seconds."""
        return bool(select.select([self._socket], [], [], timeout_s)[0])

    def answer(self) -> Answer:
        """Wait for the answer's head.

        Raises:
            BadAnswerError: the answer is not HTTP, or ended early.
        """
        self._file = self._socket.makefile("rb")
        return Answer(self._file)


_JSON = "Content-Type: application/json\r\nContent-Length: {}\r\n"


def _head(method: str, target: str, fields: str) -> bytes:
    return (
        f"{method} {target} HTTP/1.1\r\nHost: meshnet\r\n{fields}Connection: close\r\n\r\n"
    ).encode("ascii")


class Answer:
    """An answer whose head has been read, and whose body has not.

    Attributes:
        status: the status code.
    """

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        words = self._line().split(b" ", 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise BadAnswerError("the answer is not HTTP")
        self.status = int(words[1])
        self._length: int | None = None
        self._chunked = False
        for _ in range(_HEADERS):
            name, _, value = self._line().partition(b":")
            if not name:
                return
            if name.lower() == b"content-length" and value.strip().isdigit():
                self._length = int(value)
            elif name.lower() == b"transfer-encoding":
                self._chunked = value.strip().lower() == b"chunked"
        raise BadAnswerError("the answer has too many header fields")

    def read(self) -> bytes:
        """Read the whole body."""
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """Read the body in pieces, as they come."""
        if self._chunked:
            while length := self._chunk_length():
                yield from self._exactly(length)
                self._line()
            while self._line():
                pass  # trailer fields
        elif self._length is not None:
            yield from self._exactly(self._length)
        else:  # it ends with the connection (RFC 9112 §6.3)
            # read1, not read, which waits until it has as many bytes as it was asked for.
            while data := self._file.read1(_READ_BYTES):
                yield data

    def lines(self) -> Iterator[bytes]:
        """Read the body in lines, each with its line feed, as they come."""
        rest = b""
        for chunk in self.chunks():
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield line + b"\n"
        if rest:
            yield rest

    def _chunk_length(self) -> int:
        try:
            return int(self._line().partition(b";")[0], 16)
        except ValueError as error:
            raise BadAnswerError("the answer has a chunk without a length") from error

    def _exactly(self, length: int) -> Iterator[bytes]:
        while length:
            data = self._file.read(min(length, _READ_BYTES))
            if not data:
                raise BadAnswerError("the answer ended early")
            length -= len(data)
            yield data

    def _line(self) -> bytes:
        line = self._file.readline(_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise BadAnswerError("the answer ended early" if line else "there was no answer")
        return line.rstrip(b"\r\n")
