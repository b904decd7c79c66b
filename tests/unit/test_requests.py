"""From a request's head and body to what it asks for; the body comes from a `receive` as a server would give it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentoml_detectron.errors import InvalidArgumentError, RequestError
from bentoml_detectron.service import requests
from bentoml_detectron.service.requests import Call, DisconnectedError, read

FORM = b"multipart/form-data; boundary=b"
LIMIT = 1000


def part(name: str, content: bytes, extra: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + content + b"\r\n"


def form(image: bytes = b"pixels", **fields: str) -> bytes:
    parts = [part("image", image, '; filename="a.jpg"'), *(part(name, text.encode()) for name, text in fields.items())]
    return b"".join(parts) + b"--b--\r\n"


class Client:
    """Gives a body in pieces; at its end it waits, or leaves."""

    def __init__(self, pieces: Iterable[bytes], *, leaves: bool = False, stalls: bool = False) -> None:
        self.pieces = list(pieces)
        self.leaves, self.stalls = leaves, stalls
        self.taken = 0

    async def __call__(self) -> dict[str, Any]:
        if self.taken < len(self.pieces):
            self.taken += 1
            more = self.taken < len(self.pieces) or self.leaves or self.stalls
            return {"type": "http.request", "body": self.pieces[self.taken - 1], "more_body": more}
        if self.leaves:
            return {"type": "http.disconnect"}
        if self.stalls:
            await asyncio.sleep(60)
        return {"type": "http.request"}


def take(
    body: bytes | Client, kind: bytes = FORM, query: bytes = b"", limit: int = LIMIT, seconds: float = 5, **headers: bytes
) -> Call:
    client = body if isinstance(body, Client) else Client([body])
    given = {b"content-type": kind, **{name.replace("_", "-").encode(): value for name, value in headers.items()}}
    return asyncio.run(read(given, query, client, limit, seconds))


def refused(*args: Any, **kwargs: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        take(*args, **kwargs)
    return caught.value


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_pieces_of_any_size_make_the_same_form(size):
    body = form(b"\r\n--\r\n--x", score_threshold="0.5", classes="a,8", top_k="3", masks="none")
    call = take(Client(body[at : at + size] for at in range(0, len(body), size)))
    assert call == Call(b"\r\n--\r\n--x", {"score_threshold": 0.5, "classes": ["a", "8"], "top_k": 3}, "none")


def test_image_is_the_body_and_the_query_has_the_fields():
    call = take(b"pixels", b"image/jpeg", b"score_threshold=0.5&top_k=2.0&classes=8&classes=9&masks=polygon")
    assert call == Call(b"pixels", {"score_threshold": 0.5, "top_k": 2, "classes": ["8", "9"]}, "polygon")


def test_form_goes_before_the_query():
    assert take(form(top_k="3"), query=b"top_k=4&masks=none") == Call(b"pixels", {"top_k": 3}, "none")


def test_bentomls_clients_put_texts_in_quotes_and_nulls_for_what_is_left_out():
    call = take(form(score_threshold="null", classes='["8", 9]', top_k="null", masks='"none"'))
    assert call == Call(b"pixels", {"classes": ["8", 9]}, "none")


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "text/plain",
        "application/json",
        "application/vnd.bentoml+pickle",
        "multipart/mixed; boundary=b",
        "application/x-www-form-urlencoded",
        "\xff",
    ],
)
def test_other_content_types_are_415_and_named(kind):
    error = refused(form(), kind.encode("latin-1"))
    assert error.error_code == 415
    assert repr(kind.partition(";")[0]) in str(error)
    assert "multipart/form-data" in str(error)


def test_content_encoding_is_415():
    assert refused(form(), content_encoding=b"gzip").error_code == 415
    assert take(form(), content_encoding=b"identity").image == b"pixels"


@pytest.mark.parametrize("length", [b"1001", b"9" * 5000])
def test_announced_length_above_the_limit_is_413_before_anything_is_read(length):
    client = Client([b"x"])
    assert refused(client, b"image/png", content_length=length).error_code == 413
    assert client.taken == 0


@pytest.mark.parametrize("length", [b"", b"1", b"-1", b"x", b"1e3"])
def test_lying_length_does_not_let_more_in(length):
    client = Client([b"x" * 600] * 10)
    error = refused(client, b"image/png", content_length=length)
    assert error.error_code == 413
    assert "1,000 bytes" in str(error)
    assert client.taken == 2


def test_body_of_just_the_limit_is_taken():
    assert take(b"x" * LIMIT, b"image/png").image == b"x" * LIMIT


def test_memory_of_a_body_in_small_pieces_is_the_bodys():
    import tracemalloc

    client = Client([b"xy"] * 200_000)
    take(b"x", b"image/png")  # what is imported
    tracemalloc.start()
    try:
        image = take(client, b"image/png", limit=400_000).image
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(image) == 400_000
    assert peak < 4 * len(image)


def test_slow_body_is_408():
    error = refused(Client([b"x"], stalls=True), b"image/png", seconds=0.05)
    assert error.error_code == 408
    assert "0.05 seconds" in str(error)


def test_client_that_leaves_is_no_error_of_its_request():
    with pytest.raises(DisconnectedError):
        take(Client([b"x"], leaves=True), b"image/png")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "cut short"),
        (form()[:-4], "cut short"),
        (form()[:40], "cut short"),
        (b"pixels", "cannot be read"),
        (b"--c\r\n\r\n--c--", "cannot be read"),
        (b"--b--\r\n", "no file in a part named 'image'"),
        (part("top_k", b"3") + b"--b--\r\n", "no file in a part named 'image'"),
        (part("picture", b"x", '; filename="a"') + b"--b--", "unknown field 'picture'"),
        (b"--b\r\n\r\nx\r\n--b--", "unknown field ''"),
        (part("image", b"http://127.0.0.1/a.jpg") + b"--b--", "not supported"),
        (part("image", b'{"url": "http://127.0.0.1/a.jpg"}') + b"--b--", "not supported"),
        (part("image", b"x", '; filename="a"') + form(), "two parts named 'image'"),
        (form(b""), "the image is empty"),
        (part("top_k", b"3") + form(top_k="4"), "'top_k' is given 2 times"),
        (part("masks", b"\xff") + form(), "'masks' is not UTF-8 text"),
        (part("masks", b"x" * 70_000) + form(), "'masks' is larger than 65,536 bytes"),
        (part("classes", b"8") * 2001 + form(), "more than 2000 parts"),
        (b"--b\r\n" + b"a" * 5000, "header size"),
        (b"--b\r\n" + b"a:b\r\n" * 50, "header count"),
    ],
)
def test_malformed_forms_are_400_and_say_what_is_wrong(body, message):
    error = refused(body, limit=1 << 20)
    assert (error.error_code, message in str(error)) == (400, True), str(error)
    assert len(str(error)) < 400


def test_fault_of_a_part_is_not_called_one_of_the_whole_body():
    assert str(refused(part("picture", b"x") + b"--b--")).startswith(
        "unknown field 'picture'; known fields: image, score_threshold"
    )


@pytest.mark.parametrize(
    "boundary",
    [
        b"",
        b"; boundary",
        b"; boundary=",
        b'; boundary="',
        b"; boundary=" + b"x" * 300,
        b"; boundary=\xff",
        b"; boundary*=utf-8''b",
        b"; boundary=c",
    ],
)
def test_bad_boundaries_are_400(boundary):
    error = refused(form(), b"multipart/form-data" + boundary)
    assert error.error_code == 400
    assert "multipart body" in str(error)


@pytest.mark.parametrize("more", [b"; a=b" * 11, b";" * 900])
def test_part_whose_header_would_take_long_is_400(more):
    head = b'--b\r\nContent-Disposition: form-data; name="masks"' + more + b"\r\n\r\nrle\r\n--b--\r\n"
    error = refused(head, b"multipart/form-data; boundary=b", limit=1 << 20)
    assert (error.error_code, "Content-Disposition" in str(error)) == (400, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score_threshold": "high"}, "score_threshold is 'high'"),
        ({"score_threshold": "true"}, "score_threshold is 'true'"),
        ({"score_threshold": "[0.5]"}, "score_threshold is '[0.5]'"),
        ({"score_threshold": "Infinity"}, "score_threshold is 'Infinity'"),
        ({"top_k": "1e400"}, "top_k is '1e400'"),
        ({"top_k": "9" * 6000}, "top_k is '999"),
        ({"top_k": "301"}, "top_k is 301; it must be from 1 to 300"),
        ({"masks": "png"}, "masks is 'png'; it must be one of rle, polygon, none"),
        ({"masks": '"\\ud800"'}, "masks is '\\ud800'"),
        ({"classes": "[1.5]"}, "classes is '[1.5]'; it must hold names and ids"),
        ({"classes": "[true]"}, "classes is '[true]'; it must hold names and ids"),
        ({"classes": "[" * 9000}, "classes has a name of 9,000 characters"),
        ({"classes": ",".join("8" * 2001)}, "classes has 2,001 entries"),
        ({"classes": str([8] * 2001)}, "classes has 2,001 entries"),
        ({"classes": "x" * 9000}, "classes has a name of 9,000 characters"),
    ],
)
def test_values_that_no_field_may_have_are_400_and_named(fields, message):
    with pytest.raises(InvalidArgumentError) as caught:
        take(form(**fields), limit=1 << 20)
    assert caught.value.error_code == 400
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "query", [b"x=1", b"image=http://127.0.0.1/", b"top_k=%ff", b"&".join([b"classes=8"] * 3000), b"top_k=1&top_k=2", b"\xff=1"]
)
def test_bad_queries_are_400(query):
    assert refused(b"pixels", b"image/png", query).error_code == 400


def test_large_forms_are_parsed_beside_the_event_loop(monkeypatch):
    """A body of almost-boundaries takes the parser seconds, in which the worker would answer nobody."""
    parsers: list[str] = []
    parse = requests._form
    monkeypatch.setattr(requests, "_form", lambda *args: parsers.append(threading.current_thread().name) or parse(*args))
    take(form())
    take(form(b"\r\n--bx" * (1 << 18)), limit=1 << 22)
    assert parsers[0] == threading.current_thread().name
    assert parsers[1] != threading.current_thread().name


NAMES = st.sampled_from(["image", "score_threshold", "classes", "top_k", "masks", "x", ""])
TEXTS = st.one_of(
    st.text(max_size=20).map(str.encode),
    st.binary(max_size=20),
    st.sampled_from(
        [
            b"NaN",
            b"-Infinity",
            b"1e999",
            b"null",
            b'"x"',
            b"[]",
            b"[1,2",
            b"{}",
            b"http://127.0.0.1:9/",
            b"\x80\x04K\x01.",
            b"--b",
            b"\r\n--b--",
        ]
    ),
)
HEADS = st.one_of(
    st.builds(
        lambda name, extra: b'Content-Disposition: form-data; name="' + name.encode() + b'"' + extra,
        NAMES,
        st.sampled_from(
            [b"", b'; filename="a"', b"; filename*=utf-8''a", b"; filename", b'; filename="', b"\r\nContent-Type: a/b"]
        ),
    ),
    st.binary(max_size=30),
)
LINES = st.sampled_from([b"\r\n", b"\n", b"\r", b""])
PARTS = st.tuples(st.sampled_from([b"--b", b"--b--", b"--", b"-b"]), LINES, HEADS, LINES, LINES, TEXTS, LINES).map(b"".join)
BODIES = st.one_of(
    st.binary(max_size=200),
    st.tuples(st.lists(PARTS, max_size=5).map(b"".join), st.sampled_from([b"--b--", b"--b--\r\n", b""])).map(b"".join),
)
KINDS = st.one_of(
    st.sampled_from(
        [FORM, b"image/png", b"multipart/form-data", b'multipart/form-data; boundary="b"', b"application/octet-stream"]
    ),
    st.binary(max_size=40),
)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(
    kind=KINDS,
    query=st.one_of(st.just(b""), st.binary(max_size=60)),
    body=BODIES,
    size=st.integers(1, 300),
    leaves=st.booleans(),
    headers=st.dictionaries(st.sampled_from([b"content-length", b"content-encoding"]), st.binary(max_size=6), max_size=2),
)
def test_any_request_is_a_call_or_an_error_that_says_so(kind, query, body, size, leaves, headers):
    client = Client([body[at : at + size] for at in range(0, len(body), size)] or [b""], leaves=leaves)
    refusal = call = None
    try:
        call = asyncio.run(read({b"content-type": kind, **headers}, query, client, LIMIT, 5))
    except InvalidArgumentError as exc:
        refusal = exc
    except DisconnectedError:
        assert leaves
        return
    if refusal is not None:
        assert 400 <= refusal.error_code < 500
        assert str(refusal)
    else:
        assert call is not None
        assert call.image
        assert call.masks in requests.MASKS
