"""The page at ``/ui`` in a real browser, for tests."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from servers import environment

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Debian's package chromium, which make test installs where it is root"
)


class Page:
    """A page of the browser, all that it asked for, and what went wrong on it."""

    def __init__(self, browser: Any, url: str, width: int = 1280, **more: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, **more)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if "Security" in message.text else None)
        self.page.goto(f"{url}/ui")
        expect(self.page.locator("#about")).not_to_contain_text("Asking")

    def after(self, action: Callable[[], Any]) -> dict[str, Any]:
        """What the server answers to the request that an action leads to, when it is drawn."""
        with self.page.expect_response("**/predict") as answer:
            action()
        found = answer.value.json()
        assert answer.value.status == 200, found
        expect(self.page.locator("#status")).to_contain_text(re.compile(r" in \d+ ms"))
        assert not found["scores"] or f"{len(found['scores'])} found" in self.text("#status")
        return found

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def sample(self, number: int = 3) -> dict[str, Any]:
        return self.after(lambda: self.page.locator("#samples button").nth(number).click())

    def choose(self, name: str, content: bytes) -> None:
        self.page.set_input_files("#image", {"name": name, "mimeType": "", "buffer": content})

    def draw(self, *layers: str) -> np.ndarray:
        """The canvas with these layers alone, (H, W, 3) int16."""
        for box in self.page.locator("#layers input:enabled").all():
            box.set_checked(box.get_attribute("value") in layers)
        return self.pixels("picture")

    def pixels(self, canvas: str, alpha: bool = False) -> np.ndarray:
        """What is on a canvas, by its id, (H, W, 3) int16, or its alpha, (H, W)."""
        url = self.page.evaluate(f"{canvas}.toDataURL()")
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as drawn:
            return np.asarray(drawn.getchannel("A") if alpha else drawn.convert("RGB")).astype(np.int16)

    def copied(self, name: str) -> str:
        self.page.locator(f"button[value={name}]").click()
        expect(self.page.locator(f"button[value={name}]")).to_have_text("Copied")
        return str(self.page.evaluate("navigator.clipboard.readText()"))


def changed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(H, W) bool, where two pictures differ."""
    return np.abs(one - other).max(2) > 8


def contrast(colors: np.ndarray) -> float:
    """Between the lightest and the darkest of (N, 3) colors, as WCAG has it."""
    shares = colors / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722] + 0.05
    return float(luminance.max() / luminance.min())


def run_both(page: Page, folder: Path, **more: str) -> list[Any]:
    """What the copied commands print, from JSON and from Python."""
    folder.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def printed(*command: str) -> str:
        given = environment(folder, PATH=path, **more)
        return subprocess.run(command, cwd=folder, env=given, check=True, timeout=120, stdout=subprocess.PIPE, text=True).stdout

    by_curl = printed("sh", "-c", page.copied("curl"))
    by_python = printed(sys.executable, "-W", "ignore", "-c", page.copied("python"))
    return [json.loads(by_curl), ast.literal_eval(by_python)]
