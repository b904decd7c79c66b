"""What any service on BentoML spends that decodes an image: ``bentoml serve bare:service``, for ``bench_service_cost.py``.

It reads a request's body, decodes the JPEG in it by Pillow in a thread, and answers as many bytes as ``canned.py`` does. It
checks nothing, counts nothing, scales nothing, and has no model.
"""

from __future__ import annotations

import asyncio
import io
import os
from typing import Any

import bentoml
from PIL import Image

import canned

ANSWER = canned.detections(int(os.environ.get("CANNED", "100"))).to_json().encode()


def decode(body: bytes) -> None:
    Image.open(io.BytesIO(body[body.index(b"\xff\xd8\xff") :])).load()


class Front:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict":
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await asyncio.to_thread(decode, bytes(body))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": ANSWER})


@bentoml.service
class Bare:
    @bentoml.api
    def predict(self) -> str:
        raise NotImplementedError


service = Bare
service.add_asgi_middleware(Front)
