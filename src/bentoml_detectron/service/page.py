"""The page at ``/ui``: one file, and a policy that lets a browser run that file only."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

_PAGE = Path(__file__).with_name("page.html")


def page() -> tuple[bytes, bytes]:
    """The page in UTF-8, and its ``Content-Security-Policy``.

    Its script and its style are admitted by their digests; nothing else runs, and nothing is sent to or got from elsewhere.
    """
    content = _PAGE.read_bytes()
    script, style = (_digest(content, name) for name in (b"script", b"style"))
    return content, (
        b"default-src 'none'; script-src " + script + b"; style-src " + style + b"; img-src 'self' blob:; connect-src 'self'; "
        b"form-action 'none'; frame-ancestors 'none'; base-uri 'none'; require-trusted-types-for 'script'"
    )


def _digest(content: bytes, name: bytes) -> bytes:
    """A policy's source for the one element of that name."""
    (text,) = re.findall(b"<%s>(.*?)</%s>" % (name, name), content, re.DOTALL)
    return b"'sha256-" + base64.b64encode(hashlib.sha256(text).digest()) + b"'"
