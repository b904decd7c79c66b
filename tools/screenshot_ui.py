"""Takes the picture of a running server's page with a sample image, for the README.

    bentoml detectron serve digits --port 3000
    python tools/screenshot_ui.py

It has 256 colours, for its size. Needs Chromium, as Debian's package ``chromium`` installs it.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--width", type=int, default=900, help="of the window, in pixels")
    parser.add_argument("--sample", type=int, default=3, help="which image, from 0")
    parser.add_argument("--output", type=Path, default=Path("docs/ui.png"))
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": options.width, "height": 800})
        page.goto(f"{options.url}/ui")
        page.locator("#samples button").nth(options.sample).click()
        expect(page.locator("#status")).to_contain_text("found in", timeout=30_000)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(options.output, optimize=True)
        browser.close()
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
