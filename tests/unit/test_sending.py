"""Answers that clients read slowly, or never; on a server of its own, the same as BentoML's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trustme
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bentoml_detectron.service.sending import PIECE, Patience

BODY = bytes(range(256)) * (8 << 12)
"""8 MB, many times what the system's buffers take."""
SECONDS = 1.0
REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class App:
    """Answers each request with the body, and notes the most that the server kept of it, and when it was done."""

    def __init__(self, body: bytes, seconds: float = SECONDS) -> None:
        self.body = body
        self.patience = Patience(seconds)
        self.largest = 0
        self.ended = threading.Event()
        self.transports: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        transport = send.__self__.transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        self.transports.append(transport)

        async def watched(message: Any) -> None:
            await send(message)
            self.largest = max(self.largest, transport.get_write_buffer_size())

        watched.__dict__["__self__"] = send.__self__
        answer = self.patience.of(watched)
        await answer({"type": "http.response.start", "status": 200, "headers": []})
        await answer({"type": "http.response.body", "body": self.body})
        self.ended.set()


@contextlib.contextmanager
def served(app: App, **settings: Any) -> Iterator[int]:
    config = uvicorn.Config(app, port=0, http=H11Protocol, lifespan="off", log_config=None, timeout_keep_alive=1, **settings)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def asked(port: int, context: ssl.SSLContext | None = None) -> socket.socket:
    """A connection with a small buffer on which a request was sent."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(("127.0.0.1", port))
    if context is not None:
        client = context.wrap_socket(client, server_hostname="localhost")
    client.sendall(REQUEST)
    return client


def length_until_the_end(client: socket.socket) -> int:
    """Bytes that come before the connection ends; a TimeoutError where it does not."""
    length = 0
    with contextlib.suppress(ConnectionResetError):
        while content := client.recv(1 << 20):
            length += len(content)
    return length


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 15
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def test_a_large_answer_arrives_whole_and_the_server_keeps_a_piece_of_it() -> None:
    app = App(BODY, seconds=30)
    with served(app) as port, asked(port) as client:
        time.sleep(0.5)  # it is slow, too
        found = bytearray()
        while not found.endswith(b"0\r\n\r\n"):
            found += client.recv(1 << 20)
    chunks, content = bytes(found).partition(b"\r\n\r\n")[2], bytearray()
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        content += chunks[: int(size, 16)]
        chunks = chunks[int(size, 16) + 2 :]
    assert bytes(content) == BODY
    assert PIECE / 4 < app.largest < 2 * PIECE


@pytest.mark.slow
def test_a_client_that_asks_on_and_on_and_reads_is_not_cut_off():
    """With two requests on their way at any time, so that the buffer is never empty for long."""
    app = App(BODY[: 1 << 20])
    with served(app) as port, asked(port) as client:
        client.sendall(REQUEST)
        end, answers, found = time.monotonic() + 3 * SECONDS, 0, b""
        while time.monotonic() < end:
            found += client.recv(1 << 14)
            if b"\r\n0\r\n\r\n" in found:
                answers, found = answers + 1, found.partition(b"\r\n0\r\n\r\n")[2]
                client.sendall(REQUEST)
            time.sleep(0.0005)
        assert answers >= 3
        assert client.recv(1)


@pytest.mark.parametrize("length", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 1])
@pytest.mark.parametrize("more", [False, True])
def test_pieces_are_the_whole(length, more):
    sent: list[Any] = []

    async def take(message: Any) -> None:
        sent.append(message)

    asyncio.run(Patience(60).of(take)({"type": "http.response.body", "body": BODY[:length], "more_body": more}))
    assert b"".join(each["body"] for each in sent) == BODY[:length]
    assert all(each["body"] for each in sent) or length == 0
    assert max(len(each["body"]) for each in sent) <= PIECE
    assert [each["more_body"] for each in sent] == [True] * (len(sent) - 1) + [more]


def test_without_it_the_server_keeps_most_of_an_answer_that_is_not_read() -> None:
    """The test's own control: what it looks at is the buffer that grows."""
    app = App(b"")

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": BODY})
        app.largest = send.__self__.transport.get_write_buffer_size()
        app.ended.set()

    with served(plain) as port, asked(port):  # type: ignore[arg-type]
        assert app.ended.wait(20)
    assert app.largest > len(BODY) / 2


@pytest.mark.slow
def test_a_client_that_does_not_read_its_answer_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    app = App(BODY)
    with caplog.at_level(logging.INFO), served(app) as port, asked(port) as client:
        assert app.ended.wait(20)
        assert eventually(lambda: not app.transports[0].get_write_buffer_size())
        assert length_until_the_end(client) < len(BODY)
    assert "did not read its answer within 1 seconds" in caplog.text
    assert "ASGI" not in caplog.text  # such as "ASGI callable returned without completing response"


@pytest.mark.slow
def test_so_is_one_with_tls_and_one_that_reads_or_leaves_is_no_error(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "key"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    app = App(BODY)
    files = {"ssl_certfile": str(tmp_path / "key"), "ssl_keyfile": str(tmp_path / "key")}
    with caplog.at_level(logging.INFO), served(app, **files) as port:
        with asked(port, context):
            assert app.ended.wait(20)
        assert caplog.text.count("did not read its answer within 1 seconds") == 1
        app.ended.clear()
        with asked(port, context) as client:
            found = b""
            while not found.endswith(b"0\r\n\r\n"):
                found = found[-10:] + client.recv(1 << 20)
            assert app.ended.wait(20)
        app.ended.clear()
        with asked(port, context) as client:
            assert client.recv(1)
        assert app.ended.wait(20)
    assert caplog.text.count("did not read") == 1
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


@pytest.mark.slow
def test_a_client_that_does_not_read_the_end_of_its_answer_is_cut_off() -> None:
    app = App(BODY[:PIECE])
    with served(app) as port, asked(port):
        assert eventually(lambda: app.largest > PIECE / 2)
        assert app.ended.wait(20)
        assert eventually(lambda: not app.transports[0].get_write_buffer_size())


def test_without_a_server_s_transport_an_answer_that_is_not_taken_is_an_error() -> None:
    async def never(message: Any) -> None:
        await asyncio.sleep(60)

    async def ask() -> None:
        await Patience(0.05).of(never)({"type": "http.response.body", "body": BODY})

    with pytest.raises(TimeoutError):
        asyncio.run(ask())


def test_the_sender_s_own_timeout_is_not_taken_for_the_client_s() -> None:
    async def fails(message: Any) -> None:
        raise TimeoutError("another's")

    async def ask() -> None:
        await Patience(60).of(fails)({"type": "http.response.body", "body": BODY})

    with pytest.raises(TimeoutError, match="another's"):
        asyncio.run(ask())
