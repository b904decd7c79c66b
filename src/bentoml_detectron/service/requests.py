"""From an HTTP request to an image and options. Nothing in the request is trusted, and nothing that it names is fetched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import parse_qsl

from bentoml_detectron.errors import InvalidArgumentError, RequestError

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

FIELDS = ("score_threshold", "classes", "top_k", "masks")
MASKS = ("rle", "polygon", "none")
MAX_FIELD = 64 << 10
"""Most bytes of a field that is no image."""
MAX_PARTS = 2000
"""Most parts of a form; each class may be one."""
MAX_PARAMETERS = 10
"""Most semicolons in a part's Content-Disposition, each of which python-multipart takes in Python."""
MAX_TOP_K = 300
"""What LVIS asks for; the largest number of masks that a request can have computed on a model whose own limit is lower."""
MAX_CLASSES = 2000
MAX_CLASS_NAME = 1000  # characters
_LARGE_FORM = 1 << 20
"""Bytes from which a form is parsed beside the event loop: one made of almost-boundaries takes 0.2 s a megabyte."""
_IMAGE_TYPES = ("image/", "application/octet-stream")


@dataclass(slots=True)
class Call:
    """What a request asks for.

    Attributes:
        image: The encoded image.
        options: Keyword arguments of `Predictor.options`.
        masks: How masks are spelled in the answer.
    """

    image: bytes
    options: dict[str, Any] = field(default_factory=dict)
    masks: Literal["rle", "polygon", "none"] = "rle"


async def read(headers: Mapping[bytes, bytes], query: bytes, receive: Receive, limit: int, seconds: float) -> Call:
    """Reads a request's body, as a multipart form or as the image itself.

    Args:
        headers: The request's, names in small letters.
        query: The query string; its fields hold where the body has none of that name.
        receive: The next part of the body.
        limit: Most bytes that the body may have.
        seconds: Most seconds that it may take to arrive.

    Raises:
        RequestError: The request is malformed, of another type, too large (413) or too slow (408).
        InvalidArgumentError: A field has no value that it may have.
        DisconnectedError: The client is gone.
    """
    kind, parameters = _content_type(headers.get(b"content-type", b""))
    if kind != "multipart/form-data" and not kind.startswith(_IMAGE_TYPES):
        raise RequestError(
            f"the content type is {kind!r:.100}; send the image as the part 'image' of a multipart/form-data body, or as the "
            "body itself with a content type of image/... or application/octet-stream",
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            value=kind,
        )
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
        raise RequestError(
            "the body has a content encoding; send it without one", status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            value=headers[b"content-encoding"],
        )  # fmt: skip
    try:
        async with asyncio.timeout(seconds):
            body = await _body(headers, receive, limit)
    except TimeoutError:
        raise RequestError(
            f"the body did not arrive within {seconds:g} seconds", status=HTTPStatus.REQUEST_TIMEOUT, value=seconds
        ) from None
    fields = _query(query)
    if kind == "multipart/form-data":
        boundary = parameters.get(b"boundary", b"")
        image, own = _form(body, boundary) if len(body) < _LARGE_FORM else await asyncio.to_thread(_form, body, boundary)
        return _call(image, {**fields, **own})
    return _call(body, fields)


class DisconnectedError(Exception):
    """The client is gone; nobody waits for an answer."""


def _content_type(value: bytes) -> tuple[str, dict[bytes, bytes]]:
    from python_multipart.multipart import parse_options_header

    kind, parameters = parse_options_header(value)
    return kind.decode("latin-1").strip().lower(), parameters


async def _body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    too_large = RequestError(
        f"the body is larger than {limit:,} bytes; send a smaller image",
        status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        value=limit,
    )
    length = headers.get(b"content-length", b"")
    if length.isdigit() and (len(length) > 18 or int(length) > limit):  # Python refuses to read thousands of digits
        raise too_large
    body = bytearray()  # not a list of chunks, which may be of a byte each
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


def _query(query: bytes) -> dict[str, list[str]]:
    fields: dict[str, list[str]] = {}
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_PARTS)
    except ValueError as exc:
        raise RequestError(f"the query string cannot be read: {exc}") from exc
    for name, value in pairs:
        if name not in FIELDS:
            raise RequestError(f"unknown field {name!r:.100}; known fields: image, {', '.join(FIELDS)}", value=name)
        fields.setdefault(name, []).append(value)
    return fields


