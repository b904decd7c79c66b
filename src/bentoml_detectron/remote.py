"""`Remote`: a running service as a source of `Detections`, over HTTP."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx

from bentoml_detectron.errors import ImageError, InvalidArgumentError, OverloadedError
from bentoml_detectron.results import Detections

__all__ = ["TOKEN_VARIABLE", "Remote"]

TOKEN_VARIABLE = "BENTOML_DETECTRON_TOKEN"
"""Name of the environment variable with the service's token, which the service has, too (consumers import no other one)."""

_AGAIN = (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
"""Refusals after which the service says when to ask again."""
_SENDABLE = re.compile(r"[!-~]+( +[!-~]+)*")  # in a header
_LONGEST_PAUSE = 30.0  # seconds
_LEAST_PAUSE = 0.1


class Remote:
    """A client of one service of `get_service`; a context manager, which closes its connections.

    Example::

        with Remote("http://127.0.0.1:3000") as service:
            for path, found in zip(paths, service.predict(paths)):
                print(path, found)
    """

    def __init__(self, url: str, *, token: str | None = None, connections: int = 4, patience: float = 120.0) -> None:
        """Connects to nothing yet.

        Args:
            url: Of the service, with its path prefix if it has one.
            token: What the service asks for, if anything.
            connections: How many requests are under way at once, 1 or more. With one, each image is a batch of its own.
            patience: Seconds for which a request that is refused is sent again and again, and most for which a service may say
                nothing.

        Raises:
            InvalidArgumentError: (``ValueError``) The URL is none, or a number is out of range.
        """
        if not url.startswith(("http://", "https://")):
            raise InvalidArgumentError(f"{url!r} is not the URL of a service; give one, as http://127.0.0.1:3000", value=url)
        if connections < 1 or patience <= 0:
            raise InvalidArgumentError(
                f"connections={connections}, patience={patience}; they must be at least 1, and more than 0 seconds",
                value=(connections, patience),
            )
        if token and not _SENDABLE.fullmatch(token):  # and not in a message, which may be in a log
            raise InvalidArgumentError(
                "the token cannot be sent in a header, perhaps because of a line break; use only ASCII letters and digits"
            )
        self.url = url.rstrip("/")
        self._connections = connections
        self._patience = patience
        limits = httpx.Limits(max_connections=connections)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(headers=headers, limits=limits, timeout=httpx.Timeout(patience))

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._client.close()

    def info(self) -> dict[str, Any]:
        """What the service says of its model at ``/info``: tag, classes, precision, limits.

        Raises:
            InvalidArgumentError: (``ValueError``) There is no such service there, or it asks for another token.
            OverloadedError: Its model is not loaded in all the time that there is.
        """
        answer = self._answer("GET", "/info", threading.Event())
        try:
            found = answer.json()
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("tag"), str):
            raise InvalidArgumentError(f"{self.url} is not a bentoml-detectron service: {answer.text!r:.80}", value=self.url)
        return found

    def predict(self, images: Iterable[str | os.PathLike[str]]) -> Iterator[Detections]:
        """What the service finds on each image, in their order, with its model's own thresholds.

        Args:
            images: Files; each is read when it is sent.

        Raises:
            ImageError: A file cannot be read, or the service refuses it; the message names it.
            InvalidArgumentError: (``ValueError``) The service asks for another token, or does not answer as one.
            OverloadedError: It refuses an image in all the time that there is.
        """
        waiting: deque[Future[Detections]] = deque()
        stop = threading.Event()
        with ThreadPoolExecutor(self._connections) as pool:
            try:
                for path in images:
                    waiting.append(pool.submit(self._predict, Path(path), stop))
                    if len(waiting) > 2 * self._connections:  # what is ahead of a slow one is held
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                stop.set()
                for each in waiting:
                    each.cancel()

    def _predict(self, path: Path, stop: threading.Event) -> Detections:
        try:
            content = path.read_bytes()
        except OSError as exc:
            raise ImageError(f"cannot read {path} ({exc.strerror}); give a readable image", value=str(path)) from exc
        answer = self._answer("POST", "/predict", stop, content, path)
        try:
            return Detections.from_json(answer.content)
        except InvalidArgumentError as exc:
            raise InvalidArgumentError(f"{self.url} is not a bentoml-detectron service: {exc}", value=self.url) from exc

    def _answer(
        self, method: str, path: str, stop: threading.Event, content: bytes | None = None, file: Path | None = None
    ) -> httpx.Response:
        """The service's answer of status 200, asked for again where it refuses for a while.

        Args:
            method: HTTP's.
            path: Below the URL.
            stop: Once set, nothing is asked for again.
            content: The body, an image.
            file: Where that is from, for messages.
        """
        headers = {} if content is None else {"content-type": "application/octet-stream"}
        deadline = time.monotonic() + self._patience
        while True:
            reason, pause = "", _LEAST_PAUSE
            try:
                answer = self._client.request(method, self.url + path, content=content, headers=headers)
            except httpx.ConnectError as exc:
                raise InvalidArgumentError(f"nothing answers at {self.url} ({exc}); start the service, or give another URL",
                                           value=self.url) from exc  # fmt: skip
            except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as exc:
                raise InvalidArgumentError(f"{self.url!r} is not the URL of a service: {exc}", value=self.url) from exc
            except httpx.RequestError as exc:  # a worker that ends closes its connections
                reason = f"the connection to {self.url} failed: {exc or type(exc).__name__}"
            else:
                if answer.status_code == HTTPStatus.OK:
                    return answer
                reason = _said(answer)
                if answer.status_code not in _AGAIN:
                    raise self._refused(answer.status_code, reason, file)
                pause = _pause(answer)
            if time.monotonic() + pause > deadline or stop.wait(pause):
                what = "" if file is None else f"{file.name}: "
                raise OverloadedError(
                    f"{what}{reason} (for {self._patience:g} seconds); wait longer, or start the service with more workers",
                    value=self.url,
                )

    def _refused(self, status: int, reason: str, file: Path | None) -> InvalidArgumentError:
        if status == HTTPStatus.UNAUTHORIZED:
            return InvalidArgumentError(f"{self.url} requires a different token: set {TOKEN_VARIABLE}, or pass token=",
                                        value=self.url)  # fmt: skip
        if file is None or status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            return InvalidArgumentError(f"{self.url} is not a bentoml-detectron service: status {status}", value=self.url)
        return ImageError(f"{file}: the service answered {status}, {reason}", value=str(file))


def _said(answer: httpx.Response) -> str:
    """The service's own words."""
    try:
        return str(answer.json()["error"]).removeprefix("image 0: ")[:500]  # a request has one
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"status {answer.status_code}"


def _pause(answer: httpx.Response) -> float:
    """Seconds after which the service wants to be asked again."""
    try:
        return min(max(float(answer.headers.get("retry-after", 1)), _LEAST_PAUSE), _LONGEST_PAUSE)
    except ValueError:
        return 1.0
