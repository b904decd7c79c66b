"""Requests that no client should send: each is refused with a reason, and nothing breaks, is fetched or is forged.

In one process the middleware stands where it stands in BentoML: in a Starlette app whose own routes must never be reached. One
test asks a real server.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import random
import re
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from bentoml_detectron import demo
from bentoml_detectron.artifact.manifest import Dataset, Input
from bentoml_detectron.images import Limits
from bentoml_detectron.predictor import Predictor
from bentoml_detectron.service import logs
from bentoml_detectron.service.engine import Engine
from bentoml_detectron.service.front import Front, Settings, Worker
from bentoml_detectron.service.openapi import document
from servers import Server, served, write_service

pytestmark = pytest.mark.slow

IMAGE = demo.images()[3].read_bytes()
FORM = {b"content-type": b"multipart/form-data; boundary=b"}
JPEG = {b"content-type": b"image/jpeg"}
URL = b"http://127.0.0.1:9/picture.jpg"


class Answer(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"])


class Site:
    """The middleware before an app with BentoML's routes, none of which may be reached."""

    def __init__(self, worker: Worker) -> None:
        self.reached: list[str] = []

        async def reach(request: Any) -> PlainTextResponse:
            self.reached.append(request.url.path)
            return PlainTextResponse("BentoML's")

        routes = [Route(f"/{name}", reach, methods=["POST"], name=name) for name in ("predict", "render")]
        routes.append(Route("/livez", reach, methods=["GET"], name="livez"))
        self.app = Starlette(routes=routes, middleware=[Middleware(Front, worker=worker)])
        asyncio.run(self.app({"type": "lifespan"}, self._life, self._nothing))

    @staticmethod
    async def _life() -> dict[str, str]:
        return {"type": "lifespan.startup"}

    @staticmethod
    async def _nothing(message: Any) -> None:
        assert "failed" not in message["type"], message

    def ask(self, *args: Any, **kwargs: Any) -> Answer:
        return asyncio.run(self.answer(*args, **kwargs))

    async def answer(
        self,
        body: bytes | Iterable[bytes] = b"",
        headers: dict[bytes, bytes] = FORM,
        path: str = "/predict",
        query: bytes = b"",
        method: str = "POST",
    ) -> Answer:
        pieces = iter([body] if isinstance(body, bytes) else body)
        sent: list[Any] = []
        forever = asyncio.Event()

        async def receive() -> dict[str, Any]:
            piece = next(pieces, None)
            if piece is None and not isinstance(body, bytes):
                return {"type": "http.request", "body": b"", "more_body": False}
            if piece is None:
                await forever.wait()
            return {"type": "http.request", "body": piece, "more_body": not isinstance(body, bytes)}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "scheme": "http",
            "root_path": "",
            "http_version": "1.1",
            "headers": list(headers.items()),
            "client": ("127.0.0.1", 1),
            "server": None,
        }
        await self.app(scope, receive, send)
        return Answer(sent[0]["status"], dict(sent[0]["headers"]), b"".join(each.get("body", b"") for each in sent[1:]))


@pytest.fixture(scope="module")
def worker(demo_predictor) -> Iterable[Worker]:
    worker = Worker(Settings())
    limits = Limits(max_pixels=worker.settings.max_image_pixels, max_bytes=worker.settings.max_body_bytes)
    digits = Dataset(name="digits", thing_classes=[str(digit) for digit in range(10)])
    taken = Input(format="BGR", min_size_test=192, max_size_test=192)
    predictor = Predictor(demo_predictor.model, taken, digits, limits=limits)
    worker.engine = Engine(lambda: predictor, lambda stage, value: None, max_queue=1000)
    worker.openapi = lambda: document("digits")
    deadline = time.monotonic() + 30
    while worker.engine.predictor is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield worker
    worker.engine.close()