def _form(body: bytes, boundary: bytes) -> tuple[bytes, dict[str, list[str]]]:
    """The image and the other fields of a multipart form."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser

    parts = _Parts()
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except RequestError:  # a ValueError too; of a part, which it names
        raise
    except (FormParserError, ValueError) as exc:
        raise RequestError(f"the multipart body cannot be read: {str(exc)[:200]}") from exc
    if not parts.ended:
        raise RequestError("the multipart body is cut short: its last boundary is missing")
    if parts.image is None:
        raise RequestError("the form has no file in a part named 'image'; send one: curl -F image=@picture.jpg")
    return parts.image, parts.fields


class _Parts:
    """Takes what python-multipart's parser finds; it keeps the image and the fields, and refuses all else by name."""

    def __init__(self) -> None:
        self.image: bytes | None = None
        self.fields: dict[str, list[str]] = {}
        self.ended = False
        self._count = 0
        self._name = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._content: list[bytes] = []

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": lambda data, start, end: self._content.append(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._count += 1
        if self._count > MAX_PARTS:
            raise RequestError(f"the form has more than {MAX_PARTS} parts")
        self._headers, self._content = {}, []

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _finish(self) -> None:
        self.ended = True

    def _end(self) -> None:
        from python_multipart.multipart import parse_options_header

        disposition = self._headers.get(b"content-disposition", b"")
        if disposition.count(b";") > MAX_PARAMETERS:
            raise RequestError(f"the Content-Disposition of a part has more than {MAX_PARAMETERS} parameters")
        _, options = parse_options_header(disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        content = self._content[0] if len(self._content) == 1 else b"".join(self._content)
        if name == "image":
            self._take_image(content, is_file=b"filename" in options)
        elif name not in FIELDS:
            raise RequestError(f"unknown field {name!r:.100}; known fields: image, {', '.join(FIELDS)}", value=name)
        elif len(content) > MAX_FIELD:
            raise RequestError(f"the field {name!r} is larger than {MAX_FIELD:,} bytes", value=name)
        else:
            try:
                self.fields.setdefault(name, []).append(content.decode())
            except UnicodeDecodeError as exc:
                raise RequestError(f"the field {name!r} is not UTF-8 text", value=name) from exc

    def _take_image(self, content: bytes, is_file: bool) -> None:
        if self.image is not None:
            raise RequestError("the form has two parts named 'image'; send one image per request")
        if not is_file:
            raise RequestError(
                "'image' is text, not a file; URLs are not supported, so send the file itself: curl -F image=@picture.jpg",
                value=content[:100],
            )
        self.image = content


def _call(image: bytes, fields: Mapping[str, list[str]]) -> Call:
    if not image:
        raise RequestError("the image is empty")
    call = Call(image)
    for name, given in fields.items():
        if name != "classes" and len(given) > 1:
            raise RequestError(f"the field {name!r} is given {len(given)} times", value=given)
    if (threshold := _number("score_threshold", fields)) is not None:
        call.options["score_threshold"] = threshold
    if (top_k := _number("top_k", fields)) is not None:
        if not 1 <= top_k <= MAX_TOP_K:
            raise InvalidArgumentError(f"top_k is {top_k}; it must be from 1 to {MAX_TOP_K}", value=top_k)
        call.options["top_k"] = int(top_k) if float(top_k).is_integer() else top_k
    if (classes := _classes(fields.get("classes", []))) is not None:
        call.options["classes"] = classes
    masks = _plain(fields.get("masks", ["rle"])[0])
    if masks in ("", "null"):  # as of the other fields, none
        masks = "rle"
    if masks not in MASKS:
        raise InvalidArgumentError(f"masks is {masks!r:.100}; it must be one of {', '.join(MASKS)}", value=masks)
    call.masks = masks
    return call


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _plain(text: str) -> Any:
    """A field's text; BentoML's clients put it in JSON's quotes."""
    value = _json(text)
    return value if isinstance(value, str) else text


def _number(name: str, fields: Mapping[str, list[str]]) -> float | None:
    text = fields.get(name, ["null"])[0]
    value = _json(text)
    if value is None or text == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e9:
        raise InvalidArgumentError(f"{name} is {text!r:.100}; it must be a number", value=text)
    return value


def _classes(given: list[str]) -> list[str | int] | None:
    """Classes as a JSON list, as names with commas between, or as a field repeated. None: all."""
    if not given:
        return None
    if len(given) == 1:
        value = _json(given[0])
        if value is None or given[0] == "":
            return None
        if isinstance(value, list):
            if not all(isinstance(each, (str, int)) and not isinstance(each, bool) for each in value):
                raise InvalidArgumentError(f"classes is {given[0]!r:.100}; it must hold names and ids", value=given[0])
            return _few(value)
        given = _plain(given[0]).split(",")
    return _few([each.strip() for each in given])


def _few(classes: list[Any]) -> list[Any]:
    """The same; each is looked for among all of the model's, and stands in the message if it is not there."""
    if len(classes) > MAX_CLASSES:
        raise InvalidArgumentError(
            f"classes has {len(classes):,} entries; at most {MAX_CLASSES:,} are allowed", value=len(classes)
        )
    longest = max((len(each) for each in classes if isinstance(each, str)), default=0)
    if longest > MAX_CLASS_NAME:
        raise InvalidArgumentError(
            f"classes has a name of {longest:,} characters, which is longer than any class name", value=longest
        )
    return classes
