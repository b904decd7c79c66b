"""HTTP that no client should speak, before a real server: it gets 4xx with a reason, or what it asks for; nothing breaks."""

from __future__ import annotations

import json
import re
import socket
import time
import zlib
from collections.abc import Iterable

import psutil
import pytest

from bentoml_detectron import demo
from servers import Server, served, write_service

pytestmark = pytest.mark.slow
IMAGE = demo.images()[3].read_bytes()
JPEG = b"host: x\r\ncontent-type: image/jpeg\r\n"
CLOSE = b"connection: close\r\n"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(IMAGE), IMAGE)


@pytest.fixture(scope="module")
def running(tmp_path_factory, digits_home) -> Iterable[Server]:
    folder = tmp_path_factory.mktemp("odd")
    write_service(folder, "'digits:latest', settings=Settings(body_seconds=5)")
    with served(folder, digits_home) as server:
        yield server


@pytest.fixture
def server(running) -> Iterable[Server]:
    """It has the same worker, and no traceback in its log, when the test ends; and it answers."""
    before = running.workers()
    yield running
    assert running.predict(IMAGE).status_code == 200
    assert running.workers() == before
    assert "Traceback" not in running.log


def exchange(server: Server, *pieces: bytes) -> list[tuple[int, bytes, bytes]]:
    """Status, head and body of each answer on one connection, until the server closes it."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except ConnectionError:  # it has answered already
                break
        received = b""
        try:
            while part := connection.recv(1 << 16):
                received += part
        except ConnectionResetError:  # it closed before it had read all
            pass
    found = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        known = re.search(rb"content-length: (\d+)", head.lower())
        length = int(known[1]) if known else len(received)  # the server's own refusals last until the end
        found.append((int(head[9:12]), head, received[:length]))
        received = received[length:]
    return found


def statuses(server: Server, *pieces: bytes) -> list[int]:
    return [status for status, _, _ in exchange(server, *pieces)]


def post(headers: bytes, body: bytes = b"", path: bytes = b"/predict", method: bytes = b"POST") -> bytes:
    return b"%s %s HTTP/1.1\r\n%s\r\n%s" % (method, path, headers, body)


LENGTH = b"content-length: %d\r\n" % len(IMAGE)
TE = b"transfer-encoding: chunked\r\n"
HEADS = {
    "two lengths": (JPEG + LENGTH + b"content-length: 5\r\n", IMAGE),
    "a list of lengths": (JPEG + b"content-length: 5, 6\r\n", IMAGE),
    "a negative length": (JPEG + b"content-length: -1\r\n", IMAGE),
    "a length with a sign": (JPEG + b"content-length: +5\r\n", IMAGE),
    "a length in hexadecimals": (JPEG + b"content-length: 0x10\r\n", IMAGE),
    "a length in other digits": (JPEG + "content-length: \u0661\u0662\r\n".encode(), IMAGE),
    "a length of a thousand digits": (JPEG + b"content-length: " + b"9" * 1000 + b"\r\n", IMAGE),
    "another encoding": (JPEG + b"transfer-encoding: gzip, chunked\r\n", CHUNKED),
    "an unknown encoding": (JPEG + b"transfer-encoding: xchunked\r\n", CHUNKED),
    "encodings twice": (JPEG + TE + b"transfer-encoding: identity\r\n", CHUNKED),
    "a space before the colon": (JPEG + b"transfer-encoding : chunked\r\n", CHUNKED),
    "a NUL in a header": (JPEG + LENGTH + b"x: a\0b\r\n", IMAGE),
    "a header without a name": (JPEG + LENGTH + b": b\r\n", IMAGE),
    "a header that is too large": (JPEG + LENGTH + b"x: " + b"a" * 200_000 + b"\r\n", IMAGE),
    "too many headers": (JPEG + LENGTH + b"x: a\r\n" * 50_000, IMAGE),
    "no host": (b"content-type: image/jpeg\r\n" + LENGTH, IMAGE),
    "two hosts": (JPEG + b"host: y\r\n" + LENGTH, IMAGE),
    "chunks whose size is none": (JPEG + TE, b"zz\r\n" + IMAGE),
    "chunks whose size is negative": (JPEG + TE, b"-5\r\n" + IMAGE),
    "chunks with an endless size": (JPEG + TE, b"f" * 100 + b"\r\n"),
    "chunks that end wrong": (JPEG + TE, b"5\r\nabcdefgh\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("name", HEADS)
def test_framing_that_is_not_clear_is_refused_and_the_connection_closed(server, name):
    headers, body = HEADS[name]
    # Were the rest taken for a request, it would be answered.
    (answer,) = exchange(server, post(headers, body + post(b"host: x\r\n" + CLOSE, path=b"/info", method=b"GET")))
    assert 400 <= answer[0] < 500
    assert answer[2]


def test_length_beside_chunks_leads_to_no_second_request(server):
    """A proxy that goes by the length, and a server that goes by the chunks, would see two requests where there is one."""
    hidden = post(b"host: x\r\n" + CLOSE, path=b"/info", method=b"GET")
    found = exchange(server, post(JPEG + TE + b"content-length: %d\r\n" % (5 + len(hidden)), b"0\r\n\r\n" + hidden))
    assert [status for status, _, _ in found] == [400]
    assert found[0][2]


def test_chunks_and_their_extensions_are_a_body(server):
    (answer,) = exchange(server, post(JPEG + TE + CLOSE, b'%x;name="v"; a\r\n%s\r\n0\r\nx: y\r\n\r\n' % (len(IMAGE), IMAGE)))
    assert answer[0] == 200
    assert json.loads(answer[2]) == server.predict(IMAGE).json()


def test_extensions_without_end_are_refused(server):
    (answer,) = exchange(server, post(JPEG + TE, b"5;"), *[b"a" * 65536] * 50)
    assert answer[0] == 400


def test_chunks_of_a_byte_are_a_body(server):
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in IMAGE) + b"0\r\n\r\n"
    assert statuses(server, post(JPEG + TE + CLOSE, body)) == [200]


def test_requests_that_come_at_once_on_a_connection_are_answered_in_turn(server):
    got = post(b"host: x\r\n", b"", b"/info", b"GET")
    many = [post(JPEG + LENGTH, IMAGE), post(JPEG + LENGTH, IMAGE, b"/nowhere"), got]
    last = post(JPEG + LENGTH + CLOSE, IMAGE)
    found = statuses(server, b"".join(many * 20) + last)
    assert found == [200, 404, 200] * 20 + [200]


def test_body_is_asked_for_only_where_it_will_be_read(server):
    expecting = b"expect: 100-continue\r\n" + CLOSE
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(post(JPEG + LENGTH + expecting))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(IMAGE)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    assert statuses(server, post(JPEG + b"content-length: 99999999\r\n" + expecting)) == [413]
    assert statuses(server, post(b"host: x\r\ncontent-type: text/plain\r\n" + LENGTH + expecting)) == [415]
    assert statuses(server, post(b"host: x\r\n" + LENGTH + expecting, path=b"/nowhere")) == [404]


@pytest.mark.parametrize("path", [b"/predict", b"/render", b"/info", b"/ui", b"/ui/sample", b"/docs.json"])
@pytest.mark.parametrize("method", [b"OPTIONS", b"TRACE", b"PUT", b"DELETE", b"PATCH", b"LOCK", b"get"])
def test_other_methods_are_405_and_nothing_is_echoed(server, path, method):
    ((status, head, body),) = exchange(server, post(b"host: x\r\nx-secret: 7y7y\r\n" + CLOSE, path=path, method=method))
    assert status == 405
    assert b"allow: " in head.lower()
    assert json.loads(body)["error"]
    assert b"7y7y" not in head + body


@pytest.mark.parametrize("target", [b"*", b"http://other.test/info", b"//info", b"/info#x", b"/%69nfo", b"info", b"/info?\xff"])
@pytest.mark.parametrize("method", [b"GET", b"OPTIONS", b"CONNECT"])
def test_odd_targets_are_answered_or_refused(server, target, method):
    ((status, _, body),) = exchange(server, post(b"host: x\r\n" + CLOSE, path=target, method=method))
    assert status == 200 or 400 <= status < 500
    assert body


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate", b"br", b"identity, gzip", b"GZIP", b"x"])
def test_packed_bodies_are_415_and_not_unpacked(server, encoding):
    packed = zlib.compress(bytes(50 << 20), 9)
    headers = JPEG + b"content-encoding: %s\r\ncontent-length: %d\r\n" % (encoding, len(packed))
    ((status, _, body),) = exchange(server, post(headers + CLOSE, packed))
    assert status == 415
    assert "content encoding" in json.loads(body)["error"]


def form(*parts: bytes) -> bytes:
    body = b"".join(b"--b\r\n" + each + b"\r\n" for each in parts) + b"--b--\r\n"
    headers = b"host: x\r\ncontent-type: multipart/form-data; boundary=b\r\ncontent-length: %d\r\n" % len(body)
    return post(headers + CLOSE, body)


def field(name: bytes, value: bytes, extra: bytes = b"") -> bytes:
    return b'Content-Disposition: form-data; name="%s"%s\r\n\r\n%s' % (name, extra, value)


FILE = field(b"image", IMAGE, b'; filename="a.jpg"')
ONE = "\N{FULLWIDTH DIGIT ONE}".encode()
WRONG = {
    "top_k": [
        *(b"1e400", b"-1e400", b"NaN", b"Infinity", b"-0", b"0x1", ONE, b"1_0", b"1,", b"\0", b"9" * 5000, b"[1]", b"true"),
        *(b"1e-400", b"1.0000001", b"{}", b"\xff"),
    ],
    "score_threshold": [
        *(b"1e400", b"NaN", b"-Infinity", b"0x1", ONE, b"-1e-9", b"1.0000001", b"\x000.5", b"0.5\0", b"[0.5]", b"false"),
    ],
    "classes": [
        *(b"\0", b"8\0", ONE, b"[" * 60_000, b'["8", NaN]', b"[1e400]", b"[true]", b"[[8]]", b'{"8": 1}', b"8," * 3000),
        *(b"x" * 60_000, b"\xed\xa0\x80", b'["\\ud800"]', b"[" + b"9" * 5000 + b"]"),
    ],
    "masks": [b"RLE", b"rle\0", b'["rle"]', ONE, b"1e400", b"x" * 60_000],
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_are_none_are_400_and_short_to_say(server, name):
    for value in WRONG[name]:
        ((status, _, body),) = exchange(server, form(FILE, field(name.encode(), value)))
        assert status == 400, value[:50]
        assert json.loads(body)["error"]
        assert len(body) < 2000, value[:50]


def test_values_that_look_odd_and_are_some(server):
    values = {b"score_threshold": [b"-0", b"-0.0", b"5e-1", b"1e-400"], b"top_k": [b"1e1", b" 7 "], b"classes": [b"008"]}
    for name, value in ((name, value) for name, several in values.items() for value in several):
        assert statuses(server, form(FILE, field(name, value))) == [200], value


PARTS = {
    "thousands": [field(b"classes", b"8")] * 5000 + [FILE],
    "an unknown name in UTF-8": [FILE, field("größe".encode(), b"1")],
    "an unknown name in Latin-1": [FILE, field(b"gr\xf6\xdfe", b"1")],
    "a NUL in the name": [FILE, field(b"masks\0", b"rle")],
    "no name": [FILE, b"Content-Disposition: form-data\r\n\r\nx"],
    "no headers": [FILE, b"\r\nx"],
    "headers without end": [FILE, b"x: y\r\n" * 200_000 + b"\r\nx"],
    "other headers without end": [FILE, b"".join(b"x%d: y\r\n" % number for number in range(300_000)) + b"\r\nx"],
    "a header as large as the body": [FILE, b"x: " + b"y" * 5_000_000 + b"\r\n\r\nx"],
    "parameters without end": [FILE, b"Content-Disposition: form-data" + b"; a=b" * 100_000 + b"\r\n\r\nx"],
    "quotes without end": [FILE, b'Content-Disposition: form-data; name="' + b'\\"' * 100_000 + b"\r\n\r\nx"],
}


@pytest.mark.parametrize("name", PARTS)
def test_odd_parts_are_400_with_a_reason_and_cost_little(server, name):
    """As much as some good requests, not seconds by the megabyte."""
    start = _seconds(server)
    for _ in range(10):
        assert statuses(server, form(FILE)) == [200]
    good = _seconds(server) - start
    ((status, _, body),) = exchange(server, form(*PARTS[name]))
    assert status == 400
    assert json.loads(body)["error"]
    assert len(body) < 2000
    assert _seconds(server) - start - good < 5 * good


def _seconds(server: Server) -> float:
    """What the worker has taken of the processor."""
    (worker,) = server.workers()
    times = psutil.Process(worker).cpu_times()
    return times.user + times.system


def test_file_names_are_not_looked_at(server):
    for name in (b"a.gif", "größe.jpg".encode(), b"gr\xf6\xdfe.jpg", b"../../etc/passwd", b"a\0.jpg", b"x" * 1000):
        assert statuses(server, form(field(b"image", IMAGE, b'; filename="%s"' % name))) == [200], name[:20]


def test_body_that_comes_a_byte_at_a_time_is_408(server):
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(post(JPEG + TE))
        connection.settimeout(0.2)
        answer = b""
        while not answer and time.monotonic() - start < 30:
            connection.sendall(b"1\r\nx\r\n")
            try:
                answer = connection.recv(1000)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")