@pytest.fixture
def site(worker, caplog) -> Iterable[Site]:
    """Its log has no traceback when the test ends, and BentoML's routes were not reached."""
    site = Site(worker)
    yield site
    assert not [record for record in caplog.records if record.exc_info]
    assert not site.reached


def part(name: bytes, content: bytes, extra: bytes = b"") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name, extra, content)


def form(image: bytes = IMAGE, **fields: str) -> bytes:
    others = [part(name.encode(), text.encode()) for name, text in fields.items()]
    return part(b"image", image, b'; filename="a.jpg"') + b"".join(others) + b"--b--\r\n"


def saved(kind: str, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, kind)
    return file.getvalue()


def test_good_request_is_answered(site):
    assert len(json.loads(site.ask(form()).body)["scores"]) > 5


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "cut short"),
        (form()[:-200], 400, "cut short"),
        (form(b""), 400, "the image is empty"),
        (form(IMAGE[:2000]), 400, "it is cut short or damaged"),
        (form(IMAGE[:3]), 400, "it is cut short or damaged"),
        (form(b"GIF89a" + IMAGE), 415, "it is a GIF"),
        (part(b"image", URL) + b"--b--", 400, "not supported"),
        (form(URL), 415, "it is text"),
        (form(b"file:///etc/passwd"), 415, "it is text"),
        (part(b"image", b'{"a": [1, 2]}') + b"--b--", 400, "'image' is text, not a file"),
        (form(b'{"a": [1, 2]}'), 415, "it is text"),
        (form(b"[]"), 415, "it is text"),
        (form(b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."), 415, "in an unknown format"),
        (form(b"data:image/jpeg;base64,/9j/4AAQ"), 415, "a data URL"),
        (part(b"image", b"x", b'; filename="a"') + form(), 400, "two parts named 'image'"),
        (part(b"picture", IMAGE, b'; filename="a"') + b"--b--", 400, "unknown field 'picture'"),
        (form(masks="rle") + form(), 200, ""),
        (form(masks="png"), 400, "masks is 'png'"),
        (form(score_threshold="1.5"), 400, "score_threshold is 1.5; it must be from 0 to 1"),
        (form(score_threshold="-0.1"), 400, "score_threshold is -0.1"),
        (form(score_threshold="NaN"), 400, "score_threshold is nan"),
        (form(score_threshold="half"), 400, "score_threshold is 'half'"),
        (form(top_k="0"), 400, "top_k is 0; it must be from 1 to 300"),
        (form(top_k="10001"), 400, "top_k is 10001"),
        (form(top_k="1.5"), 400, "top_k is 1.5"),
        (form(classes="person"), 400, "no class 'person'"),
        (form(classes='["8", "person"]'), 400, "no class 'person'"),
        (form(classes="10"), 400, "10 is not a class; ids are whole numbers from 0 to 9"),
        (form(classes="-1"), 400, "no class '-1'"),
    ],
)
def test_malformed_form_is_refused_with_a_reason(site, body, status, message):
    answer = site.ask(body)
    assert (answer.status, answer.headers[b"content-type"]) == (status, b"application/json")
    if status != 200:
        assert message in answer.error


@pytest.mark.parametrize("kind", [b"image/jpeg", b"image/png", b"image/x", b"application/octet-stream"])
def test_mislabelled_image_is_taken_for_what_it_is(site, kind):
    assert site.ask(saved("BMP"), {b"content-type": kind}).status == 200
    assert site.ask(b"GIF89a", {b"content-type": kind}).status == 415


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/vnd.bentoml+pickle",
        "application/vnd.bentoml.pickle",
        "text/plain",
        "",
        "application/x-www-form-urlencoded",
        "multipart/mixed; boundary=b",
        "video/mp4",
    ],
)
def test_other_content_types_are_415(site, kind):
    pickled = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."
    answer = site.ask(
        pickled, {b"content-type": kind.encode(), b"payload-container": b"NdarrayContainer", b"args-number": b"1"}
    )
    assert answer.status == 415
    assert "content type" in answer.error


