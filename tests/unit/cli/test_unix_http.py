"""One HTTP request over a Unix socket: what is sent, and answers whole, in pieces and broken."""

from __future__ import annotations

import io
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from meshnet.cli import client, progress
from meshnet.unix_http import BadAnswerError, HttpConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Serve = Callable[..., "Server"]


class Server:
    """Answers one connection with some bytes, once it has read the request, and hangs up."""

    def __init__(self, path: Path, answer: bytes, after_s: float = 0.0) -> None:
        self.path = str(path)
        self._after_s = after_s
        self.got = b""
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        peer, _ = self._listener.accept()
        with peer:
            peer.settimeout(10)
            while not self._is_whole():
                self.got += peer.recv(65536)
            time.sleep(self._after_s)
            peer.sendall(self._answer)

    def _is_whole(self) -> bool:
        head, end, body = self.got.partition(b"\r\n\r\n")
        if b"chunked" in head:
            return body.endswith(b"0\r\n\r\n")
        _, found, rest = head.partition(b"Content-Length: ")
        return bool(end) and (not found or len(body) == int(rest.partition(b"\r\n")[0]))

    def close(self) -> None:
        self._thread.join()
        self._listener.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    servers: list[Server] = []

    def make(answer: bytes, after_s: float = 0.0) -> Server:
        servers.append(Server(tmp_path / f"{len(servers)}.sock", answer, after_s))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def ask(server: Server) -> tuple[int, bytes]:
    with HttpConnection(server.path, 10.0) as connection:
        connection.request("GET", "/v1/x")
        answer = connection.answer()
        return answer.status, answer.read()


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 200 \r\ncontent-length: 4\r\n\r\nabcdmore", b"abcd"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\n\r\nto the end", b"to the end"),
        (
            b"HTTP/1.1 200 \r\nTransfer-Encoding: Chunked\r\n\r\n"
            b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nTrailer: t\r\n\r\n",
            b"abc0123456789",
        ),
    ],
    ids=["length", "empty", "to the end", "chunked"],
)
def test_bodies(serve: Serve, raw: bytes, body: bytes) -> None:
    assert ask(serve(raw)) == (200, body)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "no answer"),
        (b"HTTP/1.1 200", "ended early"),
        (b"SSH-2.0-OpenSSH\r\n", "not HTTP"),
        (b"HTTP/1.1 two\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\nabc", "ended early"),
        (b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab", "ended early"),
        (b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "without a length"),
        (b"HTTP/1.1 200 \r\n" + b"a: b\r\n" * 200 + b"\r\n", "too many header fields"),
    ],
)
def test_broken_answers(serve: Serve, raw: bytes, words: str) -> None:
    with pytest.raises(BadAnswerError, match=words):
        ask(serve(raw))


def test_lines_across_chunks(serve: Serve) -> None:
    server = serve(
        b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n"
        b"4\r\none\n\r\n3\r\ntwo\r\n6\r\n\nthree\r\n0\r\n\r\n"
    )
    with HttpConnection(server.path, 10.0) as connection:
        connection.request("GET", "/v1/x")
        assert list(connection.answer().lines()) == [b"one\n", b"two\n", b"three"]


def test_what_is_sent(serve: Serve) -> None:
    server = serve(b"HTTP/1.1 201 \r\n\r\n")
    with HttpConnection(server.path, 10.0) as connection:
        connection.request("POST", "/v1/x?y=z", b"{}")
        assert connection.answer().status == 201
    head, _, body = server.got.partition(b"\r\n\r\n")
    assert head.splitlines()[0] == b"POST /v1/x?y=z HTTP/1.1"
    assert {b"Host: meshnet", b"Content-Length: 2"} < set(head.splitlines())
    assert body == b"{}"


def test_an_upload_of_any_length(serve: Serve) -> None:
    server = serve(b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n")
    with HttpConnection(server.path, 10.0) as connection:
        connection.begin_upload("POST", "/v1/x")
        assert [connection.write(data) for data in (b"abc", b"", b"0123456789abcdef")] == [3, 0, 16]
        connection.finish()
        assert connection.answer().read() == b""
    assert server.got.endswith(b"\r\n\r\n3\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\n\r\n")


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        HttpConnection(str(tmp_path / "none.sock"), 1.0)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stderr", "said"), [(_Terminal(), True), (io.StringIO(), False)])
def test_what_takes_long_says_so_on_a_terminal(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, *, said: bool
) -> None:
    for module in (client, progress):
        monkeypatch.setattr(module, "QUIET_S", 0.05)
    monkeypatch.setattr(sys, "stderr", stderr)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"
    assert client.Client(serve(answer).path).get("x") == []
    assert stderr.getvalue() == ""
    assert client.Client(serve(answer, after_s=0.5).path).get("x") == []
    assert ("waiting for the agent" in stderr.getvalue()) is said