@pytest.mark.parametrize(
    "boundary", [b"", b"; boundary=", b"; boundary=c", b"; boundary=" + b"x" * 400, b"; boundary=\xff", b'; boundary="']
)
def test_bad_boundaries_are_400(site, boundary):
    answer = site.ask(form(), {b"content-type": b"multipart/form-data" + boundary})
    assert answer.status == 400
    assert "multipart body" in answer.error


def box(kind: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + kind


OTHERS = {
    "GIF": b"GIF89a",
    "TIFF": b"II*\0",
    "big-endian TIFF": b"MM\0*",
    "BigTIFF": b"II+\0",
    "AVIF": box(b"avif"),
    "HEIC": box(b"heic"),
    "HEIF": box(b"mif1"),
    "MP4": box(b"isom"),
    "QuickTime": box(b"qt  "),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "JPEG 2000 stream": b"\xff\x4f\xff\x51",
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n",
    "JPEG XL stream": b"\xff\x0a",
    "PDF": b"%PDF-1.7",
    "ICO": b"\0\0\1\0",
    "CUR": b"\0\0\2\0",
    "PSD": b"8BPS",
    "ZIP": b"PK\3\4",
    "GZIP": b"\x1f\x8b\x08",
    "NumPy": b"\x93NUMPY\1\0",
    "WAV": b"RIFF\x24\0\0\0WAVE",
    "AVI": b"RIFF\x24\0\0\0AVI ",
    "SVG": b"<svg xmlns='x'>",
    "HTML": b"<!doctype html>",
    "XML": b"<?xml version='1.0'?>",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0",
    "PPM": b"P6 8 8 255\n",
    "PFM": b"PF\n8 8\n-1.0\n",
    "XPM": b"/* XPM */",
    "EXR": b"\x76\x2f\x31\x01",
    "HDR": b"#?RADIANCE\n",
    "FITS": b"SIMPLE  =",
    "DDS": b"DDS |\0\0\0",
    "ICNS": b"icns\0",
    "QOI": b"qoif\0\0\0\x08",
    "PCX": b"\x0a\x05\x01\x08",
    "SGI": b"\x01\xda\x01\x01",
    "Sun": b"\x59\xa6\x6a\x95",
    "WMF": b"\xd7\xcd\xc6\x9a",
    "MKV": b"\x1aE\xdf\xa3",
    "OGG": b"OggS\0",
    "MP3": b"ID3\3",
    "7z": b"7z\xbc\xaf'\x1c",
    "XZ": b"\xfd7zXZ\0",
    "ELF": b"\x7fELF",
    "HDF5": b"\x89HDF\r\n\x1a\n",
    "MNG": b"\x8aMNG\r\n\x1a\n",
    "JNG": b"\x8bJNG\r\n\x1a\n",
    "DICOM": b"\0" * 128 + b"DICM",
    "TGA": b"\0\0\2\0\0\0\0\0\0\0\0\0\x08\0\x08\0\x18\0",
    "pickle": b"\x80\x04K\x01.",
    "base64 of a JPEG": b"/9j/4AAQSkZJRg",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_415_and_say_what_is_taken(site, name):
    answer = site.ask(form(OTHERS[name] + bytes(100)))
    assert answer.status == 415
    assert "only JPEG, PNG, WebP and BMP are supported" in answer.error


def test_formats_above_are_more_than_39_and_so_are_those_that_pillow_writes(site):
    assert len(OTHERS) > 39
    Image.init()
    refused = 0
    for kind in sorted({*Image.SAVE} - {"JPEG", "PNG", "WEBP", "BMP", "MPO"}):
        try:
            content = saved(kind)
        except Exception:  # not for this mode, or a plug-in without a library
            continue
        assert site.ask(form(content)).status == 415, kind
        refused += 1
    assert refused > 12


def enlarged(kind: str) -> bytes:
    """A small file whose header claims 6000 x 5000 pixels, 30 megapixels; decoding it would fail."""
    content = bytearray(saved(kind, (8, 8)))
    if kind == "PNG":
        content[16:24] = struct.pack(">II", 6000, 5000)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif kind == "JPEG":
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = struct.pack(">HH", 5000, 6000)
    elif kind == "BMP":
        content[18:26] = struct.pack("<II", 6000, 5000)
    else:
        content[26:30] = struct.pack("<HH", 6000, 5000)
    return bytes(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
def test_oversized_image_is_413_before_it_is_decoded(site, kind):
    answer = site.ask(form(enlarged(kind)))
    assert answer.status == 413
    assert "6000 x 5000 pixels exceed the limit of 25,000,000" in answer.error


def test_oversized_body_is_413_announced_or_not(site):
    taken = []
    endless = (taken.append(1) or bytes(1 << 20) for _ in range(100))
    answer = site.ask(endless, {b"content-type": b"image/png", b"transfer-encoding": b"chunked"})
    assert (answer.status, len(taken)) == (413, 21)
    assert "larger than 20,971,520 bytes" in answer.error
    announced = (taken.append(1) or b"x" for _ in range(100))
    assert site.ask(announced, {b"content-type": b"image/png", b"content-length": b"20971521"}).status == 413
    assert len(taken) == 21


@pytest.mark.parametrize(
    "path",
    [
        "/predict\n",
        "/render\n",
        "/predict/",
        "//predict",
        "/predict//",
        "/Predict",
        "/predict\r",
        "/predict\0",
        "/./predict",
        "/predict/submit",
        "/predict;x",
        "predict",
        "",
        "*",
        "http://x/predict",
        "//[",
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET", "HEAD"])
def test_no_spelling_of_a_path_reaches_bentomls_own_handlers(site, path, method):
    answer = site.ask(b'{"image": "%s"}' % URL, {b"content-type": b"application/json"}, path=path, method=method)
    assert answer.status == 404
    if method != "HEAD":
        assert repr(path) in answer.error
        assert "/predict" in answer.error


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "post", "X"])
def test_other_methods_are_405_and_say_which(site, method):
    answer = site.ask(form(), path="/predict", method=method)
    assert (answer.status, answer.headers[b"allow"]) == (405, b"POST")


def test_other_paths_of_bentoml_are_handed_on(worker):
    site = Site(worker)
    assert site.ask(path="/livez", method="GET").body == b"BentoML's"
    assert site.ask(path="/livez", method="POST").status == 405


def test_headers_reach_bentomls_middlewares_as_utf8(worker):
    """OpenTelemetry's fails on a Latin-1 letter before a backslash, the access log's on any in a content type."""
    seen: list[bytes] = []

    class Decoding:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            seen.extend(value for _, value in scope.get("headers", []))
            [value.decode() for value in seen]
            await self.app(scope, receive, send)

    site = Site(worker)
    site.app = Starlette(middleware=[Middleware(Decoding), Middleware(Front, worker=worker)])
    asyncio.run(site.app({"type": "lifespan"}, site._life, site._nothing))
    answer = site.ask(b"x", {b"content-type": b"image/\xff\\", b"user-agent": b"\xff\\", b"x": "ä".encode()})
    assert answer.status == 415
    assert seen == ["image/ÿ\\".encode(), "ÿ\\".encode(), "ä".encode()]


def test_log_escapes_what_clients_send(caplog):
    logger = logging.getLogger("bentoml.test_hostile")
    handler = logging.StreamHandler(stream := io.StringIO())
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handler.addFilter(logs.Escape())
    logger.addHandler(handler)
    try:
        logger.warning("path=%s in %.1fms", "/\n2026 [INFO] forged\x1b[31m\u202e\u2028", 1.5)
        try:
            raise ValueError("a\n2026 [INFO] forged\x1b")
        except ValueError:
            logger.exception("failed")
    finally:
        logger.removeHandler(handler)
    lines = stream.getvalue().split("\n")
    assert lines[0] == "WARNING path=/\\n2026 [INFO] forged\\x1b[31m\\u202e\\u2028 in 1.5ms"
    assert "\x1b" not in stream.getvalue()
    assert not [line for line in lines if line.startswith("2026")]


MUTATIONS = (
    lambda rng, data, at: data[:at] + rng.randbytes(1) + data[at + 1 :],
    lambda rng, data, at: data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :],
    lambda rng, data, at: data[:at] + b"\0\0\0\0" + data[at + 4 :],
    lambda rng, data, at: data[: at + 1],
    lambda rng, data, at: data[:at] + data[at + rng.randrange(1, 99) :],
    lambda rng, data, at: data[: at + 50] + data[at:],
)


@pytest.mark.slow
def test_damaged_files_are_refused_or_answered(site):
    rng = random.Random(0)
    files = [saved(kind, (24, 24)) for kind in ("JPEG", "PNG", "WEBP", "BMP")]
    statuses: Counter[int] = Counter()
    for index in range(400):
        content = rng.choice(files)
        for _ in range(rng.choice((1, 2, 8))):
            content = rng.choice(MUTATIONS)(rng, content, rng.randrange(min(len(content) or 1, rng.choice((32, 2000)))))
        answer = site.ask(form(content, masks="none", top_k="1"))
        assert answer.status in (200, 400, 413, 415), (index, answer)
        assert answer.status == 200 or answer.error
        statuses[answer.status] += 1
    assert statuses[400] > 50
    assert statuses[200] > 10


WORDS = st.one_of(
    st.binary(max_size=12), st.sampled_from([b"nan", b"NaN", b"1e999", b"[1]", b"null", b"{}", b"8", b"rle", b'"', URL])
)
NAMES = st.sampled_from([b"image", b"score_threshold", b"top_k", b"classes", b"masks", b"y"])
EXTRAS = st.sampled_from([b"", b'; filename="a"', b"; filename"])
BODIES = st.one_of(
    st.binary(max_size=99),
    st.lists(st.builds(part, NAMES, WORDS, EXTRAS), max_size=4).map(b"".join).map(lambda b: b + b"--b--"),
)
KINDS = st.sampled_from([FORM, JPEG, {}, {b"content-type": b"multipart/form-data"}, {b"content-type": b"application/json"}])
QUERIES = st.one_of(st.just(b""), st.lists(st.tuples(NAMES, WORDS).map(b"=".join), max_size=3).map(b"&".join))
PATHS = st.one_of(
    st.sampled_from(["/predict", "/render"]), st.text(max_size=9).map(lambda text: f"/predict{text}"), st.text(max_size=9)
)


@pytest.mark.slow
def test_generated_requests_are_4xx_with_a_reason(site):
    @settings(max_examples=600, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(
        body=BODIES,
        headers=KINDS,
        query=QUERIES,
        path=PATHS,
        method=st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "x"]),
    )
    def send(body, headers, query, path, method):
        answer = site.ask(body, headers, path, query, method)
        assert 400 <= answer.status < 500
        assert answer.error

    send()


@pytest.fixture(scope="module")
def server(tmp_path_factory, digits_home) -> Iterable[Server]:
    """A BentoML server of the demo model."""
    folder = tmp_path_factory.mktemp("server")
    write_service(folder)
    with served(folder, digits_home) as server:
        yield server


def raw(url: str, content: bytes) -> bytes:
    address, _, port = url.removeprefix("http://").partition(":")
    answer = b""
    with socket.create_connection((address, int(port)), timeout=30) as connection:
        connection.sendall(content)
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


class Listener:
    """Counts who connects to a port of this machine."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/picture.jpg"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()


@pytest.mark.slow
def test_urls_in_place_of_files_are_never_fetched(server):
    url = server.url
    listener = Listener()
    there = listener.url
    spellings: list[dict[str, Any]] = [
        {"files": {"image": (None, there)}},
        {"files": {"image": ("a.jpg", there)}},
        {"files": {"image": ("a.url", there, "text/uri-list")}},
        {"data": {"image": there}},
        {"json": {"image": there}},
        {"json": {"image": {"url": there}}},
        {"json": there},
        {"content": there, "headers": {"content-type": "image/jpeg"}},
        {"content": there, "headers": {"content-type": "text/uri-list"}},
        {"content": b"", "params": {"image": there}, "headers": {"content-type": "image/jpeg"}},
        {"content": b"<svg><image href='%s'/></svg>" % there.encode(), "headers": {"content-type": "image/svg+xml"}},
    ]
    requests = [
        (f"{url}{path}", spelling) for path in ("/predict", "/render", "/predict%0A", "/predict/") for spelling in spellings
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda each: httpx.post(each[0], **each[1], timeout=60, follow_redirects=True), requests))
    assert {answer.status_code for answer in answers} <= {400, 404, 415}
    assert all(answer.json()["error"] for answer in answers)
    time.sleep(0.5)  # for one who fetches later
    assert listener.connections == 0
    socket.create_connection(listener.socket.getsockname()).close()
    time.sleep(0.2)
    assert listener.connections == 1  # it does listen
    listener.socket.close()
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_server_and_its_log_stand_what_its_own_middlewares_do_not(server):
    url = server.url
    end = b"host: x\r\nconnection: close\r\n\r\n"
    assert b" 404 " in raw(url, b"GET /a%0a2026-11-23T00:00:00+0000%20[INFO]%20forged%1b[31m HTTP/1.1\r\n" + end)
    assert b" 415 " in raw(url, b"POST /predict HTTP/1.1\r\ncontent-type: a\x1b[31m/\xff\\\r\ncontent-length: 0\r\n" + end)
    for header in (b"user-agent", b"traceparent", b"cookie", b"x-forwarded-for", b"baggage"):
        assert b" 200 " in raw(url, b"GET /info HTTP/1.1\r\n" + header + b": \xff\x1b\\\r\n" + end), header
    assert b" 200 " in raw(url, b"GET /info HTTP/1.1\r\nhost: \xff\\\r\nconnection: close\r\n\r\n")
    upgrade = b"upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    assert b" 403 " in raw(url, b"GET /predict HTTP/1.1\r\n" + upgrade + b"host: x\r\nconnection: upgrade\r\n\r\n")
    for index in range(50):
        assert httpx.get(f"{url}/none{index}").status_code == 404
    assert "/none" not in httpx.get(f"{url}/metrics").text
    text = server.log
    assert "Traceback" not in text
    assert "\x1b" not in text
    assert "\\n2026-11-23T00:00:00+0000 [INFO] forged\\x1b[31m" in text
    assert not re.search(r"^2026-11-23T00:00:00", text, re.MULTILINE)


@pytest.mark.slow
def test_answers_hold_against_the_openapi_document(server):
    """Schemathesis; `tools/fuzz_service.py` sends more."""
    import requests
    import schemathesis
    from schemathesis.specs.openapi import checks

    held = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance,
            checks.negative_data_rejection, checks.allow_header_conformance, checks.unsupported_method]  # fmt: skip
    for kind in ("image/jpeg", "image/png", "image/webp", "image/bmp", "application/octet-stream"):
        schemathesis.openapi.media_type(kind, st.one_of(st.binary(max_size=99), st.just(IMAGE)))
    schema = schemathesis.openapi.from_url(f"{server.url}/docs.json")
    session = requests.Session()
    statuses: Counter[int] = Counter()
    for operation in (each.ok() for each in schema.get_all_operations() if each.ok().method == "post"):
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
            )
            @given(case=operation.as_strategy(mode))
            def send(case):
                answer = case.call(session=session)
                statuses[answer.status_code] += 1
                assert answer.status_code < 500
                case.validate_response(answer, checks=held)

            send()
    assert {200, 400, 415} <= statuses.keys()
    assert "Traceback" not in server.log
